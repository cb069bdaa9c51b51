"""What there is to choose from: the shipped YAML files, and the runs of a folder. Torch is not needed to ask."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from opd.config.compose import conf_dir
from opd.errors import ConfigError, OutputError
from opd.runs.reader import Run, find_runs

NOT_FOR_USERS = ("hydra",)
FOLDERS = ("runs", "sweeps")  # where `opd train` puts runs


@dataclass(frozen=True, slots=True)
class Choice:
    """A shipped file. path: of the model or the data, where it names one. about: the first sentence of its comment."""

    group: str
    name: str
    path: str | None
    about: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choices(group: str) -> list[Choice]:
    return [choice(file) for file in sorted((conf_dir() / group).glob("*.yaml"))]


def choice(file: Path) -> Choice:
    text = file.read_text(encoding="utf-8")
    comments = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.removeprefix("#").strip())
    content = yaml.safe_load(text) or {}
    path = content.get("path") or content.get("source")
    about = re.split(r"(?<=\.) ", " ".join(comments))[0]
    return Choice(file.parent.name, file.stem, path if isinstance(path, str) else None, about)


def runs_in(paths: list[Path]) -> list[Run]:
    """The runs in the folders, or in runs/ and sweeps/ here, of which none need be there."""
    return find_runs(paths) if paths else [run for folder in FOLDERS if any(Path(folder).glob("*/")) for run in found(Path(folder))]


def found(folder: Path) -> list[Run]:
    from opd.errors import DataError

    try:
        return find_runs([folder])
    except DataError:
        return []


def describe(run: Run) -> dict[str, Any]:
    """A run as `opd ls` shows it."""
    summary = run.summary or {}
    metrics = run.metrics
    return {
        "path": str(run.path),
        "status": run.status,
        "reason": run.reason,
        "steps": int(metrics[-1]["step"]) if metrics else 0,
        "of": run.config.get("train", {}).get("max_steps"),
        "reward_before": summary.get("reward_before"),
        "reward_after": summary.get("reward_after"),
        "gap_closed": summary.get("gap_closed"),
        "eval_kl_after": summary.get("eval_kl_after"),
    }


def find_file(name: str) -> Path:
    """The shipped file that `group/name`, or a name that one group alone has, stands for. Raises `ConfigError`."""
    root = conf_dir().resolve()
    files = [file for file in sorted(root.rglob("*.yaml")) if file.relative_to(root).parts[0] not in NOT_FOR_USERS]
    wanted = name.removesuffix(".yaml")
    known = {str(file.relative_to(root).with_suffix("")): file for file in files}
    if wanted in known:
        return known[wanted]
    same = [key for key in known if key.rpartition("/")[2] == wanted]
    if len(same) == 1:
        return known[same[0]]
    if same:
        raise ConfigError(f"{name}: there are {', '.join(same)}; say which")
    group = wanted.partition("/")[0]
    near = [key for key in known if key.startswith(f"{group}/")]
    raise ConfigError(f"{name}: no such shipped file; " + (f"there are {', '.join(near)}" if near else "opd ls lists them"))


def copy(name: str, to: Path, called: str | None) -> tuple[str, Path]:
    """Copy a shipped file to a folder for `--config-dir`; returns its group ("" for the head) and where the copy is.

    Under a name of its own: a shipped file wins over one of the same name. Raises `ConfigError`, and `OutputError` where there is a file.
    """
    file = find_file(name)
    group = "" if file.parent == conf_dir().resolve() else file.parent.name
    if not group:
        raise ConfigError(f"{name}: the head of the config is not to be replaced; copy an experiment, which may change anything in it")
    own = called or f"my_{file.stem}"
    if not re.fullmatch(r"\w[\w.-]*", own):
        raise ConfigError(f"--name {own}: letters, digits and . _ - only")
    if to.resolve() != conf_dir().resolve() and (conf_dir() / group / f"{own}.yaml").exists():
        raise ConfigError(f"--name {own}: a shipped {group} has this name and would win over yours; take another")
    target = to / group / f"{own}.yaml"
    if not target.parent.resolve().is_relative_to(to.resolve()):
        raise OutputError(f"{target.parent}: a link that leads out of {to}; remove it or take another --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(file.read_text(encoding="utf-8"))
    except FileExistsError:
        raise OutputError(f"{target}: there is such a file; nothing was overwritten. Take another --name or --to") from None
    return group, target
