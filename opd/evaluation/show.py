"""What `opd eval`, `sample` and `score` show on a terminal, and the page that `opd score --html` writes."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.evaluation.sample_score import ScoredText
from opd.report.page import document
from opd.runs.answers import file_beside
from opd.runs.text import describe_gap, format_kl, format_number, format_percent, format_reward, harmless

WIDTH = 130  # characters, where the output is not a terminal
MAX_ROWS = 40  # of tokens in a table
MAX_DISAGREEMENTS = 20  # of the rows of a longer text
FULL_COLOUR = 3.0  # nats of disagreement


def show_models(console: Console, models: Mapping[str, str | None]) -> None:
    """Print the path of each model, by role."""
    for role, path in models.items():
        if path is not None:
            console.print(Text(f"{role:<10}{path}"))


def show_evaluation(console: Console, evaluation: Mapping[str, Any], out: Path | None) -> None:
    """Print the result of `judge`, a table and the differences, and the file that it goes to, if any."""
    for name, task in evaluation["tasks"].items():
        console.print(_evaluation_table(name, task))
        shares = task.get("reward_is_share", True)
        for other, value in task.get("against", {}).items():
            difference = format_reward(value["mean"], (value["low"], value["high"]), sign="+", shares=shares)
            console.print(Text(f"against the {other}: {difference}"))
        if (share := task.get("gap_closed")) is not None:
            console.print(Text(describe_gap(share, task["gap_closed_interval"])))
    if out is not None:
        answers = f"; the answers are in {file_beside(out).name}" if evaluation["tasks"]["evaluation"]["prompts"] else ""
        console.print(Text(f"written to {out}{answers}"))
    else:
        console.print("not written to a file; --out FILE does that")


def _evaluation_table(name: str, task: Mapping[str, Any]) -> Table:
    models = task["models"]
    how = "greedy" if task["temperature"] == 0 else f"{task['samples']} answers at temperature {task['temperature']:g}"
    table = Table(title=f"{name}: {task['prompts']} prompts of {task['data']}, {how}", title_justify="left", show_edge=False)
    table.add_column("")
    for model in models:
        table.add_column(model, justify="right")
    if task["prompts"]:
        shares = task.get("reward_is_share", True)
        table.add_row("reward", *(format_reward(each["mean"], (each["low"], each["high"]), shares=shares) for each in models.values()))
        for k in next(iter(models.values())).get("pass", {}):
            table.add_row(f"pass@{k}", *(format_percent(each.get("pass", {}).get(k)) for each in models.values()))
        table.add_row("length, tokens", *(format_number(each["length"], ".1f") for each in models.values()))
        table.add_row("truncated", *(format_percent(each["truncated"]) for each in models.values()))
    if any(each["kl"] is not None for each in models.values()):
        table.add_row("KL to teacher, nats/token", *(format_kl(each["kl"], each.get("kl_interval")) for each in models.values()))
    return table


def completion_table(prompt: str, completions: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with a column per model and a row per completion."""
    table = Table(title=Text(harmless(prompt)), title_justify="left", show_edge=False, show_lines=True, expand=True)
    for role in completions:
        table.add_column(role, overflow="fold", ratio=1)
    for row in zip(*completions.values(), strict=True):
        table.add_row(*(Text(harmless(completion)) for completion in row))
    return table


def score_parts(scored: ScoredText) -> Iterator[Any]:
    """Yield what to print: the text, blue where the teacher finds a token more likely, a table of tokens in their order, the means.

    The table of a long text has the tokens that differ most.
    """
    rows = list(zip(scored.tokens, scored.student, scored.teacher, strict=True))
    text = Text(harmless(scored.first), style="dim")
    for token, student, teacher in rows:
        text.append(harmless(token), style=_style(teacher - student))
    yield text
    table = Table(show_edge=False)
    for name in ("token", "student, nats", "teacher, nats", "teacher − student"):
        table.add_column(name, justify="left" if name == "token" else "right")
    shown = rows
    if len(rows) > MAX_ROWS:
        differing = sorted(range(len(rows)), key=lambda index: -abs(rows[index][2] - rows[index][1]))
        shown = [rows[index] for index in sorted(differing[:MAX_DISAGREEMENTS])]
        yield Text(f"the {len(shown)} of {len(rows)} tokens that differ most, in their order; --json has all:")
    for token, student, teacher in shown:
        table.add_row(Text(repr(harmless(token))), f"{student:.3f}", f"{teacher:.3f}", f"{teacher - student:+.3f}")
    yield table
    if scored.first:
        yield Text(f"the first token, {harmless(scored.first)!r}, has no log-prob as nothing comes before it; --prompt gives it a context")
    student, teacher = sum(scored.student) / len(rows), sum(scored.teacher) / len(rows)
    yield Text(f"{len(rows)} tokens: student {student:.3f}, teacher {teacher:.3f} nats/token on average")


def _style(difference: float) -> str:
    strength = min(abs(difference) / FULL_COLOUR, 1)
    if strength < 0.1:
        return ""
    light, dark = round(255 * (1 - 0.75 * strength)), round(255 - 110 * strength)
    return f"black on #{light:02x}{dark:02x}ff" if difference > 0 else f"black on #ff{dark:02x}{light:02x}"


def score_page(scored: ScoredText, title: str) -> str:
    """Return a self-contained HTML page in the style of the report, with both log-probs of a token on hover."""
    tokens = [f'<bdi class="rest">{escape(harmless(scored.first))}</bdi>'] if scored.first else []
    for token, student, teacher in zip(scored.tokens, scored.student, scored.teacher, strict=True):
        difference = teacher - student
        colour = f"rgba(var(--{'more' if difference > 0 else 'less'}),{0.75 * min(abs(difference) / FULL_COLOUR, 1):.2f})"
        details = f"student {student:.3f} teacher {teacher:.3f} difference {difference:+.3f} nats"
        tokens.append(f'<bdi class="tok" title="{details}" style="background-color:{colour}">{escape(harmless(token))}</bdi>')
    legend = "Blue: the teacher finds the token more likely than the student does; orange: less likely. Hover for log-probs in nats."
    name = escape(harmless(title))
    header = f'<header><p class="kicker">opd · score</p><h1><bdi>{name}</bdi></h1></header><p class="about">{legend}</p>'
    return document(title, f'{header}<p class="tokens">{"".join(tokens)}</p>')
