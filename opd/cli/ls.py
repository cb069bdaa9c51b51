"""`opd ls` and `opd cp`: list the shipped YAML files and the runs of a folder; copy a shipped file."""

import argparse
import json
import re
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from opd.cli.arguments import Parser
from opd.cli.hydra_errors import choices
from opd.config.compose import conf_dir
from opd.config.files import local_path
from opd.errors import ConfigError, DataError, OutputError
from opd.runs.folder import METRICS, RUN, STATUS
from opd.runs.outcome import run_outcome
from opd.runs.reader import Run, find_runs
from opd.runs.text import format_amount, format_number, format_percent, make_console

GROUPS = {"models": ("model", "teacher"), "data": ("data",), "experiments": ("experiment",)}
RUNS = "runs"
KINDS = (*GROUPS, RUNS)
RUN_FOLDERS = ("runs", "sweeps")  # where `opd train` puts runs
RUN_COLUMNS = ("path", "date", "status", "steps", "reward before", "after", "gap closed", "KL after")


def make_ls_parser() -> Parser:
    description = "List shipped models, data sets and experiments, and the runs of a folder with their status."
    parser = Parser("ls", print_list, description, "opd ls\nopd ls runs --json\nopd ls runs sweeps/lr")
    parser.add_argument("what", nargs="*", help=f"{', '.join(KINDS)}, or folders with runs; default: everything")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    return parser


def print_list(parsed: argparse.Namespace) -> None:
    kinds = [word for word in parsed.what if word in KINDS]
    folders = [local_path(word) for word in parsed.what if word not in KINDS]
    if folders and RUNS not in kinds:
        kinds.append(RUNS)
    listed: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds or KINDS:
        if kind == RUNS:
            listed[kind] = [describe_run(run) for run in sorted(list_runs(folders), key=changed_at, reverse=True)]
        else:
            listed[kind] = [describe_file(file) for group in GROUPS[kind] for file in sorted((conf_dir() / group).glob("*.yaml"))]
    if parsed.json:
        print(json.dumps(listed, indent=2, ensure_ascii=False))
    else:
        print_tables(listed)


def describe_file(file: Path) -> dict[str, Any]:
    """Return a shipped file's name, the model or data it names, and the first sentence of its comment."""
    text = file.read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)*", text)
    comments = [line.removeprefix("#").strip() for line in (head[0] if head else "").splitlines() if not line.startswith("# @package")]
    content = yaml.safe_load(text) or {}
    path = content.get("path") or content.get("source")
    about = re.split(r"(?<=\.) ", " ".join(comments))[0]
    return {"group": file.parent.name, "name": file.stem, "path": path if isinstance(path, str) else None, "about": about}


def list_runs(folders: list[Path]) -> list[Run]:
    """Return the runs in `folders`; by default those in runs/ and sweeps/, if there are any."""
    if folders:
        return find_runs(folders)
    runs = []
    for folder in RUN_FOLDERS:
        try:
            runs += find_runs([Path(folder)])
        except DataError:  # no such folder, or no run in it
            continue
    return runs


def changed_at(run: Run) -> datetime:
    """Return the local time at which a run last wrote a line or its status."""
    times = [(run.path / name).stat().st_mtime for name in (RUN, STATUS, METRICS) if (run.path / name).is_file()]
    return datetime.fromtimestamp(max(times)).astimezone()


def describe_run(run: Run) -> dict[str, Any]:
    outcome, metrics = run_outcome(run), run.metrics
    return {
        "path": str(run.path),
        "date": f"{changed_at(run):%Y-%m-%d %H:%M}",
        "status": run.status,
        "reason": run.reason,
        "steps": int(metrics[-1]["step"]) if metrics else 0,
        "of": run.config.get("train", {}).get("max_steps"),
        **{key: outcome[key] for key in ("reward_before", "reward_after", "reward_is_share", "gap_closed", "eval_kl_after")},
    }


def print_tables(listed: dict[str, list[dict[str, Any]]]) -> None:
    console = make_console()
    for kind, rows in listed.items():
        table = Table(title=kind, title_justify="left", show_edge=False)
        for column in RUN_COLUMNS if kind == RUNS else ("name", "path or source", "what it is"):
            table.add_column(column, overflow="fold")
        for row in rows:
            if kind == RUNS:
                steps = f"{row['steps']}/{row['of']}" if row["of"] else str(row["steps"])
                rewards = [format_amount(row[f"reward_{when}"], row["reward_is_share"]) for when in ("before", "after")]
                gap, kl = format_percent(row["gap_closed"]), format_number(row["eval_kl_after"])
                cells = [row["path"], row["date"], row["status"], steps, *rewards, gap, kl]
            else:
                cells = [f"{row['group']}={row['name']}", row["path"] or "", row["about"]]
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table if rows else Text(f"{kind}: none in {'/ and '.join(RUN_FOLDERS)}/ here"))


def make_cp_parser() -> Parser:
    description = "Copy a shipped YAML file into a folder of yours, to change it and use it with --config-dir."
    parser = Parser("cp", copy_file, description, "opd cp experiment/tiny\nopd cp optim/adamw --name slow --to ./conf")
    parser.add_argument("file", help="group/name, or a name that only one group has (opd ls)")
    parser.add_argument("--to", type=local_path, default=Path("conf"), help="the folder (./conf)")
    parser.add_argument("--name", help="name of the copy (my_NAME); a shipped file takes precedence over one of the same name")
    return parser


def copy_file(parsed: argparse.Namespace) -> None:
    """Copy the file, never over another one, and print how to use it."""
    group, _, stem = find_file(parsed.file).partition("/")
    name, to = parsed.name or f"my_{stem}", parsed.to
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"--name {name}: letters, digits and . _ - only")
    if to.resolve() != conf_dir().resolve() and (conf_dir() / group / f"{name}.yaml").exists():
        raise ConfigError(f"--name {name}: a shipped {group} has this name and takes precedence; use another name")
    target = to / group / f"{name}.yaml"
    if not target.parent.resolve().is_relative_to(to.resolve()):
        raise OutputError(f"{target.parent}: a link to outside of {to}; remove it or use another --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write((conf_dir() / group / f"{stem}.yaml").read_text(encoding="utf-8"))
    except FileExistsError:
        raise OutputError(f"{target}: this file exists; nothing was overwritten. Use another --name or --to") from None
    print(f"{target}: change it, then: opd train --config-dir {shlex.quote(str(to))} {group}={name} name={name}")


def shipped_files() -> list[str]:
    """Return all choices as `group/name`."""
    return [f"{group}/{name}" for group, names in choices().items() for name in names]


def find_file(word: str) -> str:
    """Return the `group/name` of a shipped file: `word` itself, or the only one with this name. Raises `ConfigError`."""
    wanted = word.removesuffix(".yaml")
    matches = [key for key in shipped_files() if wanted in (key, key.rpartition("/")[2])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"{word}: ambiguous; choose from {', '.join(matches)}")
    in_group = [key for key in shipped_files() if key.partition("/")[0] == wanted.partition("/")[0]]
    raise ConfigError(f"{word}: no such shipped file; " + (f"choose from {', '.join(in_group)}" if in_group else "opd ls lists them"))
