"""Templates over the columns of a row: `teacher.prompt` and `teacher.contrast`."""

from collections.abc import Mapping
from datetime import date, time, timedelta
from numbers import Number
from typing import Any

from opd.config.options import PLACEHOLDER
from opd.errors import DataError


def columns_of(template: str | None) -> list[str]:
    """Return the columns that a template names, in its order."""
    return [found[1] for found in PLACEHOLDER.finditer(template or "") if found[1]]


def fill(template: str, columns: Mapping[str, Any], option: str, row: int) -> Any:
    """Return the template with the columns' values for its placeholders: a text, or the list in the column of its only placeholder.

    Args:
        columns: The row's, by name.
        option, row: Where the template and the columns are from, for messages.

    Raises:
        DataError: A column does not exist, is null, or has no text.
    """
    only = PLACEHOLDER.fullmatch(template)
    if only is not None and only[1] and isinstance(columns.get(only[1]), list):
        return columns[only[1]]
    texts = {name: to_text(name, columns, option, row) for name in columns_of(template)}
    return PLACEHOLDER.sub(lambda found: texts[found[1]] if found[1] else found[0][0], template)


def to_text(name: str, columns: Mapping[str, Any], option: str, row: int) -> str:
    if name not in columns:
        known = ", ".join(sorted(columns))
        raise DataError(f"{option}: row {row} has no column {name}; it has {known}: name one of them, or set {option}=null")
    value = columns[name]
    if value is None:
        raise DataError(f"{option}: row {row} has nothing in the column {name}; fill it in, or leave the row out")
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON
    if isinstance(value, str | Number | date | time | timedelta):
        return str(value)
    kind = type(value).__name__
    raise DataError(f"{option}: row {row} has a {kind} in the column {name}; name a text, or a list of messages as the whole template")
