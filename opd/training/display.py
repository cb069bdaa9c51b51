"""What a person sees of a run, on standard output: a live panel on a terminal, plain lines elsewhere, a summary at the end."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from opd.runs.text import harmless
from opd.training.evaluate import Evaluation, Rewards
from opd.training.loop import Evaluated, Event, Rewound, Saved, StepDone

log = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 5.0
SHOWN = (
    ("reverse_kl", "reverse KL", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("clipped", "clipped", "{:.1%}"),
    ("truncated", "truncated", "{:.1%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


class Screen(Console):
    """A console that falls silent when nobody reads it any more; a run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.warning("nobody reads the screen any more; the run goes on without it")


class Display:
    """Shows a run on `console`; silent unless `shown` (the main process)."""

    def __init__(self, max_steps: int, shown: bool, console: Console | None = None) -> None:
        self.console = console or Screen(quiet=not shown, highlight=False, soft_wrap=True)
        self.live: Live | None = None
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("steps", total=max_steps)
        self.max_steps = max_steps
        self.metrics: dict[str, float] = {}
        self.evaluation: Evaluation | None = None
        self.sample = ""
        self.last_line = 0.0

    def note(self, text: str) -> None:
        self.console.print(Text(harmless(text)))

    def begin(self, step: int) -> None:
        """Open the panel, where there is a terminal."""
        self.progress.update(self.task, completed=step)
        if self.console.is_terminal:
            self.live = Live(self._panel(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def show(self, event: Event, sample: str = "") -> None:
        """Take in what happened. sample: a completion as text."""
        match event:
            case StepDone():
                self.metrics = event.metrics
                self.sample = sample or self.sample
                self.progress.update(self.task, completed=event.step)
                if self.live is None:
                    self._line(event)
            case Evaluated():
                self.evaluation = event.evaluation
                self.note(describe(event.evaluation))
            case Rewound():
                self.progress.update(self.task, completed=event.step)
            case Saved():
                pass
        if self.live is not None:
            self.live.update(self._panel())

    def _line(self, event: StepDone) -> None:
        now = time.monotonic()
        if event.step not in (1, self.max_steps) and now - self.last_line < LINE_EVERY_SECONDS:
            return
        self.last_line = now
        self.note(f"step {event.step}/{self.max_steps}  " + "  ".join(f"{label} {text}" for label, text in self._values()))

    def _values(self) -> list[tuple[str, str]]:
        return [(label, template.format(self.metrics[name])) for name, label, template in SHOWN if name in self.metrics]

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        for label, _ in self._values():
            table.add_column(label)
        if self.metrics:
            table.add_row(*(Text(label, style="dim") for label, _ in self._values()))
            table.add_row(*(Text(text, style="bold") for _, text in self._values()))
        lines: list[Any] = [self.progress, table]
        if self.evaluation is not None:
            lines.append(Text(describe(self.evaluation), style="cyan"))
        if self.sample:
            lines.append(Text(self.sample, style="dim", overflow="ellipsis", no_wrap=True))
        return Panel(Group(*lines), title="opd", border_style="blue")

    def summarise(self, summary: Mapping[str, Any], places: Mapping[str, str]) -> None:
        """The closing table: before, after, teacher, the share of the gap closed, time, and where things are."""
        table = Table(title="result", title_justify="left", show_edge=False)
        for column in ("", "before", "after", "teacher"):
            table.add_column(column, justify="left" if not column else "right")
        if summary["reward_after"] is not None:
            table.add_row("reward", *(with_interval(summary, when) for when in ("before", "after", "teacher")))
        if summary["eval_kl_after"] is not None:
            table.add_row("KL to teacher, nats/token", f"{summary['eval_kl_before']:.4f}", f"{summary['eval_kl_after']:.4f}", "0")
        self.console.print(table)
        if summary["gap_closed"] is not None:
            self.note(f"{summary['gap_closed']:.1%} of the gap to the teacher closed")
        self.note(
            f"{summary['steps']} steps, {summary['graded_tokens']:,} graded tokens, {summary['seconds']:.0f} s of training, "
            f"{summary['tokens_per_second'] or 0:,.0f} tokens/s, peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        for label, place in places.items():
            self.note(f"{label:<8} {place}")


class NoteHandler(logging.Handler):
    """Brings the log's warnings to the screen."""

    def __init__(self, display: Display) -> None:
        super().__init__(level=logging.WARNING)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.note(f"{record.levelname.lower()}: {record.getMessage()}")


def with_interval(summary: Mapping[str, Any], when: str) -> str:
    value, bounds = summary[f"reward_{when}"], summary[f"reward_{when}_interval"]
    return "–" if value is None else f"{value:.1%} [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]"


def describe(evaluation: Evaluation) -> str:
    parts = [f"evaluation after step {evaluation.step}:"]
    if evaluation.rewards is not None:
        parts.append(f"reward {describe_rewards(evaluation.rewards)}")
    if evaluation.kl is not None:
        parts.append(f"KL(student‖teacher) {evaluation.kl:.4f} nats/token")
    return "  ".join(parts)


def describe_rewards(rewards: Rewards) -> str:
    return f"{rewards.mean:.1%} [{rewards.low:.1%}, {rewards.high:.1%}] of {rewards.count}"
