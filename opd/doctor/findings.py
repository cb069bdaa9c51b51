"""What the doctor finds: a line each, with what to do about it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from opd.errors import OpdError


class Status(Enum):
    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """check: what was looked at. what: what was seen. remedy: what to do about it, "" where nothing has to be done."""

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


def complaint(check: str, error: OpdError) -> Finding:
    """A mistake that `opd train` would end with. Its message says what is wrong, then the remedy."""
    what, _, remedy = str(error).partition("; ")
    return fail(check, what, remedy)


@dataclass(slots=True)
class Report:
    """findings: in the order they were made. figures: what was measured or computed, as JSON. rendered: a prompt as each model sees it."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    rendered: dict[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return not self.of(Status.fail)

    def of(self, status: Status) -> list[Finding]:
        return [finding for finding in self.findings if finding.status is status]

    def add(self, *findings: Finding) -> None:
        self.findings.extend(findings)

    def look(self, check: str, find: Callable[[], Sequence[Finding]]) -> bool:
        """Add what `find` finds, or the mistake that it raises; returns whether it came to its end."""
        with self.told(check) as mistakes:
            self.add(*find())
        return not mistakes

    @contextmanager
    def told(self, check: str) -> Iterator[list[OpdError]]:
        """A mistake inside becomes a finding, and is put into the list that this gives."""
        mistakes: list[OpdError] = []
        try:
            yield mistakes
        except OpdError as error:
            mistakes.append(error)
            self.add(complaint(check, error))

    def to_dict(self) -> dict[str, Any]:
        return {
            "ready": self.ready,
            "findings": [finding.to_dict() for finding in self.findings],
            "figures": self.figures,
            "rendered": self.rendered,
        }
