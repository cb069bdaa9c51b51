"""What `opd eval` shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 130  # characters where there is no terminal to fit into


def show(found: Mapping[str, Any], out: Path | None, console: Console | None = None) -> None:
    """A table a task, the differences below it."""
    console = console or Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for role in ("model", "baseline", "teacher"):
        if found[role] is not None:
            console.print(Text(f"{role:<10}{found[role]}"))
    for name, task in found["tasks"].items():
        console.print(table(name, task))
        for line in comparisons(task):
            console.print(Text(line))
    if out is not None:
        console.print(Text(f"written to {out}"))


def table(name: str, task: Mapping[str, Any]) -> Table:
    """The figures, a column a model."""
    models = task["models"]
    how = "greedy" if task["temperature"] == 0 else f"{task['samples']} answers at temperature {task['temperature']:g}"
    title = f"{name}: {task['prompts']} prompts of {task['data']}, {how}"
    drawn = Table(title=title, title_justify="left", show_edge=False)
    drawn.add_column("")
    for model in models:
        drawn.add_column(model, justify="right")
    if task["prompts"]:
        drawn.add_row("reward", *(f"{own['mean']:.1%} [{own['low']:.1%}, {own['high']:.1%}]" for own in models.values()))
        for k in next(iter(models.values())).get("pass", {}):
            drawn.add_row(f"pass@{k}", *(f"{own['pass'][k]:.1%}" if "pass" in own else "–" for own in models.values()))
        drawn.add_row("length, tokens", *(f"{own['length']:.1f}" for own in models.values()))
        drawn.add_row("truncated", *(f"{own['truncated']:.1%}" for own in models.values()))
    if any(own["kl"] is not None for own in models.values()):
        drawn.add_row("KL to teacher, nats/token", *("–" if own["kl"] is None else f"{own['kl']:.4f}" for own in models.values()))
    return drawn


def comparisons(task: Mapping[str, Any]) -> list[str]:
    lines = [
        f"against the {other}: {value['mean']:+.1%} [{value['low']:+.1%}, {value['high']:+.1%}]"
        for other, value in task.get("against", {}).items()
    ]
    if task.get("gap_closed") is not None and task["gap_closed"] < 0:
        lines.append("further from the teacher than the baseline is")
    elif task.get("gap_closed") is not None:
        bounds = task["gap_closed_interval"]
        interval = "" if bounds is None else f" [{bounds[0]:.1%}, {bounds[1]:.1%}]"
        lines.append(f"{task['gap_closed']:.1%}{interval} of the gap to the teacher closed")
    return lines
