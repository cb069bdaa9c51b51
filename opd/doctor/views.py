"""Checks of the teacher's own view of a row: what it reads in place of the student's prompt, and how much longer that is."""

from collections.abc import Mapping
from os.path import commonprefix

from opd.data.prompts import VIEWS, View
from opd.doctor.findings import Finding, ok, warn
from opd.models.load import decode

SHOWN = 160  # characters of a difference
CHECKS = {"teacher": "teacher's view", "contrast": "teacher's contrast"}


def check_views(views: Mapping[str, View]) -> tuple[list[Finding], dict[str, str]]:
    """Compare the teacher's views of a row with the student's.

    Args:
        views: Of one row, by name.

    Returns:
        The findings, and each view of the teacher as text, by check.
    """
    findings, texts = [], {}
    _, own = views["student"].render()
    tokenizer = views["student"].template.tokenizer
    student = decode(tokenizer, own)
    for name in (name for name in VIEWS if name in views):
        check = CHECKS[name]
        _, ids = views[name].render()
        texts[check] = decode(tokenizer, ids)
        if texts[check] == student:
            remedy = f"it changes nothing there: name a column of the row in {VIEWS[name]}, or remove it"
            findings.append(warn(check, "is what the student reads in the first row", remedy))
            continue
        here, there = differing(student, texts[check])
        change = f"{there} in place of {here}" if here != repr("") else f"with {there}"
        what = f"{len(ids)} tokens in the first row, {len(ids) - len(own):+d} to the student's {len(own)}: {change}"
        findings.append(ok(check, what))
    return findings, texts


def differing(first: str, second: str) -> tuple[str, str]:
    """Return the parts in which two texts differ, from the word at which they begin to, each in quotes and shortened in its middle."""
    start = len(commonprefix([first, second]))  # noqa: RUF071 - of characters
    end = len(commonprefix([first[start:][::-1], second[start:][::-1]]))  # noqa: RUF071
    start = max(first.rfind(" ", 0, start), first.rfind("\n", 0, start), first.rfind(">", 0, start)) + 1
    return tuple(shortened(text[start : len(text) - end]) for text in (first, second))  # type: ignore[return-value]


def shortened(text: str) -> str:
    half = SHOWN // 2
    return repr(text if len(text) <= SHOWN else f"{text[:half]} [...] {text[-half:]}")
