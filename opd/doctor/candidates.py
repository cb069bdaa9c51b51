"""Candidate teachers side by side: `opd doctor teacher=a,b,c`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from opd.doctor.findings import WIDTH, Report, Status
from opd.objective.overlap import MASS, OVERLAP_K, SHARE
from opd.runs.intervals import are_shares
from opd.runs.text import MISSING, format_amount, format_bytes, format_number, format_percent, make_console


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the examination with one teacher found; None for what was not measured.

    Attributes:
        teacher: as typed.
        ready: whether the run would be.
        reason: the checks that failed.
        reward_gap: mean reward of the teacher minus that of the student.
        reverse_kl: of the first step, nats per token.
        overlap_share, overlap_mass: of the first step.
        tokens_per_second: of the first step.
        memory: bytes, estimated.
        reward_is_share: whether all rewards are within 0 and 1.
    """

    teacher: str
    ready: bool
    reason: str
    reward_gap: float | None
    reverse_kl: float | None
    overlap_share: float | None
    overlap_mass: float | None
    tokens_per_second: float | None
    memory: float | None
    reward_is_share: bool = True

    @property
    def score(self) -> float:
        """What the candidates are ranked by: the part of the reward gap where the teacher speaks of tokens that the student would say.

        The gap times the overlap's mass; the mass alone where no rewards were measured, and the gap alone where the teacher is the worse
        one. It is a rule of thumb and no forecast.
        """
        if not self.ready or self.overlap_mass is None:
            return float("-inf")
        gap = 1.0 if self.reward_gap is None else self.reward_gap
        return gap * self.overlap_mass if gap > 0 else gap


def candidate(teacher: str, report: Report) -> Candidate:
    """Return the figures of a report."""
    step, memory = report.figures.get("step", {}), report.figures.get("memory", {})
    answers = report.figures.get("rewards", {"student": [], "teacher": []})
    pairs = [pair for pair in zip(answers["student"], answers["teacher"], strict=True) if None not in pair]
    return Candidate(
        teacher,
        report.ready,
        ", ".join(finding.check for finding in report.of(Status.fail)),
        fmean(theirs - ours for ours, theirs in pairs) if pairs else None,
        step.get("reverse_kl"),
        step.get(SHARE),
        step.get(MASS),
        step.get("tokens_per_second"),
        memory.get("peak"),
        are_shares(reward for pair in pairs for reward in pair),
    )


def ranked(reports: Mapping[str, Report]) -> list[Candidate]:
    """Return the candidates by their score, best first."""
    return sorted((candidate(teacher, report) for teacher, report in reports.items()), key=lambda found: -found.score)


def to_dict(reports: Mapping[str, Report]) -> dict[str, Any]:
    ranking = [asdict(found) for found in ranked(reports)]
    return {"ranking": ranking, "teachers": {teacher: report.to_dict() for teacher, report in reports.items()}}


def show(reports: Mapping[str, Report]) -> None:
    """Print the ranking, with what to do about a teacher that is not ready."""
    console = make_console(WIDTH)
    table = Table(title="teachers, by reward gap times overlap", title_justify="left", show_edge=False)
    columns = ("", "teacher", "reward gap", f"top-{OVERLAP_K} overlap", "of ids", "reverse KL", "tokens/s", "memory", "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "teacher") else "right", overflow="fold")
    ranking = ranked(reports)
    shares = all(found.reward_is_share for found in ranking)
    for rank, found in enumerate(ranking, 1):
        cells = (
            str(rank) if found.ready else MISSING,
            found.teacher,
            format_amount(found.reward_gap, shares, "+"),
            *(format_percent(value, ".0f") for value in (found.overlap_mass, found.overlap_share)),
            format_number(found.reverse_kl, ".3f"),
            format_number(found.tokens_per_second, ",.0f"),
            format_bytes(found.memory),
            "" if found.ready else f"not ready: {found.reason}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for teacher, report in reports.items():
        for finding in report.of(Status.fail):
            console.print(Text(f"{teacher}: {finding.check}: {finding.what}" + (f" → {finding.remedy}" if finding.remedy else "")))
