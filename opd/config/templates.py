"""Templates over the columns of a row: `data.prompt`, `data.system`, `teacher.prompt` and `teacher.contrast`."""

import re

from opd.config.section import Section

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{\}|\{([^{}]+)\}")  # literal braces, or {column}


def columns_of(template: str | None) -> list[str]:
    """Return the columns that a template names, in its order."""
    return [found[1] for found in PLACEHOLDER.finditer(template or "") if found[1]]


def require_template(section: Section, option: str) -> None:
    """Raise `ConfigError` where a template has a brace that is not part of a placeholder."""
    rest = PLACEHOLDER.sub("", getattr(section, option) or "")
    remedy = "has a brace that is not part of a {column}: write a literal brace as {{ or }}"
    section.require(option, "{" not in rest and "}" not in rest, remedy)
