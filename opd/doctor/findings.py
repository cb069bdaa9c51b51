"""Findings of `opd doctor`: results of checks, each with a remedy where something is wrong, and how a terminal shows them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.errors import OpdError
from opd.runs.progress import Progress

WIDTH = 130  # characters, where the output is not a terminal
CHECK_WIDTH = 32  # of the longest name of a check


class Status(Enum):
    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Attributes:
        check: the subject of the check.
        status: whether the run is ready in this respect; a warning does not stop it.
        what: the facts.
        remedy: what to do about them; empty if nothing.
    """

    check: str
    status: Status
    what: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        return {**asdict(self), "status": self.status.value}


def ok(check: str, what: str) -> Finding:
    return Finding(check, Status.ok, what)


def warn(check: str, what: str, remedy: str) -> Finding:
    return Finding(check, Status.warn, what, remedy)


def fail(check: str, what: str, remedy: str) -> Finding:
    return Finding(check, Status.fail, what, remedy)


def ignore(finding: Finding) -> None:
    """Do nothing with a finding."""


@dataclass(slots=True)
class Report:
    """All findings on a run.

    Attributes:
        findings: in the order of the checks.
        figures: measured and estimated numbers, as JSON.
        rendered: the first prompt as each model's chat template renders it, and the teacher's views of it.
        members: of the sweep whose first member the run is.
        on_finding: called with each finding at once.
        progress: tells what is being checked.
    """

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    rendered: dict[str, str] = field(default_factory=dict)
    members: int = 1
    on_finding: Callable[[Finding], None] = ignore
    progress: Progress = field(default_factory=Progress)

    @property
    def ready(self) -> bool:
        return not self.of(Status.fail)

    def of(self, status: Status) -> list[Finding]:
        return [finding for finding in self.findings if finding.status is status]

    def add(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.on_finding(finding)

    def run(self, check: str, find: Callable[[], Sequence[Finding]]) -> bool:
        """Add the findings of `find`, or the error that it raises; return whether it raised none."""
        with self.catch(check) as errors:
            self.add(*find())
        return not errors

    @contextmanager
    def catch(self, check: str) -> Iterator[list[OpdError]]:
        """Turn an `OpdError` raised inside into a failed finding; yield the list that it is put into."""
        errors: list[OpdError] = []
        try:
            yield errors
        except OpdError as error:
            errors.append(error)
            what, _, remedy = str(error).partition("; ")  # error messages end with the remedy
            self.add(fail(check, what, remedy))

    def to_dict(self) -> dict[str, Any]:
        findings = [finding.to_dict() for finding in self.findings]
        return {"ready": self.ready, "findings": findings, "figures": self.figures, "rendered": self.rendered}


MARKS = {Status.ok: ("ok", "green"), Status.warn: ("warn", "yellow"), Status.fail: ("FAIL", "bold red")}


def show_finding(console: Console, finding: Finding) -> None:
    """Print a finding with its remedy, in columns that all findings share."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=len("FAIL"))
    table.add_column(no_wrap=True, min_width=CHECK_WIDTH)
    table.add_column(overflow="fold")
    mark, style = MARKS[finding.status]
    text = Text(finding.what)
    if finding.remedy:
        text.append(f"\n→ {finding.remedy}", style="cyan")
    table.add_row(Text(mark, style=style), Text(finding.check), text)
    console.print(table)


def show_end(console: Console, report: Report) -> None:
    """Print the first prompt as each model sees it, and whether the run is ready."""
    if report.rendered:
        texts = dict(report.rendered)
        if texts.get("student") == texts.get("teacher"):
            texts = {"": texts.pop("student"), **{name: text for name, text in texts.items() if name != "teacher"}}
        titles = {"": "first prompt", "student": "first prompt, student's template", "teacher": "first prompt, teacher's template"}
        texts = {titles.get(name, f"first prompt, {name}"): text for name, text in texts.items()}
        prompts = Table(show_edge=False)
        for title in texts:
            prompts.add_column(title, overflow="fold", ratio=1)
        prompts.add_row(*map(Text, texts.values()))
        console.print(prompts)
    if report.ready:
        warnings = len(report.of(Status.warn))
        console.print(Text(f"ready, {warnings} to look at" if warnings else "ready", style="bold green"))
