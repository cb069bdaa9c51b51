"""Run folders as they are read: by `opd ls`, `compare`, `report` and `eval`. Nothing is written, and torch is not needed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opd.errors import DataError
from opd.runs.files import read_lines
from opd.runs.folder import COMPOSED, EVALUATIONS, METRICS, ROLLOUTS, RUN, STATUS, SUMMARY

OVERRIDES = f"{COMPOSED}/overrides.yaml"
MEMBER = "member.json"


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its folder tells it, at whatever moment.

    status: one of `run_folder.Status`, or `new` where it did not come to say so. config: the composed options, nested, as JSON types;
    empty before the run began. overrides: as they were typed. summary: None unless the run is done.
    """

    path: Path
    status: str = "new"
    reason: str = ""
    exit_code: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    summary: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def metrics(self) -> list[dict[str, Any]]:
        """A line a step, see the README's table."""
        return read_lines(self.path / METRICS)

    def evaluations(self) -> list[dict[str, Any]]:
        return read_lines(self.path / EVALUATIONS)

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts are kept, in order."""
        return sorted(int(file.stem.removeprefix("step_")) for file in (self.path / ROLLOUTS).glob("step_*.jsonl"))

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        return read_lines(self.path / ROLLOUTS / f"step_{step:06d}.jsonl")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def format_value(value: Any) -> str:
    """An option's value as it would be typed."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (STATUS, RUN))


def open_run(path: Path) -> Run:
    """The run in a folder. Raises `DataError` where there is none, or its files cannot be read."""
    if not is_run(path):
        raise DataError(f"{path}: not a run folder (it has neither {STATUS} nor {RUN}); give one that `opd train` made, such as runs/NAME")
    try:
        said = read_json(path / STATUS) or {}
        typed = path / OVERRIDES
        # A member of a sweep that failed before it was a run left them elsewhere.
        overrides = yaml.safe_load(typed.read_text()) if typed.is_file() else (read_json(path / MEMBER) or {}).get("overrides", [])
        return Run(
            path,
            said.get("status", "new"),
            said.get("reason", ""),
            said.get("exit_code"),
            (read_json(path / RUN) or {}).get("config", {}),
            [str(word) for word in overrides],
            read_json(path / SUMMARY) if said.get("status") == "done" else None,
        )
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: its files cannot be read: {' '.join(str(error).split())}") from None


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file. Raises `ValueError` for anything else."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(found, dict | None):
        raise ValueError(f"{file.name} holds no object")
    return found


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the given folders, each a run folder or a folder of them (runs/, a sweep), in order of their paths, each once.

    Raises `DataError` for a folder that is not there or holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        inside = list(run_paths(path))
        if not inside:
            raise DataError(f"{path}: " + ("no run in it" if path.is_dir() else "there is no such folder"))
        found |= {run.resolve(): run for run in inside if run.resolve() not in found}
    return [open_run(path) for path in found.values()]


def run_paths(path: Path) -> Iterator[Path]:
    """`path` itself if it is a run's folder, else those of runs below it, as deep as folders go without being one."""
    if is_run(path):
        yield path
    elif path.is_dir():
        for inner in sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith(".")):
            yield from run_paths(inner)
