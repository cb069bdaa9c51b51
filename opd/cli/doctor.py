"""`opd doctor`: check whether a run is ready, without training; rank candidate teachers; or plan the run for a machine."""

import argparse
import gc
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from opd import errors
from opd.cli import hydra_errors, sweep
from opd.cli.arguments import at_least
from opd.cli.hydra_app import FlagParser, Job, parse, prepare
from opd.config.files import local_path
from opd.config.schema import Config
from opd.runs.progress import progress_on
from opd.runs.reader import is_run
from opd.runs.text import make_console

if TYPE_CHECKING:
    from opd.doctor import PlanRequest, Report

NUMBER, ANY_TIME = r"\d+(?:\.\d+)?", "--plan=any"
SWEEP = {"-m", "--multirun"}
TEACHERS = ("teacher", "teacher.path")  # options that may list several, with commas


class DoctorParser(FlagParser):
    """Examines the config once, or once with each of several teachers."""

    def __init__(self) -> None:
        super().__init__("doctor", lambda config, folder, flags: examine(config, flags, self.members))
        self.add_argument("--json", action="store_true")
        self.add_argument("--prompts", type=partial(at_least, 0), default=32)
        self.add_argument("--plan", type=minutes, metavar="MINUTES")
        self.add_argument("--memory", type=gibibytes, metavar="SIZE")

    def run(self, words: Sequence[str]) -> int:
        if (run := next((word for word in words if "=" not in word and is_run(local_path(word))), None)) is not None:
            remedy = f"use opd eval {run} or opd report {run}"
            error = errors.ConfigError(f"{run}: is a run, and doctor checks the options of one that has not begun: {remedy}")
            return Job(lambda config, folder: None, "doctor").report(error)
        self.members = 1
        try:
            words = self.of_first_member(joined_minutes(words))
        except Exception as error:  # noqa: BLE001 - any defect must end in a message and an exit code
            return Job(lambda config, folder: None, "doctor").report(error)
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

    def of_first_member(self, words: Sequence[str]) -> list[str]:
        """Return the words for the first member of a sweep, and count its members; the words themselves without -m."""
        if not SWEEP.intersection(words):
            return list(words)
        _, hydra_words = self.parse_known_args(list(words))
        parsed = parse(hydra_words, "doctor")
        typed, parsed.overrides = parsed.overrides, prepare(parsed)
        planned = hydra_errors.explained(lambda: sweep.plan(parsed, 1))
        if planned.first is None or planned.members is None:
            raise errors.ConfigError("-m: only the sweeper knows the members: check one of them, with plain values and without -m")
        self.members = planned.members
        return [word for word in words if word not in (*typed, *SWEEP)] + list(planned.first)


def joined_minutes(words: Sequence[str]) -> list[str]:
    """Return the words with the minutes of `--plan`, which may be left out, in one word with it."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--plan":
            joined[-1:] = [f"--plan={word}"] if re.fullmatch(NUMBER, word) else [ANY_TIME, word]
        else:
            joined.append(word)
    return joined if not joined or joined[-1] != "--plan" else [*joined[:-1], ANY_TIME]


def minutes(word: str) -> float:
    if word != "any" and (not re.fullmatch(NUMBER, word) or float(word) == 0):
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of minutes above 0")
    return math.inf if word == "any" else float(word)


def gibibytes(word: str) -> int:
    size = re.fullmatch(rf"({NUMBER})(G|GB|GiB)", word)
    if size is None or float(size[1]) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a size in GiB such as 80G")
    return round(float(size[1]) * 2**30)


def listed_teachers(words: Sequence[str]) -> tuple[int, str, list[str]]:
    """Return the place, the option and the names of a list of teachers, none where there is no list."""
    for place, word in enumerate(words):
        option, _, value = word.partition("=")
        if option in TEACHERS and "," in value:
            return place, option, list(dict.fromkeys(name for name in value.split(",") if name))
    return 0, "", []


def examine(config: Config, flags: argparse.Namespace, members: int) -> None:
    """Examine the composed config and print the findings. Raises `NotReady` if a check failed.

    Args:
        members: of the sweep whose first member the config is.
    """
    from opd.doctor import Report, Status, plan
    from opd.doctor.findings import WIDTH, show_end, show_finding

    console = make_console(WIDTH)
    shown = Report(members=members)
    if not flags.json:
        shown.on_finding, shown.progress = partial(show_finding, console), progress_on(console)
    report = findings(config, flags, shown)
    if flags.json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        show_end(console, report)
        if "plan" in report.figures:
            plan.show(report.figures["plan"])
    failed = report.of(Status.fail)
    if failed:
        raise errors.NotReady(f"not ready: {', '.join(finding.check for finding in failed)}")


def compare(config: Config, flags: argparse.Namespace, name: str, reports: "dict[str, Report]", is_last: bool) -> None:
    """Examine the config with the teacher `name` and, after the last one, print the ranking.

    Raises `NotReady` if none is ready, and `ConfigError` where no dataset would have it.
    """
    from opd.doctor import Report, candidates

    if flags.plan is not None:
        raise errors.ConfigError("--plan: plans for one teacher: name one, or remove --plan")
    if "" not in config.parts_by_teacher:
        raise errors.ConfigError(f"teacher={name}: teachers has one for every dataset; leave out that of the dataset to find a teacher for")
    shown = Report() if flags.json else Report(progress=progress_on(make_console()))
    reports[name] = findings(config, flags, shown)
    gc.collect()  # its models, before the next ones are loaded
    if not is_last:
        return
    if flags.json:
        print(json.dumps(candidates.to_dict(reports), indent=2, ensure_ascii=False))
    else:
        candidates.show(reports)
    if not any(report.ready for report in reports.values()):
        raise errors.NotReady(f"not ready with any of {', '.join(reports)}")


def findings(config: Config, flags: argparse.Namespace, report: "Report") -> "Report":
    from opd import doctor
    from opd.training import runner  # imports torch, which --help does not need

    runner.quiet_libraries()
    return doctor.examine(config, flags.prompts, plan_request(config, flags), report)


def plan_request(config: Config, flags: argparse.Namespace) -> "PlanRequest | None":
    """Return what the flags ask of a plan; None without `--plan`. Raises `ConfigError` for what no plan is made for."""
    from opd.doctor import PlanRequest

    if flags.plan is None:
        if flags.memory is not None:
            raise errors.ConfigError("--memory: is the memory to plan for: add --plan, or remove it")
        return None
    if config.launch.several:
        raise errors.ConfigError("--plan: plans for one process on one device: remove launch.processes and launch.config_file")
    words = [str(word) for word in HydraConfig.get().overrides.task]
    return PlanRequest(words, None if flags.plan == math.inf else flags.plan, flags.memory)
