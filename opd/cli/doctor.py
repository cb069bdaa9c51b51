"""`opd doctor`: check whether a run is ready, without training; or rank candidate teachers."""

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd import errors
from opd.cli.arguments import non_negative_int
from opd.cli.hydra_app import FlagParser
from opd.config.schema import Config

if TYPE_CHECKING:
    from opd.doctor import Report

TEACHERS = ("teacher", "teacher.path")  # options that may list several, with commas


class DoctorParser(FlagParser):
    """Examines the config once, or once with each of several teachers."""

    def __init__(self) -> None:
        super().__init__("doctor", examine)
        self.add_argument("--json", action="store_true")
        self.add_argument("--prompts", type=non_negative_int, default=32)

    def run(self, words: Sequence[str]) -> int:
        place, option, names = listed_teachers(words)
        if len(names) < 2:
            return super().run(words)
        reports: dict[str, Report] = {}
        for name in names:
            self.task = lambda config, folder, flags, name=name: compare(config, flags, name, reports, is_last=name == names[-1])
            code = super().run([*words[:place], f"{option}={name}", *words[place + 1 :]])
            if name not in reports or name == names[-1]:  # a mistake in the options, or the end
                return code
        return errors.OK


def make_parser() -> FlagParser:
    return DoctorParser()


def listed_teachers(words: Sequence[str]) -> tuple[int, str, list[str]]:
    """Return the place, the option and the names of a list of teachers, none where there is no list."""
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        if option in TEACHERS and "," in value:
            return place, option, list(dict.fromkeys(name for name in value.split(",") if name))
    return 0, "", []


def examine(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Examine the composed config and print the findings. Raises `NotReady` if a check failed."""
    from opd.doctor import Status
    from opd.doctor.findings import show

    report = findings(config, flags)
    if flags.json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)
    failed = report.of(Status.fail)
    if failed:
        raise errors.NotReady(f"not ready: {', '.join(finding.check for finding in failed)}")


def compare(config: Config, flags: argparse.Namespace, name: str, reports: "dict[str, Report]", is_last: bool) -> None:
    """Examine the config with the teacher `name` and, after the last one, print the ranking.

    Raises `NotReady` if none is ready, and `ConfigError` where no dataset would have it.
    """
    from opd.doctor import candidates

    if "" not in config.parts_by_teacher:
        raise errors.ConfigError(f"teacher={name}: teachers has one for every dataset; leave out that of the dataset to find a teacher for")
    reports[name] = findings(config, flags)
    gc.collect()  # its models, before the next ones are loaded
    if not is_last:
        return
    if flags.json:
        print(json.dumps(candidates.to_dict(reports), indent=2, ensure_ascii=False))
    else:
        candidates.show(reports)
    if not any(report.ready for report in reports.values()):
        raise errors.NotReady(f"not ready with any of {', '.join(reports)}")


def findings(config: Config, flags: argparse.Namespace) -> "Report":
    from opd import doctor
    from opd.training import runner  # imports torch, which --help does not need

    runner.quiet_libraries()
    return doctor.examine(config, flags.prompts)
