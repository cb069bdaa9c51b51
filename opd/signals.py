"""Signals that ask a run to stop: noted when they arrive, acted on at the next point where nothing is lost.

They reach a whole process, so what has arrived is kept for the whole process too. Whoever works for long asks `check` now and then.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opd.errors import PREEMPTED, Preempted

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = signal.SIGUSR2  # submitit has SLURM send it some time before that of a job is
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # torchrun and its like set the first, accelerate launch of one process the second
ORPHAN_SECONDS = 120.0  # how long a process whose launcher is gone may take to save
PR_SET_PDEATHSIG = 1

arrived: list[signal.Signals] = []
seen: set[int] = set()  # all that ever asked this process to stop


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(arrived)


def check(in_any_thread: bool = False) -> None:
    """Raises `Preempted` when this process was asked to stop; in other threads than the main one only if `in_any_thread`."""
    if arrived and (in_any_thread or threading.current_thread() is threading.main_thread()):
        raise Preempted(f"stopped by {arrived[0].name}")


@contextmanager
def noted() -> Iterator[None]:
    """Within it the signals that ask to stop are noted; a second SIGINT raises KeyboardInterrupt. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, note) for number in ASKING}
    arrived.clear()
    try:
        yield
    finally:
        arrived.clear()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def note(number: int, frame: FrameType | None) -> None:
    """The handler. A process whose launcher is gone is not asked twice: it has `ORPHAN_SECONDS` left."""
    if number == signal.SIGINT and signal.SIGINT in arrived:
        raise KeyboardInterrupt
    arrived.append(signal.Signals(number))
    seen.add(number)
    if is_orphan():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action ends the process also inside a call that never returns
        signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)


@contextmanager
def raised() -> Iterator[None]:
    """Within it, and outside of `noted`, all of them but SIGINT raise SystemExit at once, from `Preempted`, so that no `except Exception`
    goes on. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(PREEMPTED) from Preempted(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in ASKING if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within it, once it has taken so long in Python. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_parent: list[int] = []  # the launcher, where there is one


def is_orphan() -> bool:
    return bool(_parent) and os.getppid() != _parent[0]


def follow_launcher() -> None:
    """Lets a process that a launcher started be asked to stop when the launcher dies, however it dies; Linux alone can do that."""
    if any(name in os.environ for name in LAUNCHED):
        _parent[:] = [os.getppid()]
        die_with_parent(signal.SIGTERM)


def die_with_parent(number: signal.Signals) -> None:
    """Lets the kernel send this process `number` when its parent dies. Does nothing outside Linux."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(PREEMPTED)
