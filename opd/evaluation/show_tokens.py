"""What `opd sample` and `opd score` show on a terminal, and the page that `opd score` writes."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from opd.evaluation.sample_score import Judged
from opd.runs.text import harmless

MOST_DISAGREED = 5
STRONG = 3.0  # nats of disagreement from which the colour is full


def side_by_side(prompt: str, answers: Mapping[str, Sequence[str]]) -> Table:
    """A column a model, a row an answer."""
    table = Table(title=Text(harmless(prompt)), title_justify="left", show_edge=False, show_lines=True, expand=True)
    for role in answers:
        table.add_column(role, overflow="fold", ratio=1)
    for row in zip(*answers.values(), strict=True):
        table.add_row(*(Text(harmless(answer)) for answer in row))
    return table


def coloured(judged: Judged) -> Iterator[Any]:
    """The text, blue where the teacher finds a token likelier than the student and orange where less; then where they differ most."""
    text = Text(harmless(judged.before), style="dim")
    rows = list(zip(judged.tokens, judged.student, judged.teacher, strict=True))
    for token, ours, theirs in rows:
        text.append(harmless(token), style=style(theirs - ours))
    yield text
    table = Table(show_edge=False)
    for name in ("token", "student, nats", "teacher, nats", "difference"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for token, ours, theirs in sorted(rows, key=lambda row: -abs(row[2] - row[1]))[:MOST_DISAGREED]:
        table.add_row(Text(repr(harmless(token))), f"{ours:.3f}", f"{theirs:.3f}", f"{theirs - ours:+.3f}")
    yield table
    count = len(rows)
    ours, theirs = sum(judged.student) / count, sum(judged.teacher) / count
    if judged.before:
        yield Text(f"the first token, {harmless(judged.before)!r}, has none before it and no log-prob; --prompt gives it one")
    yield Text(f"{count} tokens: student {ours:.3f}, teacher {theirs:.3f} nats/token on average")


def style(difference: float) -> str:
    strength = min(abs(difference) / STRONG, 1)
    if strength < 0.1:
        return ""
    light, dark = round(255 * (1 - 0.75 * strength)), round(255 - 110 * strength)
    return f"black on #{light:02x}{dark:02x}ff" if difference > 0 else f"black on #ff{dark:02x}{light:02x}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:16px/1.7 ui-monospace,monospace;max-width:60em;margin:2em auto;padding:0 1em}}
p.text{{white-space:pre-wrap;overflow-wrap:anywhere}}span[title]{{border-radius:3px;unicode-bidi:isolate}}</style></head>
<body><h1>{title}</h1><p>{legend}</p><p class="text">{tokens}</p></body></html>
"""


def page(judged: Judged, title: str) -> str:
    """A self-contained HTML page: tokens blue where the teacher finds them likelier, orange where less; both probabilities on hover."""
    tokens = "".join(
        f'<span title="{escape(f"student {ours:.3f} teacher {theirs:.3f} difference {theirs - ours:+.3f} nats")}" '
        f'style="background:{colour(theirs - ours)}">{escape(harmless(token))}</span>'
        for token, ours, theirs in zip(judged.tokens, judged.student, judged.teacher, strict=True)
    )
    legend = "Blue: the teacher finds the token likelier than the student does; orange: less likely. Hover for log-probabilities in nats."
    return PAGE.format(title=escape(title), legend=legend, tokens=escape(harmless(judged.before)) + tokens)


def colour(difference: float) -> str:
    red, green, blue = (64, 132, 244) if difference > 0 else (244, 140, 32)
    return f"rgba({red},{green},{blue},{min(abs(difference) / STRONG, 1) * 0.7:.2f})"
