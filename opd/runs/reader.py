"""Read run folders, at any moment of a run's life, without torch and without changing anything."""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from opd.errors import DataError
from opd.runs.folder import ANSWERS, EVALUATIONS, HYDRA, LOCK, METRICS, ROLLOUTS, RUN, STATUS, SUMMARY, Status, read_json, read_lines

OVERRIDES = f"{HYDRA}/overrides.yaml"
MEMBER = "member.json"
STARTED_IN, CHANGES = "started_in", "changes"  # keys of run.json


@dataclass(frozen=True)
class Run:
    """A run as its folder describes it. Its logs are read once, when they are first asked for.

    Attributes:
        status: one of `folder.Status`; `killed` where the process of a running one is gone, `new` where the run recorded none.
        config: the composed options, nested, as JSON types; empty before the run began.
        overrides: as typed on the command line.
        summary: None unless the run is done.
        content: digests of data and models; empty before the run began.
        started_in: the working folder of its last start, to which relative paths refer; None where the run did not store it.
        changes: options that were changed on the way, with `resume_force`.
        choices: what was decided when the run began, such as `bf16_copy`, whether it samples with a bf16 copy of the weights.
    """

    path: Path
    status: str = "new"
    reason: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    content: dict[str, str] = field(default_factory=dict)
    started_in: Path | None = None
    changes: Sequence[str] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One entry per step."""
        return read_lines(self.path / METRICS)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return read_lines(self.path / EVALUATIONS)

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """What was answered in evaluations; empty for runs of earlier versions."""
        return read_lines(self.path / ANSWERS)

    def rollout_steps(self) -> list[int]:
        """Return the steps whose rollouts are stored, in order."""
        return sorted(int(file.stem.removeprefix("step_")) for file in (self.path / ROLLOUTS).glob("step_*.jsonl"))

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        return read_lines(self.path / ROLLOUTS / f"step_{step:06d}.jsonl")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options under dotted names; an empty mapping is a value."""
    options: dict[str, Any] = {}
    for key, value in config.items():
        options |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return options


def format_value(value: Any) -> str:
    """Return an option's value as it would be typed."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (STATUS, RUN))


def open_run(path: Path) -> Run:
    """Read the run in a folder.

    Raises:
        DataError: the folder is not a run's, or its files are damaged.
    """
    if not is_run(path):
        raise DataError(f"{path}: not a run folder (it has neither {STATUS} nor {RUN}); name one made by `opd train`, such as runs/NAME")
    try:
        status = read_json(path / STATUS) or {}
        if was_killed(path, status):
            status["status"] = "killed"
        if (path / OVERRIDES).is_file():
            overrides = yaml.safe_load((path / OVERRIDES).read_text())
        else:  # a sweep member that failed before its run began
            overrides = (read_json(path / MEMBER) or {}).get("overrides", [])
        begun = read_json(path / RUN) or {}
        return Run(
            path,
            status.get("status", "new"),
            status.get("reason", ""),
            status.get("exit_code"),
            begun.get("config", {}),
            [str(word) for word in overrides],
            read_json(path / SUMMARY) if status.get("status") == "done" else None,
            begun.get("content", {}),
            Path(begun[STARTED_IN]) if STARTED_IN in begun else None,
            begun.get(CHANGES, ()),
            begun.get("choices", {}),
        )
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: its files cannot be read: {' '.join(str(error).split())}") from None


def was_killed(path: Path, status: Mapping[str, Any]) -> bool:
    """Return whether a run has the status `running`, but its process on this machine is gone."""
    file = path / LOCK
    owner = re.match(r"process (\d+) on (.+)", file.read_text() if file.is_file() else "")
    if status.get("status") != Status.running.value or owner is None or owner[2] != socket.gethostname():
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in folders, each of which is a run's or holds runs at any depth (runs/, a sweep), each run once.

    Raises:
        DataError: a folder does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        runs = list(_run_paths(path))
        if not runs:
            raise DataError(f"{path}: " + ("no run in it" if path.is_dir() else "there is no such folder"))
        for run in runs:
            found.setdefault(run.resolve(), run)
    return [open_run(path) for path in found.values()]


def _run_paths(path: Path) -> Iterator[Path]:
    if is_run(path):
        yield path
    elif path.is_dir():
        for inner in sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith(".")):
            yield from _run_paths(inner)
