"""Files and folders that options name."""

import os
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
        raise ConfigError(f"resume={config.resume}: {missing(local_path(config.resume), 'checkpoint')}")
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
                if path is not None and not local_path(path).exists():
                    error = DataError if section is data else ConfigError
                    raise error(f"{section.PREFIX}{option}={path}: {missing(local_path(path), kind)}")
