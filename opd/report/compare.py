"""Rank runs by what they achieved, with the options in which they differ. Reads run folders only; needs no torch."""

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

from opd.report.controls import Effect, effects
from opd.runs.folder import read_json
from opd.runs.outcome import MAXIMIZE, RANKS, run_outcome
from opd.runs.reader import MEMBER, Run, flatten, format_value
from opd.runs.text import MISSING, format_duration, format_number, format_reward

UNTRAINED_OPTIONS = ("name", "resume", "resume_force", "sweep.")  # they do not affect training
SHOWN = ("reward_after", "reward_best", "eval_kl_before", "eval_kl_after", "reverse_kl_last", "steps", "graded_tokens", "seconds")
MAX_IN_TABLE = 4  # options that differ, as a column; more are in lines below the table
MAX_OPTIONS = 12  # in such a line
# What tells runs apart best, after what was typed.
TELLING = ("model.path", "teacher.path", "data.path", "data.train_path", "ppo.estimator", "optim.lr", "lora.rank", "train.max_steps")
MAX_NAME = 30  # characters of a run's name in the table; the paths are below it
WIDTH = 200  # columns of the table where there is no terminal


@dataclass(frozen=True, slots=True)
class Row:
    """A run among others.

    Attributes:
        rank: from 1; None where the metric was not measured.
        options: those in which the runs differ, as far as known.
        values: as returned by `run_outcome`.
    """

    run: Run
    rank: int | None
    options: dict[str, Any]
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    metric: str
    direction: str
    rows: list[Row]
    effects: list[Effect]


def compare(runs: Sequence[Run], metric: str | None = None, direction: str | None = None) -> Comparison:
    """Rank runs, best first, those without a value last.

    Args:
        runs: at least one.
        metric: one of `RANKS`; None for the last reward, or the last KL where there are no rewards.
        direction: `maximize` or `minimize`; None for the metric's better one.
    """
    values = [run_outcome(run) for run in runs]
    if metric is None:
        metric = "reward_after" if any(each["reward_after"] is not None for each in values) else "eval_kl_after"
    direction = direction or RANKS[metric]
    sign = -1.0 if direction == MAXIMIZE else 1.0
    # Of equal members of a sweep the one that was proposed first is first, as in the sweep's own table.
    numbers = [(read_json(run.path / MEMBER) or {}).get("number", 0) for run in runs]
    order = sorted((each[metric] is None, sign * (each[metric] or 0.0), numbers[index], index) for index, each in enumerate(values))
    options = differing_options(runs)
    are_ranked = not incomparable(runs)
    ranks = [(rank if are_ranked and not missing else None, index) for rank, (missing, *_, index) in enumerate(order, 1)]
    rows = [Row(runs[index], rank, options[index], values[index]) for rank, index in ranks]
    return Comparison(metric, direction, rows, effects(runs))


def differing_options(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run the options in which the runs differ; for a run that never began, those among its overrides."""
    composed = [flatten(run.config) | chosen(run) for run in runs]
    names = {name for options in composed for name in options}
    known = [options or _overrides(run, names) for run, options in zip(runs, composed, strict=True)]
    values: dict[str, set[str]] = {}
    for options in known:
        for name, value in options.items():
            values.setdefault(name, set()).add(json.dumps(value, sort_keys=True, default=str))
    differing = sorted(name for name, seen in values.items() if len(seen) > 1 and not name.startswith(UNTRAINED_OPTIONS))
    return [{name: options[name] for name in differing if name in options} for options in known]


def chosen(run: Run) -> dict[str, Any]:
    """Return what was chosen for a run: the precision that it samples in, by the machine, and the learning rate, by the model."""
    sampled = {"sampling.dtype, chosen": "bf16 copy" if run.choices["bf16_copy"] else "trainer"} if "bf16_copy" in run.choices else {}
    return sampled | ({"optim.lr, chosen": run.choices["lr"]} if "lr" in run.choices else {})


def incomparable(runs: Sequence[Run]) -> str:
    """Return why the numbers of these runs cannot be ranked together; empty where they can."""
    begun = [run for run in runs if run.config]
    other = {
        "evaluation data": {run.content.get("evaluation data") for run in begun},
        "rewards (eval.reward)": {run.config.get("eval", {}).get("reward") for run in begun},
    }
    differing = [name for name, values in other.items() if len(values) > 1]
    return f"these runs have different {' and '.join(differing)}: their numbers cannot be ranked together" if differing else ""


def _overrides(run: Run, names: set[str]) -> dict[str, Any]:
    """Return the overrides that set single options: those with a dot, and those that other runs know as options."""
    options = {}
    for override in run.overrides:
        name, _, text = override.partition("=")
        if name in names or "." in name:
            try:
                options[name.lstrip("+")] = float(text) if "e" in text.lower() else yaml.safe_load(text)  # 1e-5 is text in YAML
            except (ValueError, yaml.YAMLError):
                options[name.lstrip("+")] = text
    return options


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, each run's folder and how it ended, and what the teacher accounts for where there are control arms.

    Of many options that differ, the most telling are below each run's folder.
    """
    names = most_telling(comparison.rows)
    in_table = len(names) <= MAX_IN_TABLE
    rows = [_cells(row, comparison.metric, in_table) for row in comparison.rows]
    table = Table(title=f"by {comparison.metric}, {comparison.direction}d", title_justify="left", show_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("run", "options that differ", "status") else "right", overflow="fold")
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells.values()))
    if note := incomparable([row.run for row in comparison.rows]):
        console.print(Text(f"warning: {note}"), soft_wrap=True)
    console.print(table)
    for row, cells in zip(comparison.rows, rows, strict=True):
        ending = f": {row.run.status}: {row.run.reason}" if row.run.reason else ""
        console.print(Text(f"{cells['']:>3}  {row.run.path}{ending}"), soft_wrap=True)
        if not in_table:
            shown = {name: row.options[name] for name in names[:MAX_OPTIONS] if name in row.options}
            console.print(Text(f"     {_words(shown)}"), soft_wrap=True)
    if len(names) > MAX_OPTIONS:
        console.print(f"and {len(names) - MAX_OPTIONS} more options differ: --csv and --json have all")
    for effect in comparison.effects:
        console.print(Text(effect.sentence()), soft_wrap=True)


def most_telling(rows: Sequence[Row]) -> list[str]:
    """Return the options that differ: first those that were typed for one of the runs, last those that only follow from a choice."""
    typed = {word.lstrip("+").partition("=")[0] for row in rows for word in row.run.overrides}
    order = {name: place for place, name in enumerate(TELLING)}
    differing = {name for row in rows for name in row.options}
    return sorted(differing, key=lambda name: (name not in typed, order.get(name, len(order)), name))


def _words(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={format_value(value)}" for name, value in options.items())


def _cells(row: Row, metric: str, with_options: bool) -> dict[str, str]:
    values, shares = row.values, row.values["reward_is_share"]
    ranked_by = {} if metric in SHOWN else {metric: format_number(values[metric], ".6g")}
    first, last = (format_number(values[f"eval_kl_{when}"]) for when in ("before", "after"))
    return {
        "": MISSING if row.rank is None else str(row.rank),
        "run": row.run.name if len(row.run.name) <= MAX_NAME else f"{row.run.name[: MAX_NAME - 1]}…",
        **({"options that differ": _words(row.options) or MISSING} if with_options else {}),
        "status": row.run.status,
        **ranked_by,
        "reward": format_reward(values["reward_after"], values["reward_after_interval"], digits=0, shares=shares),
        "best": format_reward(values["reward_best"], values["reward_best_interval"], digits=0, shares=shares),
        "KL to teacher": MISSING if first == last == MISSING else f"{first} → {last}",
        "reverse KL": format_number(values["reverse_kl_last"]),
        "steps": format_number(values["steps"], ","),
        "tokens": format_number(values["graded_tokens"], ","),
        "time": format_duration(values["seconds"]),
    }


def as_json(comparison: Comparison) -> str:
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
    effects = [effect.to_dict() for effect in comparison.effects]
    return json.dumps({"metric": comparison.metric, "direction": comparison.direction, "runs": runs, "controls": effects}, indent=2)


def as_csv(comparison: Comparison) -> str:
    """Return a line per run; what was not measured is empty, an interval has a column for each end."""
    options = dict.fromkeys(name for row in comparison.rows for name in row.options)
    intervals = [name for name in comparison.rows[0].values if name.endswith("_interval")]
    names = [name for name in comparison.rows[0].values if name not in intervals]
    bounds = [f"{name}_{end}" for name in intervals for end in ("low", "high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "run", "status", "reason", *options, *names, *bounds])
    for row in comparison.rows:
        shown = {name: repr(value) if isinstance(value, float) else format_value(value) for name, value in row.options.items()}
        given = [shown.get(name) for name in options]
        ends = [end for name in intervals for end in row.values[name] or (None, None)]
        writer.writerow([row.rank, row.run.path, row.run.status, row.run.reason, *given, *(row.values[name] for name in names), *ends])
    return text.getvalue()
