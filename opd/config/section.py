"""What all groups of options have: bounds of numbers, and messages about an option."""

import math
import operator
from dataclasses import field, fields
from types import NoneType
from typing import Any, ClassVar, get_args

from opd.errors import ConfigError

BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def bounded(default: float | None, *, hint: str = "", **bounds: float) -> Any:
    """Return a dataclass field for a number within `bounds`, one of `BOUNDS` each. Errors show the hint, what is usual."""
    return field(default=default, metadata={"bounds": bounds, "hint": f" ({hint})" if hint else ""})


class Section:
    """A group of options. `prefix`: what precedes their names."""

    __slots__ = ()
    PREFIX: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.PREFIX = prefix or cls.PREFIX

    def require(self, option: str, condition: bool, rule: str) -> None:
        """Raise `ConfigError` with the dotted option, its value and the rule unless `condition` holds."""
        if not condition:
            value = operator.attrgetter(option)(self)
            shown = repr(value) if type(value) is str else value
            raise ConfigError(f"{self.PREFIX}{option}={shown}: {rule}")

    def require_value(self, option: str, value: object, why: str, otherwise: str = "") -> None:
        """Raise `ConfigError` unless the option has this value, which is the remedy; `otherwise`: another one."""
        typed = "null" if value is None else str(value).lower()
        remedy = f"{why}: set {self.PREFIX}{option}={typed}" + (f", or {otherwise}" if otherwise else "")
        self.require(option, operator.attrgetter(option)(self) == value, remedy)

    def check_bounds(self) -> None:
        """Raise `ConfigError` for the first number of this group or its subgroups that is out of bounds or not finite."""
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Section):
                value.check_bounds()
            elif "bounds" in item.metadata and value is not None:
                bounds = item.metadata["bounds"].items()
                rule = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in bounds)
                null = ", or null for none" if NoneType in get_args(item.type) else ""
                within = math.isfinite(value) and all(BOUNDS[name](value, limit) for name, limit in bounds)
                self.require(item.name, within, f"must be {rule}{null}{item.metadata['hint']}")
