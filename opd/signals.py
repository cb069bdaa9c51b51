"""Signals that ask a run to stop: recorded on arrival, acted on at the next point where nothing is lost.

A signal reaches the whole process, so the record is global. Long-running code calls `check` now and then.
"""

import ctypes
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType

from opd.errors import PREEMPTED, Preempted

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = signal.SIGUSR2  # submitit has SLURM send it shortly before a job's time limit
LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and alike; by `accelerate launch` for a single process
ORPHAN_SECONDS = 120.0  # time to save for a worker whose launcher died
PR_SET_PDEATHSIG = 1
STOPPING = b"\nopd: stopping after this token or step; press Ctrl-C again to end without saving\n"

pending: list[signal.Signals] = []  # received by the current run
received: set[int] = set()  # received since the process started
_launcher: list[int] = []  # its process id, in a worker


def requested() -> bool:
    """Return whether the current run was asked to stop."""
    return bool(pending)


def check() -> None:
    """Raise `Preempted`, in the main thread only, if the current run was asked to stop."""
    if pending and threading.current_thread() is threading.main_thread():
        raise Preempted(f"stopped by {pending[0].name}")


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object], numbers: Sequence[signal.Signals] = ASKING) -> Iterator[bool]:
    """Install `handler` for `numbers` and restore the earlier handlers on exit. Yields False, and does nothing, outside the main thread.

    SIGHUP stays ignored under nohup. Otherwise it means that the terminal is gone, where writing would now fail with EIO.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            for descriptor in (1, 2):
                with suppress(OSError):
                    if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handlers = {number: signal.getsignal(number) for number in numbers if in_main_thread and not (nohup and number == signal.SIGHUP)}
    for number in handlers:
        signal.signal(number, handle)
    try:
        yield in_main_thread
    finally:
        for number, earlier in handlers.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextmanager
def deferred() -> Iterator[None]:
    """Record the signals that ask to stop, for `check`. A second SIGINT raises KeyboardInterrupt; the first one is answered at once."""

    def record(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in pending:
            raise KeyboardInterrupt
        if number == signal.SIGINT and is_first:
            with suppress(OSError):
                os.write(2, STOPPING)  # not through Python's buffers, which the signal may have interrupted
        pending.append(signal.Signals(number))
        received.add(number)
        if _launcher and os.getppid() != _launcher[0]:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default action also ends a process inside a call that never returns
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)

    pending.clear()
    is_first = launched_as()[0] == 0
    try:
        with handled(record):
            yield
    finally:
        pending.clear()


def raised() -> AbstractContextManager[object]:
    """Raise SystemExit from `Preempted`, which no `except Exception` catches, on every signal that asks to stop except SIGINT."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(PREEMPTED) from Preempted(f"stopped by {signal.Signals(number).name}")

    return handled(stop, [number for number in ASKING if number != signal.SIGINT])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError once the block has run for `seconds`. Does nothing outside the main thread."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    with handled(late, [signal.SIGALRM]) as in_main_thread:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            if in_main_thread:
                signal.setitimer(signal.ITIMER_REAL, 0)


def is_worker() -> bool:
    """Return whether a launcher started this process as one of several."""
    return any(name in os.environ for name in LAUNCHED)


def launched_as() -> tuple[int, int]:
    """Return this process's rank and how many processes there are, as a launcher says; 0 and 1 where it does not, or contradicts itself."""
    rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    consistent = "LOCAL_RANK" in os.environ and rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes)
    return (int(rank), int(processes)) if consistent else (0, 1)


def follow_launcher() -> None:
    """In a worker, ask the run to stop when the launcher dies, whatever kills it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)  # `opd.cli.launch` starts workers with these signals blocked
    if is_worker():
        _launcher[:] = [os.getppid()]
        die_with_parent(signal.SIGTERM)


def keep_exit_code() -> None:
    """In a worker whose outcome is decided, ignore the signals that ask to stop: the launcher sends one to all workers when one fails."""
    if is_worker():
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)  # of the process: blocking it would leave it to the other threads


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send `number` to this process when its parent dies. Linux only; does nothing elsewhere."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before prctl took effect
        os._exit(PREEMPTED)
