"""Ends a run that hangs, with the stacks of all threads written to a file."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.errors import INTERNAL

LATER = 60.0  # seconds until the last resort: the thread here cannot run while another one holds the interpreter's lock
LOOKS = 20  # how often the thread looks within the limit

Beat = Callable[[], None]


@contextmanager
def watched(minutes: float | None, file: Path, before_the_end: Callable[[str], None]) -> Iterator[Beat]:
    """Yields what has to be called at least every `minutes`, or stacks go to `file` and the process ends with exit code 70.

    before_the_end: called with the reason. None for minutes: nothing is watched. A process that cannot run Python any more ends a
    minute later, with exit code 1.
    """
    if minutes is None:
        yield lambda: None
        return
    limit = 60 * minutes
    last = time.monotonic()
    over = threading.Event()

    def beat() -> None:
        nonlocal last
        last = time.monotonic()
        faulthandler.dump_traceback_later(limit + LATER, exit=True, file=stacks)

    def watch() -> None:
        while not over.wait(limit / LOOKS):
            if time.monotonic() - last > limit:
                faulthandler.dump_traceback(stacks)
                try:
                    before_the_end(f"nothing finished for {minutes:g} minutes (train.watchdog_minutes); the stacks are in {file}")
                finally:
                    os._exit(INTERNAL)

    with file.open("w", encoding="utf-8") as stacks:
        beat()
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        try:
            yield beat
        finally:
            over.set()
            faulthandler.cancel_dump_traceback_later()
    if file.stat().st_size == 0:
        file.unlink()
