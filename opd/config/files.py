"""Files and folders that options name."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd.config.options import Source, naming_dataset, naming_teacher
from opd.config.schema import Config
from opd.config.section import Section
from opd.config.several import did_you_mean
from opd.errors import ConfigError, DataError

FILES = ("path", "adapter", "train_path", "eval_path")  # options of models and data that name a file or a folder


def local_path(path: str) -> Path:
    """Return the path with the home folder for `~`: no shell replaces it behind `data.path=`."""
    with suppress(RuntimeError):  # `~name` where there is no such user may be a file's name
        return Path(path).expanduser()
    return Path(path)


def absolute_paths(stored: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return a run's stored options with the files that are in the folder it was started in under absolute paths.

    Args:
        stored: The composed options, nested.
        folder: Where the run was started; None for a run that did not store it, whose options stay as they are.
    """
    if folder is None or folder == Path.cwd():
        return dict(stored)
    return {**stored, **{name: _absolute(stored[name], folder) for name in ("model", "teacher", "teachers", "data") if name in stored}}


def _absolute(options: Any, folder: Path, name: str = "") -> Any:
    if isinstance(options, Mapping):
        return {key: _absolute(value, folder, key) for key, value in options.items()}
    if isinstance(options, list):
        return [_absolute(value, folder, name) for value in options]
    if name not in FILES or not isinstance(options, str) or local_path(options).is_absolute() or not (folder / options).exists():
        return options  # such as a hub id
    return os.path.normpath(folder / options)


# Endings of files with rows, before those of compression, and the source that reads them.
ENDINGS = {
    **dict.fromkeys(("json", "jsonl", "ndjson", "csv", "tsv"), Source.jsonl),
    **dict.fromkeys(("parquet", "pq"), Source.parquet),
}


def source_of(path: str) -> Source | None:
    """Return the source that reads a file, files or a folder of files with rows, by the endings; None for others."""
    sources = {ENDINGS[ending] for file in data_files(path) or [Path(path)] if (ending := ending_of(file)) is not None}
    return sources.pop() if len(sources) == 1 else None


def ending_of(file: Path) -> str | None:
    """Return which of `ENDINGS` a file's name has."""
    return next((ending[1:] for ending in map(str.lower, reversed(file.suffixes)) if ending[1:] in ENDINGS), None)


def data_files(path: str) -> list[Path]:
    """Return the files that `data.train_path` or `data.eval_path` names, sorted; none where nothing is there.

    It names one, a folder, of which those with an ending of `ENDINGS` are read, or a pattern such as part-*.jsonl.
    """
    place = local_path(path)
    if place.is_dir():
        return sorted(file for file in place.iterdir() if file.is_file() and ending_of(file) and not file.name.startswith("."))
    if not place.exists() and re.search(r"[*?[]", path):
        root = Path(place.anchor)
        return sorted(file for file in root.glob(str(place.relative_to(root))) if file.is_file())
    return [place] if place.exists() else []


def eval_file(out: Path) -> Path:
    """Return the file with the evaluation rows that belongs to the one with the teacher's completions."""
    return out.with_name(f"{out.stem}-eval{out.suffix}")


def looks_local(path: str) -> bool:
    """Return whether a path can be none of the hub's, which are OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def is_folder_name(path: str) -> bool:
    """Return whether a model's path names a folder, there or not: also runs/nam, where there is a folder runs/."""
    folder = local_path(path)
    return looks_local(path) or (len(folder.parts) > 1 and folder.parent.is_dir())


def missing(path: Path, kind: str) -> str:
    """Return the words for a file or a folder that is not there, with similar names of files next to it."""
    first = next((part for part in reversed(path.parents) if not part.exists()), path)
    others: list[str] = []
    with suppress(OSError):
        others = [entry.name for entry in first.parent.iterdir()]
    hint = did_you_mean(first.name, others).strip()
    return f"there is no such {kind}" + (f" ({hint})" if hint else "")


def check_files(config: Config) -> None:
    """Raise `DataError` or `ConfigError` for the first file or folder that an option names and that is not there."""
    if config.resume not in ("auto", "never") and not local_path(config.resume).exists():
        raise ConfigError(
            f"resume={config.resume}: {missing(local_path(config.resume), 'checkpoint')}; set resume=auto or resume=never, or name one"
        )
    for label, part in config.parts.items():
        data, models = part.data, (part.model, part.teacher_files)
        named: list[tuple[Section, str, str]] = [(model, "path", "folder") for model in models if is_folder_name(model.path)]
        named += [(model, "adapter", "folder") for model in models]
        if data.source in (Source.jsonl, Source.parquet):
            named += [(data, "train_path", "file"), (data, "eval_path", "file")]
        elif data.source is Source.hub and looks_local(str(data.path)):
            named += [(data, "path", "folder")]
        with naming_dataset(label), naming_teacher(config.teacher_of(label)):
            for section, option, kind in named:
                path = getattr(section, option)
                if path is not None and not (data_files(path) if kind == "file" else local_path(path).exists()):
                    error = DataError if section is data else ConfigError
                    raise error(f"{section.PREFIX}{option}={path}: {missing(local_path(path), kind)}")
