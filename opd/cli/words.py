"""What people type for an option and Hydra would not take: a home folder, the path of a model as its name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_origin

from opd.cli import hydra_errors
from opd.config.compose import conf_dir, options, removed
from opd.errors import ConfigError

ROW = re.compile(r"^\| (`[\w.`, ]+`) \| (.*?) \| (.*) \|$", re.M)  # of the tables of conf/README.md: options, default, meaning
HOME = re.compile(r"(?<=[=,\[])~(?=/)")  # no shell replaces it behind `model.path=`, and Hydra's grammar has no `~` in a value
MODELS = ("model", "teacher")


def readable(word: str, folders: Sequence[Path]) -> str:
    """Return an override with the home folder for `~/`, and with `model=OWNER/NAME` as `model.path=OWNER/NAME`.

    Args:
        folders: Those that may have choices, besides the shipped ones.
    """
    if "'" not in word and '"' not in word:
        word = HOME.sub(str(Path.home()), word)
    group, _, value = word.partition("=")
    names = value.split(",")
    if group not in MODELS or not all("/" in name for name in names):
        return word
    is_choice = any((folder / group / f"{name}.yaml").is_file() for folder in (conf_dir(), *folders) for name in names)
    return word if is_choice else f"{group}.path={value}"


def explain(names: Sequence[str]) -> str:
    """Return what the options or groups of options are for, with their defaults. Raises `ConfigError` for an unknown one."""
    table = ROW.findall((conf_dir() / "README.md").read_text(encoding="utf-8"))
    rows = [(option, default, meaning) for named, default, meaning in table for option in re.findall(r"[\w.]+", named)]
    lines = []
    for name in names:
        found = [row for row in rows if f"{row[0]}.".startswith(f"{name}.")]
        if not found:
            raise ConfigError(hydra_errors.unknown_option(name))
        width = max(len(option) for option, _, _ in found)
        lines += [
            f"{option:<{width}}  {meaning.replace('`', '')} (default: {default.replace('`', '')})" for option, default, meaning in found
        ]
        if choices := hydra_errors.choices().get(name):
            lines.append(f"{name}={'|'.join(choices)}")
    return "\n".join(lines)


def refuse_unknown(words: Sequence[str], folders: Sequence[Path]) -> None:
    """Raise `ConfigError` with all unknown options, of which Hydra would name the first."""
    known, groups = options(), set(hydra_errors.choices())
    groups |= {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()}
    unknown = []
    for word in words:
        key, equals, _ = word.partition("=")
        parents = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        is_known = key in known or key in groups or any(get_origin(known.get(parent)) is dict for parent in parents)
        if equals and re.fullmatch(r"[\w.]+", key) and not is_known and not key.startswith("hydra."):
            gone = next((message for parent in parents if (message := removed(parent))), None)
            unknown.append(gone or hydra_errors.unknown_option(key))
    if unknown:
        raise ConfigError("; ".join(unknown))
