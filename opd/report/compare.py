"""Runs side by side: what they were given, what they reached and what it cost, ranked. Reads run folders alone; torch is not needed."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.config.schema import METRICS, Direction
from opd.report.curves import Series, draw
from opd.runs import outcome
from opd.runs.reader import Run, flatten, format_value

RANKS: dict[str, Direction] = {name: better or Direction.maximize for name, better in METRICS.items()} | {"reward_best": Direction.maximize}
INTERVALS = ("reward_before_interval", "reward_after_interval", "reward_teacher_interval", "reward_best_interval")
NO_OPTIONS = ("name", "resume", "resume_force", "sweep.")  # they say nothing about what is learnt
CURVES = {"reward": "reward", "eval_kl": "KL(student‖teacher), nats/token"}
SHOWN = (
    "reward_after",
    "reward_best",
    "eval_kl_before",
    "eval_kl_after",
    "reverse_kl_last",
    "steps",
    "graded_tokens",
    "seconds",
)  # columns of their own
WIDTH = 200  # columns of the table where there is no terminal


@dataclass(frozen=True, slots=True)
class Row:
    """A run among others. rank: from 1; None where the metric was not measured. options: those in which the runs differ, as far as known.

    values: by the names of summary.json, and reward_best; of a run that is not done, so far. None for what was not measured.
    """

    run: Run
    rank: int | None
    options: dict[str, Any]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    metric: str
    direction: Direction
    rows: list[Row]


def compare(runs: Sequence[Run], metric: str | None = None, direction: Direction | None = None) -> Comparison:
    """The runs from best to worst, then those without a value. metric: None for the last reward, or the last KL where nothing is judged."""
    values = [achieved(run) for run in runs]
    if metric is None:
        metric = "reward_after" if any(found["reward_after"] is not None for found in values) else "eval_kl_after"
    direction = direction or RANKS[metric]
    sign = -1.0 if direction is Direction.maximize else 1.0
    keys = [(found[metric] is None, sign * (found[metric] or 0.0), index) for index, found in enumerate(values)]
    options = differing(runs)
    rows = [
        Row(runs[index], None if missing else rank, options[index], values[index])
        for rank, (missing, _, index) in enumerate(sorted(keys), 1)
    ]
    return Comparison(metric, direction, rows)


def achieved(run: Run) -> dict[str, Any]:
    """What a run reached, and what it cost: from its logs, and where there is one from its summary."""
    evaluations, metrics = run.evaluations(), run.metrics()
    judged = [line for line in evaluations if line.get("model") == "student" and line.get("rewards")]
    best = max(judged, key=lambda line: line["rewards"]["mean"], default=None)
    found: dict[str, Any] = dict.fromkeys((*RANKS, *INTERVALS)) | outcome.achieved(metrics, evaluations)
    found |= {"reward_best": outcome.mean(best), "reward_best_interval": outcome.interval(best)}
    found |= {"reward_best_step": None if best is None else best["step"], "seed": run.config.get("seed")}
    return found | {name: value for name, value in (run.summary or {}).items() if name in found and value is not None}


def differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each run the options in which it and others differ. One that was not begun has those that were typed for it."""
    known = [flatten(run.config) for run in runs]
    names = {name for options in known for name in options}
    options = [found or typed(run, names) for run, found in zip(runs, known, strict=True)]
    names |= {name for found in options for name in found}
    values = {name: {json.dumps(found[name], sort_keys=True, default=str) for found in options if name in found} for name in names}
    order = sorted(name for name in names if len(values[name]) > 1 and not name.startswith(NO_OPTIONS))
    return [{name: found[name] for name in order if name in found} for found in options]


def typed(run: Run, known: set[str]) -> dict[str, Any]:
    """The overrides of a run as options: those that others know as such, and all with a dot."""
    words = [word.partition("=") for word in run.overrides]
    return {name.lstrip("+"): value_of(value) for name, _, value in words if name in known or "." in name}


def value_of(text: str) -> Any:
    """What an override's text means; YAML takes 1e-5 for a text, Hydra for a number."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def words(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={format_value(value)}" for name, value in options.items())


def exact(value: Any) -> str:
    """As `shown`, with all digits."""
    return repr(value) if isinstance(value, float) else format_value(value)


def show(comparison: Comparison, console: Console) -> None:
    """The table, and below it where each run is and what ended it."""
    table = Table(title=f"by {comparison.metric}, {comparison.direction.value}d", title_justify="left", show_edge=False)
    more = [comparison.metric] if comparison.metric not in SHOWN else []
    columns = ("", "options that differ", "status", *more, "reward", "best", "KL to teacher", "reverse KL", "steps", "tokens", "time")
    for column in columns:
        text = column in ("options that differ", "status")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    for row in comparison.rows:
        table.add_row(*(Text(cell) for cell in cells(row, more)))
    console.print(table)
    for row in comparison.rows:
        ended = f": {row.run.status}: {row.run.reason}" if row.run.reason else ""
        console.print(Text(f"{rank_of(row):>3}  {row.run.path}{ended}"), soft_wrap=True)


def cells(row: Row, more: Sequence[str]) -> list[str]:
    """A row of the table. more: metrics that it does not have anyway."""
    values = row.values
    first, last = (number(values[f"eval_kl_{when}"], "{:.4f}") for when in ("before", "after"))
    return [
        rank_of(row),
        words(row.options) or "–",
        row.run.status,
        *(number(values[name], "{:.6g}") for name in more),
        reward(values, "after"),
        reward(values, "best"),
        "–" if first == last == "–" else f"{first} → {last}",
        number(values["reverse_kl_last"], "{:.4f}"),
        number(values["steps"], "{:,}"),
        number(values["graded_tokens"], "{:,}"),
        number(values["seconds"], "{:,.0f} s"),
    ]


def rank_of(row: Row) -> str:
    return "–" if row.rank is None else str(row.rank)


def number(value: float | None, template: str) -> str:
    return "–" if value is None else template.format(value)


def reward(values: Mapping[str, Any], when: str) -> str:
    mean, bounds = values[f"reward_{when}"], values[f"reward_{when}_interval"]
    if mean is None:
        return "–"
    return f"{mean:.1%}" + (f" [{100 * bounds[0]:.0f}, {100 * bounds[1]:.0f}]" if bounds else "")


def as_json(comparison: Comparison) -> str:
    """All of it, for programs."""
    runs = [
        {
            "rank": row.rank,
            "run": str(row.run.path),
            "status": row.run.status,
            "reason": row.run.reason,
            "overrides": row.run.overrides,
            "options": row.options,
            **row.values,
        }
        for row in comparison.rows
    ]
    return json.dumps({"metric": comparison.metric, "direction": comparison.direction.value, "runs": runs}, indent=2)


def as_csv(comparison: Comparison) -> str:
    """A line a run; what was not measured is empty, an interval has a column for each end."""
    options = list(dict.fromkeys(name for row in comparison.rows for name in row.options))
    names = [name for name in comparison.rows[0].values if name not in INTERVALS]
    bounds = [f"{name}_{end}" for name in INTERVALS for end in ("low", "high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "run", "status", "reason", *options, *names, *bounds])
    for row in comparison.rows:
        ends = [end for name in INTERVALS for end in row.values[name] or (None, None)]
        given = [exact(row.options[name]) if name in row.options else None for name in options]
        writer.writerow([row.rank, row.run.path, row.run.status, row.run.reason, *given, *(row.values[name] for name in names), *ends])
    return text.getvalue()


def as_svg(comparison: Comparison, curve: str | None = None) -> str:
    """The runs' curves over steps in one picture, best first. curve: of `CURVES`; None for rewards, or the KL where nothing is judged."""
    lines = {row.run.path: [line for line in row.run.evaluations() if line.get("model") == "student"] for row in comparison.rows}
    if curve is None:
        curve = "reward" if any(line.get("rewards") for found in lines.values() for line in found) else "eval_kl"

    def value(line: Mapping[str, Any]) -> float | None:
        return (line.get("rewards") or {}).get("mean") if curve == "reward" else line.get("kl")

    series = [
        Series(words(row.options) or row.run.name, [(line["step"], value(line)) for line in lines[row.run.path]]) for row in comparison.rows
    ]
    return draw(series, f"{curve} over steps", "step", CURVES[curve])
