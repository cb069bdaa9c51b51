"""What there is: `opd ls`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd import errors
from opd.cli import arguments, catalogue

GROUPS = {"models": ("model", "teacher"), "data": ("data",), "experiments": ("experiment",)}
RUNS = "runs"
KINDS = (*GROUPS, RUNS)
EXAMPLES = "opd ls\nopd ls runs --json\nopd ls runs sweeps/lr"
COLUMNS = ("path", "status", "steps", "reward before", "after", "gap closed", "KL after")


def main(argv: Sequence[str]) -> int:
    """List what is asked for; returns the exit code."""
    return arguments.launch(parser(), show, argv)


def parser() -> arguments.Parser:
    own = arguments.parser("ls", "List shipped models, data and experiments, and the runs of a folder with their status.", EXAMPLES)
    own.add_argument("what", nargs="*", help=f"{', '.join(KINDS)}, or folders with runs; all of it without")
    own.add_argument("--json", action="store_true", help="JSON instead of tables")
    return own


def show(parsed: argparse.Namespace) -> int:
    kinds = [word for word in parsed.what if word in KINDS]
    paths = [Path(word) for word in parsed.what if word not in KINDS]
    if paths and RUNS not in kinds:
        kinds.append(RUNS)
    listed: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds or KINDS:
        if kind == RUNS:
            listed[kind] = [catalogue.describe(run) for run in catalogue.runs_in(paths)]
        else:
            listed[kind] = [choice.to_dict() for group in GROUPS[kind] for choice in catalogue.choices(group)]
    if parsed.json:
        print(json.dumps(listed, indent=2, ensure_ascii=False))
    else:
        draw(listed)
    return errors.OK


def draw(listed: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    for kind, rows in listed.items():
        table = Table(title=kind, title_justify="left", show_edge=False)
        columns = COLUMNS if kind == RUNS else ("name", "", "")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            cells = run_cells(row) if kind == RUNS else [f"{row['group']}={row['name']}", row["path"] or "", row["about"]]
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table if rows else Text(f"{kind}: none in {'/ and '.join(catalogue.FOLDERS)}/ here"))


def run_cells(row: dict[str, Any]) -> list[str]:
    steps = f"{row['steps']}/{row['of']}" if row["of"] else str(row["steps"])
    shares = ["–" if row[key] is None else f"{row[key]:.1%}" for key in ("reward_before", "reward_after", "gap_closed")]
    kl = "–" if row["eval_kl_after"] is None else f"{row['eval_kl_after']:.4f}"
    return [row["path"], row["status"], steps, *shares, kl]
