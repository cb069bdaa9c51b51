"""Mistakes that Hydra and OmegaConf find, told as `opd` tells its own: what is wrong, where, and the remedy, in one line."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from opd.config.compose import conf_dir
from opd.config.schema import Config, removed
from opd.errors import ConfigError, OpdError, OutputError
from opd.runs.text import one_line

Result = TypeVar("Result")

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
YOUR_OWN = {
    "model": "a hub id or a folder goes in model.path=…",
    "teacher": "a hub id or a folder goes in teacher.path=…",
    "data": "a file of your own goes in data=jsonl data.train_path=…",
}


def options(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every option of the schema by its dotted name, with its type; sections are in it too, before what they hold."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(schema):
        found[prefix + item.name] = item.type
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            found |= options(item.type, f"{prefix}{item.name}.")
    return found


def choices() -> dict[str, list[str]]:
    """The shipped groups and the names of their files."""
    groups: dict[str, list[str]] = {}
    for file in sorted(conf_dir().glob("*/*.yaml")):
        groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def expected(kind: Any) -> str:
    """A type in words."""
    if isinstance(kind, UnionType):
        return " or ".join(expected(part) for part in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(member.name for member in kind)}"
    if get_origin(kind) is list:
        return "a list, for example [0.9,0.95]"
    if get_origin(kind) is dict:
        return "a mapping, for example '{a: 1}'"
    return PLAIN.get(kind, "a section; give the options in it one by one")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=2)
    return f"did you mean {' or '.join(close)}? " if close else ""


def unknown_option(key: str) -> str:
    """What to say to a key that is neither a group nor an option."""
    if (message := removed(key)) is not None:
        return message
    known = options()
    section, _, last = key.rpartition(".")
    namesakes = [name for name in known if name.rpartition(".")[2] == last]
    if namesakes:
        return f"{key}: no such option; did you mean {' or '.join(namesakes)}?"
    if key.startswith("hydra."):
        return f"{key}: Hydra has no such option; opd train --cfg hydra prints those it has"
    if section not in known:
        top = sorted({*choices(), *(name for name in known if "." not in name)})
        return f"{key}: no such group or option; {did_you_mean(key, {*known, *top} if section else top)}there are {', '.join(top)}"
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    return f"{key}: no such option; {did_you_mean(last, siblings)}{section} has {', '.join(siblings)}"


def wrong_value(error: ValidationError, override: str | None) -> str:
    key = re.sub(r"\[.*", "", error.full_key or "")
    given = override if override is not None else f"{key}={error.value}"
    option, _, value = given.lstrip("+").partition("=")
    if (message := removed(option, value)) is not None:
        return message
    known = options()
    if key in known:
        return f"{given}: must be {expected(known[key])}"
    return f"{given}: {first_line(error)}"


def missing_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").partition("/")
    if error.options is None:
        if "primary config" in str(error):
            return f"--config-name {group}: there is no such file; a recipe is chosen with experiment=NAME"
        return first_line(error)
    known = [option for option in error.options if option != "schema"]
    own = f"; {YOUR_OWN[group]}" if group in YOUR_OWN else ""
    return f"{group}={name}: no such choice; {did_you_mean(name, known)}there are {', '.join(known)}{own}"


def unreadable(error: OverrideParseException) -> str:
    word = error.override
    for group, names in choices().items():
        if word in names:
            return f"{word}: an argument is option=value; did you mean {group}={word}?"
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word}: an argument is option=value, for example {word}=VALUE"
    return f"{word}: cannot be read; put a value with special characters in two pairs of quotes: '{key}=\"{value}\"'"


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(":") if text else type(error).__name__


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__  # also a suppressed one: OmegaConf suppresses all


def explain(error: Exception) -> OpdError | None:
    """The mistake behind what was raised while a config was composed or its folder made; None for what is no user's mistake."""
    links = list(chain(error))
    messages = [str(link) for link in links]
    override = next((match[1] for match in (re.match(r"Error merging override (.+)", text) for text in messages) if match), None)
    file = next((match[1] for match in (re.match(r"In '([^']+)'", text) for text in messages) if match), None)
    where = f" (in {file}.yaml)" if file not in (None, "config") and override is None else ""
    for link in reversed(links):
        match link:
            case OpdError():
                return link
            case OverrideParseException():
                return ConfigError(unreadable(link))
            case MissingConfigException():
                return ConfigError(missing_choice(link) + where)
            case OSError(filename=str()):
                return OutputError(f"cannot make {link.filename}: {link.strerror}; choose another folder with hydra.run.dir=FOLDER")
            case OmegaConfBaseException(full_key=None | ""):
                pass  # not yet dressed with the place; the link that is comes next
            case MissingMandatoryValue():
                return ConfigError(f"{link.full_key} has no value; add {link.full_key}=VALUE" + where)
            case ConfigKeyError() | ConfigAttributeError():
                return ConfigError(unknown_option(str(link.full_key)) + where)
            case InterpolationResolutionError():
                return ConfigError(f"{link.full_key}: {first_line(link)}" + where)
            case ValidationError():
                return ConfigError(wrong_value(link, override) + where)
            case yaml.YAMLError():
                return ConfigError(f"not valid YAML: {one_line(str(link))}")
    for link in links:
        match link:
            case HydraException() if "requires --multirun" in str(link) or "Ambiguous value" in str(link):
                word = re.search(r"'(.+)'", str(link).splitlines()[0])
                return ConfigError(f"{word[1] if word else 'an option'}: several values make a sweep, add -m; a list is written [a,b]")
            case HydraException() | OmegaConfBaseException() | ValueError():
                cause = first_line(links[-1])
                return ConfigError(first_line(link) + ("" if cause in str(link) else f": {cause}"))
    return None


def refuse_choices(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for a list that picks a group's files by anything but their names, on which Hydra stumbles."""
    groups = choices()
    for word in overrides:
        group, equals, value = word.partition("=")
        if equals and group in groups and value.lstrip().startswith("["):
            with contextlib.suppress(HydraException):  # what cannot be read is told when it is composed
                found = OverridesParser.create().parse_override(word).value()
                if isinstance(found, list) and not all(isinstance(name, str) for name in found):
                    raise ConfigError(f"{word}: {group} is picked by name; there are {', '.join(groups[group])}")


def explained(compose: Callable[[], Result]) -> Result:
    """Call `compose`; what it raises because of a user's mistake is raised as `OpdError`."""
    try:
        return compose()
    except Exception as error:
        mistake = explain(error)
        if mistake is None or mistake is error:
            raise
        raise mistake from error
