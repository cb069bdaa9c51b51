"""How far long work is, for people who wait for it: `evaluating the teacher: 120 of 500, 40 s`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

from opd.runs.text import format_duration, harmless

if TYPE_CHECKING:
    from rich.console import Console

LIVE_SECONDS, LINE_SECONDS = 0.5, 10.0  # between two looks of a line that is replaced, and between two lines of a log


class Progress:
    """Shows a line about the work that is under way, from a thread of its own, as the work may take minutes between two reports.

    Args:
        show: Gets the line, and an empty text when the work has ended; None shows nothing.
        seconds: Between two lines, and before the first one.
    """

    def __init__(self, show: Callable[[str], None] | None = None, seconds: float = LINE_SECONDS) -> None:
        self.show = show
        self.seconds = seconds

    @contextmanager
    def of(self, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show the work of the block.

        Args:
            what: The work, in words.
            total: How many parts it has; None for work that is not counted.

        Yields:
            A function to call with the number of parts that are done.
        """
        show, done, ended, start = self.show, [0], Event(), time.monotonic()

        def note(count: int) -> None:
            done[0] = count

        def watch() -> None:
            assert show is not None
            while not ended.wait(self.seconds):
                counted = "" if total is None else f"{min(done[0], total):,} of {total:,}, "
                show(f"{what}: {counted}{format_duration(time.monotonic() - start)}")

        if show is None:
            yield note
            return
        watcher = Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield note
        finally:
            ended.set()
            watcher.join()
            show("")


def progress_on(console: "Console") -> Progress:
    """Return progress on a console: on a terminal a line that is replaced, elsewhere lines at intervals."""
    from rich.text import Text

    if not console.is_terminal:
        return Progress(lambda line: console.print(Text(harmless(line))) if line else None)
    status = console.status("")

    def show(line: str) -> None:
        status.update(Text(harmless(line)))
        status.start() if line else status.stop()

    return Progress(show, LIVE_SECONDS)
