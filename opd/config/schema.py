"""The typed configuration."""

import re
from dataclasses import dataclass

from opd.config.rules import check_rules
from opd.config.settings import Settings


@dataclass(kw_only=True, slots=True)
class Config(Settings):
    """All options of a run. Raises `ConfigError` for the first one that is out of bounds or does not go with another."""

    def __post_init__(self) -> None:
        self.check_bounds()
        fits = re.fullmatch(r"[\w+=,@-][\w.+=,@-]*", self.name) is not None
        self.require("name", fits, "it names the run folder; use letters, digits and . _ - + = , only")
        self.require("resume", bool(self.resume.strip()), "must be auto, never or the path of a checkpoint")
        check_rules(self)
