"""What people type for an option and Hydra would not take, or not as it is meant: a home folder, a path as a name, one option twice."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_origin

import yaml
from omegaconf import DictConfig, OmegaConf

from opd.cli import hydra_errors
from opd.config.compose import conf_dir, options, removed
from opd.errors import ConfigError
from opd.runs.reader import format_value

ROW = re.compile(r"^\| (`[\w.`, ]+`) \| (.*?) \| (.*) \|$", re.M)  # of the tables of conf/README.md: options, default, meaning
HOME = re.compile(r"(?<=[=,\[])~(?=/)")  # no shell replaces it behind `model.path=`, and Hydra's grammar has no `~` in a value
MODELS = ("model", "teacher")
MAX_OTHERS = 2  # values of other choices that help shows: more, such as the paths of models, say nothing about the option


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


def explain(names: Sequence[str], composed: DictConfig | None = None) -> str:
    """Return what the options or groups of options are for, with their defaults.

    Args:
        composed: The config with the choices that are given with the names: its values are then the defaults.

    Raises:
        ConfigError: There is no such option or group.
    """
    table = ROW.findall((conf_dir() / "README.md").read_text(encoding="utf-8"))
    rows = [(option, default, meaning) for named, default, meaning in table for option in re.findall(r"[\w.]+", named)]
    lines = []
    for name in names:
        shipped = hydra_errors.choices().get(name)
        found = [row for row in rows if f"{row[0]}.".startswith(f"{name}.")]
        if not found and name.startswith("hydra."):
            found = [(name, "", meaning) for _, _, meaning in rows if name in meaning][:1]
        if not found and name.startswith("hydra."):
            raise ConfigError(f"{name}: is Hydra's and not explained here; opd train --cfg hydra prints its options")
        if not found and shipped is None:
            raise ConfigError(hydra_errors.unknown_option(name))
        width = max((len(option) for option, _, _ in found), default=0)
        lines += [f"{option:<{width}}  {plain(meaning)}{describe_default(option, default, composed)}" for option, default, meaning in found]
        if shipped is not None:
            lines.append(f"{name}={'|'.join(shipped)}")
    return "\n".join(lines)


def plain(markdown: str) -> str:
    """Return a cell of a table without its marks: of a link its words."""
    return re.sub(r"\[([^][]*)\]\([^()]*\)", r"\1", markdown).replace("`", "")


def describe_default(option: str, documented: str, composed: DictConfig | None) -> str:
    """Return an option's default in brackets: that of the given choices, else the usual one and what other choices set."""
    if not documented:
        return ""
    if composed is not None and option != "name":
        value = OmegaConf.to_container(composed)
        for part in option.split("."):
            value = value[part]  # type: ignore[index, call-overload]
        return f" (default: {format_value(getattr(value, 'name', value))})"
    group, _, name = option.partition(".")
    others: dict[str, list[str]] = {}
    for choice in hydra_errors.choices().get(group, []) if name else ():
        content = yaml.safe_load((conf_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8"))
        if name in content and content[name] != yaml.safe_load(documented.replace("`", "")):
            others.setdefault(format_value(content[name]), []).append(choice)
    several = "; ".join(f"{value} with {group}={'|'.join(named)}" for value, named in others.items() if len(others) <= MAX_OTHERS)
    return f" (default: {plain(documented)}{'; ' if several else ''}{several})"


def refuse_unknown(words: Sequence[str], folders: Sequence[Path]) -> None:
    """Raise `ConfigError` with all unknown options, of which Hydra would name the first, or for an option that is taken out."""
    known, groups = options(), set(hydra_errors.choices())
    groups |= {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()}
    unknown = []
    for word in words:
        key, equals, _ = word.partition("=")
        if word.startswith("~") and key[1:] in known and key[1:] not in groups:
            raise ConfigError(f"{word}: an option cannot be taken out: leave the word out for the default, or set {key[1:]}=VALUE")
        parents = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
        is_known = key in known or key in groups or any(get_origin(known.get(parent)) is dict for parent in parents)
        if equals and re.fullmatch(r"[\w.]+", key) and not is_known and not key.startswith("hydra."):
            gone = next((message for parent in parents if (message := removed(parent))), None)
            unknown.append(gone or hydra_errors.unknown_option(key))
    if unknown:
        raise ConfigError("; ".join(unknown))


def last_of_each(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without those that a later one of the same option or group replaces, and what to say of each that is replaced."""
    kept: dict[str, str] = {}
    replaced = []
    for word in words:
        key = word.partition("=")[0]
        earlier = kept.pop(key, word)
        if earlier != word:
            replaced.append(f"{word} counts, not {earlier}, which was given too")
        kept[key] = word
    return list(kept.values()), replaced
