"""A run on standard output: a live panel on a terminal, plain lines elsewhere, a summary at the end."""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from opd.config.options import Control
from opd.data.chat_template import ChatTemplate
from opd.objective.overlap import OVERLAP_K
from opd.runs import progress
from opd.runs.intervals import are_shares
from opd.runs.text import (
    describe_gap,
    format_amount,
    format_bytes,
    format_duration,
    format_kl,
    format_number,
    format_percent,
    format_reward,
    harmless,
)
from opd.training.build import Built
from opd.training.checkpoint import Checkpoint
from opd.training.evaluation import Evaluation, Rewards
from opd.training.events import Evaluated, Event, Rewound, Saved, StepDone
from opd.training.spans import describe as describe_spans

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0
SHOWN = (
    ("reverse_kl", "reverse KL", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("clipped", "clipped", "{:.1%}"),
    ("truncated", "truncated", "{:.1%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("perf/mfu", "MFU", "{:.1%}"),
)
PARTS = {"sample": "sampling", "wait": "waiting", "score": "scoring", "update": "update"}  # of a step's time


class Screen(Console):
    """A console that turns quiet when its pipe breaks, so that the run continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.warning("standard output is closed; the run continues without it")


class Display:
    """Shows a run on `console`; quiet unless `shown` (on the main process)."""

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
        self.work = ""  # what is under way besides steps
        self.last_line = 0.0
        self.noted: set[str] = set()

    def note(self, text: str) -> None:
        self.noted.add(text)
        self.console.print(Text(harmless(text)))

    def watch(self, watched: progress.Progress) -> None:
        """Show how far evaluations are: in the panel on a terminal, as lines elsewhere."""
        if not self.console.quiet:
            watched.show = self._show_work
            watched.seconds = progress.LIVE_SECONDS if self.console.is_terminal else progress.LINE_SECONDS

    def _show_work(self, line: str) -> None:
        self.work = line
        if self.live is not None:
            self.live.update(self._panel())
        elif line:
            self.note(line)

    def begin(self, step: int) -> None:
        """Open the panel on a terminal."""
        self.progress.update(self.task, completed=step)
        if self.console.is_terminal:
            self.live = Live(self._panel(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def show(self, event: Event, sample: str = "") -> None:
        """Show an event of the loop, and `sample`, a completion as text."""
        match event:
            case StepDone():
                self.metrics = event.metrics
                self.sample = sample or self.sample
                self.progress.update(self.task, completed=event.step)
                now = time.monotonic()
                if self.live is None and (event.step in (1, self.max_steps) or now - self.last_line >= SECONDS_BETWEEN_LINES):
                    self.last_line = now
                    values = "  ".join(f"{label} {text}" for label, text in self._values().items())
                    self.note(f"step {event.step}/{self.max_steps}  {values}")
            case Evaluated():
                if event.evaluation.has_results:
                    self.evaluation = event.evaluation
                    self.note(describe(event.evaluation))
            case Rewound():
                self.progress.update(self.task, completed=event.step)
            case Saved():
                pass
        if self.live is not None:
            self.live.update(self._panel())

    def _values(self) -> dict[str, str]:
        return {label: template.format(self.metrics[name]) for name, label, template in SHOWN if name in self.metrics}

    def _panel(self) -> Panel:
        values = self._values()
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(label, style="dim") for label in values))
        table.add_row(*(Text(text, style="bold") for text in values.values()))
        lines: list[Any] = [self.progress, table]
        if self.metrics:
            shares = (f"{label} {self.metrics[f'time/{name}'] / self.metrics['time/step']:.0%}" for name, label in PARTS.items())
            lines.append(Text(f"{'  '.join(shares)}  peak memory {format_bytes(self.metrics['memory/peak_bytes'])}", style="dim"))
        if self.evaluation is not None:
            lines.append(Text(describe(self.evaluation), style="cyan", overflow="fold", no_wrap=False))
        if self.work:
            lines.append(Text(harmless(self.work), style="cyan"))
        if self.sample:
            lines.append(Text(self.sample, style="dim", overflow="ellipsis", no_wrap=True))
        return Panel(Group(*lines), title="opd", border_style="blue")

    def summarise(self, summary: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Print the closing table: before, after, teacher, the share of the gap closed, what it cost, and the files by label."""
        table = Table(title="result", title_justify="left", show_edge=False)
        for column in ("", "before", "after", "teacher"):
            table.add_column(column, justify="left" if not column else "right")
        if summary["reward_after"] is not None:
            table.add_row("reward", *reward_cells(summary))
        if summary["eval_kl_after"] is not None:
            has_room = summary["reward_after"] is None  # next to rewards the intervals do not fit into 80 columns
            intervals = (summary.get(f"eval_kl_{when}_interval") if has_room else None for when in ("before", "after"))
            values = (summary[f"eval_kl_{when}"] for when in ("before", "after"))
            kl = (format_kl(*pair, digits=3 if has_room else 4) for pair in zip(values, intervals, strict=True))
            table.add_row("KL to teacher, nats/token", *kl, "0")
        for label, result in summary.get("datasets", {}).items():
            if result["reward_after"] is not None:
                table.add_row(f"reward, {label}", *reward_cells(result))
            if result["eval_kl_after"] is not None:
                table.add_row(f"KL, {label}", *(format_number(result[f"eval_kl_{when}"]) for when in ("before", "after")), "0")
        if table.row_count:
            self.console.print(table)
        if summary["gap_closed"] is not None:
            self.note(describe_gap(summary["gap_closed"]))
        self.note(
            f"{summary['steps']} steps, {format_number(summary['graded_tokens'], ',')} trained tokens, "
            f"{format_duration(summary['seconds'])} of training, {format_number(summary['tokens_per_second'], ',.0f')} tokens/s, "
            f"peak memory {format_bytes(summary['peak_memory_bytes'])}"
        )
        for text in summary.get("warnings", ()):
            if (line := f"warning: {text}") not in self.noted:  # not one of the first evaluation's
                self.note(line)
        for label, file in files.items():
            self.note(f"{label:<8} {file}")


class NoteHandler(logging.Handler):
    """Shows the log's warnings. `say` puts them in the words of the command line or of Python."""

    def __init__(self, display: Display, say: Callable[[str], str] = str) -> None:
        super().__init__(level=logging.WARNING)
        self.display, self.say = display, say

    def emit(self, record: logging.LogRecord) -> None:
        self.display.note(f"{record.levelname.lower()}: {self.say(record.getMessage())}")


def describe(evaluation: Evaluation) -> str:
    parts = [f"evaluation after step {evaluation.step}:"]
    if evaluation.rewards is not None:
        parts.append(f"reward {describe_rewards(evaluation.rewards)}")
    if evaluation.kl is not None:
        parts.append(f"KL(student‖teacher) {format_kl(evaluation.kl, evaluation.kl_interval)} nats/token")
    if evaluation.overlap is not None:
        mass, share = (format_percent(evaluation.overlap[name], ".0f") for name in ("mass", "share"))
        parts.append(f"top-{OVERLAP_K} overlap {mass} of the probability, {share} of the ids")
    return "  ".join(parts) + describe_datasets(evaluation)


def describe_datasets(evaluation: Evaluation) -> str:
    """Return an evaluation of each dataset, as the continuation of a line; empty without `data.mix`."""
    texts = []
    for label, result in evaluation.datasets.items():
        parts = [] if result.rewards is None else [f"reward {format_amount(result.rewards.mean, are_shares(result.rewards.each))}"]
        parts += [] if result.kl is None else [f"KL {format_number(result.kl)}"]
        texts.append(f"{label}: {', '.join(parts)}")
    return "".join(f"  ({text})" for text in texts)


def describe_rewards(rewards: Rewards) -> str:
    missed = sum(reward is None for reward in rewards.each)
    shown = format_reward(rewards.mean, (rewards.low, rewards.high), shares=are_shares(rewards.each))
    return f"{shown} over {rewards.count} answers" + (f" ({missed} of {rewards.count + missed} not judged)" if missed else "")


def reward_cells(result: Mapping[str, Any]) -> list[str]:
    """Return the rewards of a summary, or of one of its datasets: before, after, teacher."""
    rewards = [(result[f"reward_{when}"], result[f"reward_{when}_interval"]) for when in ("before", "after", "teacher")]
    return [format_reward(mean, interval, digits=0, shares=result.get("reward_is_share", True)) for mean, interval in rewards]


def introduce(display: Display, built: Built, start: Checkpoint | None) -> None:
    """Show models, sizes and settings of the run."""
    trainer, config, processes = built.trainer, built.trainer.config, built.trainer.accelerator.num_processes
    size, n = config.train.batch_size, config.sampling.n
    parameters = trainer.student.num_parameters()  # of 4-bit weights as well
    of = f" of {built.rows:,}" if built.rows > len(trainer.prompts) else ""
    teachers = config.parts_by_teacher
    named = ", ".join(part.teacher_name + (f" ({label or 'others'})" if len(teachers) > 1 else "") for label, part in teachers.items())
    device = trainer.accelerator.device
    where = str(device) if processes == 1 else f"{device.type}, {processes} processes"
    display.note(f"{config.model.path} ({parameters / 1e6:,.1f} M parameters) learns from {named} on {where}")
    display.note(
        f"each step: {size} prompts × {processes} {'processes' if processes > 1 else 'process'} × {n} completions = "
        f"{size * processes * n} rollouts; "
        f"{trainer.max_steps} steps over {len(trainer.prompts):,}{of} prompts"
    )
    display.note(f"learning rate {format_number(config.optim.lr, '.2g')}")
    if all(ChatTemplate(built.tokenizer, part.data.chat_template_kwargs).find() is None for part in config.parts.values()):
        display.note("no chat template: prompts are plain text")
    if config.data.mix:
        rows = Counter(prompt.dataset for prompt in trainer.prompts)
        shares = {label: dataset.weight for label, dataset in config.data.datasets.items()}
        each = (f"{label} {share / sum(shares.values()):.0%} ({rows[label]:,} prompts)" for label, share in shares.items())
        display.note(f"datasets: {', '.join(each)}")
    if trainer.strategy.is_sharded:
        held = f"{trainer.strategy.held_parameters() / 1e6:,.2f} M of the parameters"
        display.note(f"sharded ({trainer.strategy.name}): each process holds {held} between computations")
    display.note(f"sampling: {built.sampling}")
    if config.control is not Control.none:
        measured = "" if config.control is Control.self else ", which is measured as usual"
        display.note(f"control={config.control.value}: trained without the information of the teacher{measured}")
    if trainer.scoring.spans is not None:
        display.note(describe_spans(trainer.scoring.spans))
    if built.served:
        display.note(f"teacher: {built.served}; scored at temperature 1 (ppo.temperature); no KL in evaluations of its prompts")
    for line in built.differences:
        display.note(f"warning: {line}")
    if start is not None:
        display.note(f"resuming after step {start.step} from {start.path}")
        asked, used = config.train.max_tokens_per_micro_batch, trainer.scoring.choices["max_tokens"]
        if used != asked:
            display.note(
                f"micro-batches of {used} tokens: train.max_tokens_per_micro_batch={asked} did not fit into memory before; set another "
                "number to try it"
            )
