"""What `opd sample` and `opd score` show on a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from opd.judging.speak import STRONG, Scored, visible

MOST_DISAGREED = 5


def side_by_side(prompt: str, answers: Mapping[str, Sequence[str]]) -> Table:
    """A column a model, a row an answer."""
    table = Table(title=Text(visible(prompt)), title_justify="left", show_edge=False, show_lines=True, expand=True)
    for role in answers:
        table.add_column(role, overflow="fold", ratio=1)
    for row in zip(*answers.values(), strict=True):
        table.add_row(*(Text(visible(answer)) for answer in row))
    return table


def coloured(scored: Scored) -> Iterator[Any]:
    """The text, blue where the teacher finds a token likelier than the student and orange where less; then where they differ most."""
    text = Text(visible(scored.before), style="dim")
    rows = list(zip(scored.tokens, scored.student, scored.teacher, strict=True))
    for token, ours, theirs in rows:
        text.append(visible(token), style=style(theirs - ours))
    yield text
    table = Table(show_edge=False)
    for name in ("token", "student, nats", "teacher, nats", "difference"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for token, ours, theirs in sorted(rows, key=lambda row: -abs(row[2] - row[1]))[:MOST_DISAGREED]:
        table.add_row(Text(repr(visible(token))), f"{ours:.3f}", f"{theirs:.3f}", f"{theirs - ours:+.3f}")
    yield table
    count = len(rows)
    ours, theirs = sum(scored.student) / count, sum(scored.teacher) / count
    if scored.before:
        yield Text(f"the first token, {visible(scored.before)!r}, has none before it and no log-prob; --prompt gives it one")
    yield Text(f"{count} tokens: student {ours:.3f}, teacher {theirs:.3f} nats/token on average")


def style(difference: float) -> str:
    strength = min(abs(difference) / STRONG, 1)
    if strength < 0.1:
        return ""
    light, dark = round(255 * (1 - 0.75 * strength)), round(255 - 110 * strength)
    return f"black on #{light:02x}{dark:02x}ff" if difference > 0 else f"black on #ff{dark:02x}{light:02x}"
