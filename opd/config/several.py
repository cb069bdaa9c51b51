"""Options of one of several datasets or teachers, given as a mapping of those that differ from others: checked as ordinary options are."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from opd.errors import ConfigError, OpdError

T = TypeVar("T")

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def describe_type(kind: Any) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(describe_type(part) for part in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(member.name for member in kind)}"
    if get_origin(kind) is list:
        return f"a list, for example {'[a,b]' if str in get_args(kind) else '[0.9,0.95]'}"
    if get_origin(kind) is dict:
        return "a mapping, for example '{a: 1}'"
    return TYPE_NAMES.get(kind, "a section; give the options in it one by one")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=2)
    return f"did you mean {' or '.join(close)}? " if close else ""


def overlay(kind: type[T], base: Mapping[str, Any], entry: Any, key: str, known: Mapping[str, Any]) -> T:
    """Return the options of a section: those of `base`, overwritten by those of `entry`. Mappings in them are merged, as by Hydra.

    Args:
        kind: The section's class.
        entry: What the user gave: a mapping of options by name.
        key: Its dotted name, for messages.
        known: The type of each option that `entry` may set.

    Raises:
        ConfigError: There is no such option, or its value is of another type or out of bounds.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{key}={entry}: must be a mapping of options, for example '{{path: PATH}}'")
    for name in map(str, entry):
        if name not in known:
            raise ConfigError(f"{key}.{name}: no such option; {did_you_mean(name, known)}{key} has {', '.join(known)}")
    for name, value in entry.items():
        try:
            OmegaConf.merge(OmegaConf.structured(kind), {name: value})
        except ValidationError:
            raise ConfigError(f"{key}.{name}={value}: must be {describe_type(known[name])}") from None
    options: T = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(base), dict(entry)))  # type: ignore[assignment]
    return options


@dataclasses.dataclass(frozen=True, slots=True)
class Renaming:
    """How texts that name the options of a section name those of an entry: by the prefix `new` where they have the prefix `old`.

    As a context manager it renames in the messages of errors that are raised in the block.
    """

    old: str
    new: str
    names: Iterable[str]

    def __call__(self, text: str) -> str:
        return re.sub(rf"(?<![\w./-]){re.escape(self.old)}(?=(?:{'|'.join(self.names)})\b)", self.new, text)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OpdError) and (text := self(str(error))) != str(error):
            raise type(error)(text) from error
