"""Sweeps: what `opd train -m` is about to do, what it looks for, and what became of each member.

Members may run in other processes or on other machines (joblib, submitit), so each leaves how it ended in a file in its folder.
"""

import argparse
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.config import compose as store
from opd.config.schema import AUTO, Direction, SweepConfig
from opd.errors import INTERNAL, OK, PREEMPTED, ConfigError
from opd.runs.folder import STATUS, Status, write_json
from opd.runs.reader import MEMBER

log = logging.getLogger(__name__)

SCREEN = "screen.txt"
EXTRAS = {"hydra_optuna_sweeper": "optuna", "hydra_joblib_launcher": "joblib", "hydra_submitit_launcher": "submitit"}
WIDTH = 160  # columns of the table where there is no terminal
SILENT = "did not say how it ended: killed, out of memory, or still running"
LAUNCHERS = ("joblib", "submitit")  # what they raise is about their processes


@dataclass(frozen=True, slots=True)
class Sweep:
    """One call of `opd train -m`.

    folder: has a folder a member. members: how many there will be at most, None where only the sweeper knows. swept: the options that
    members differ in. key: tells this call's members from those of earlier calls in the same folder. process: the one that sweeps.
    """

    folder: Path
    members: int | None
    swept: frozenset[str]
    config: SweepConfig
    key: str = field(default_factory=lambda: os.urandom(8).hex())
    process: tuple[str, int] = field(default_factory=lambda: this_process())

    @property
    def is_here(self) -> bool:
        """Whether this process is the one that sweeps, and not one for a member alone."""
        return self.process == this_process()


@dataclass(frozen=True, slots=True)
class Member:
    """A member as a call of `opd train -m` left it. number: from 1, in the order in which they were proposed.

    objective: what the sweep looks at; None where the member did not end well, or it was not measured.
    """

    sweep: str
    number: int
    overrides: list[str]
    status: str = Status.running.value
    exit_code: int | None = None
    reason: str = ""
    objective: float | None = None


def this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def plan(parsed: argparse.Namespace, processes: int) -> Sweep:
    """What Hydra is about to do with a command line. Raises `ConfigError` for what no member could do.

    processes: how many a launcher started, each of which sweeps.
    """
    loader = store.loader(Path(parsed.config_dir) if parsed.config_dir is not None else None)
    composed = loader.load_configuration(parsed.config_name or "config", list(parsed.overrides), RunMode.MULTIRUN)
    for part in ("sweeper", "launcher"):
        check_plugin(part, str(composed.hydra.runtime.choices[f"hydra/{part}"]), str(composed.hydra[part]._target_), processes)
    config = OmegaConf.to_object(composed.sweep) if "sweep" in composed else SweepConfig()
    assert isinstance(config, SweepConfig)
    sweeper = composed.hydra.sweeper
    words = [*(f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()), *composed.hydra.overrides.task]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
    if str(sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        members: int | None = len(BasicSweeper.split_arguments(overrides, None)[0])
    else:
        members = int(sweeper.n_trials) if "n_trials" in sweeper else None
    swept = frozenset(override.get_key_element() for override in overrides if override.is_sweep_override())
    return Sweep(Path(composed.hydra.sweep.dir), members, swept, config)


def check_plugin(part: str, name: str, target: str, processes: int) -> None:
    """Raises `ConfigError` where the sweeper or launcher is not installed, or cannot be what several processes use at once."""
    package = target.partition("hydra_plugins.")[2].partition(".")[0]
    if package and not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{package}")):
        extra = f"the extra {EXTRAS[package]}: pip install 'opd[{EXTRAS[package]}]'" if package in EXTRAS else f"the package of {package}"
        raise ConfigError(f"hydra/{part}={name} needs {extra}")
    if processes > 1 and name != "basic":
        raise ConfigError(
            f"hydra/{part}={name}: a launcher of processes started this sweep {processes} times at once, and each would go its own way; "
            "start it once, with opd train -m"
        )


def title(sweep: Sweep, member: Member) -> str:
    """What is said when a member begins."""
    of = f" of {sweep.members}" if sweep.members is not None else ""
    return f"member {member.number}{of}: {label(sweep, member)}"


def label(sweep: Sweep, member: Member) -> str:
    """The overrides in which members differ; all of them where the sweeper does not say."""
    return " ".join([word for word in member.overrides if word.partition("=")[0] in sweep.swept] or member.overrides)


def tell(folder: Path, member: Member) -> None:
    """Leave in the member's folder how it is. One that failed before it was a run is a failed run from now on."""
    try:
        write_json(folder / MEMBER, asdict(member))
        if member.status == Status.failed.value and not (folder / STATUS).is_file():
            write_json(folder / STATUS, {"status": member.status, "reason": member.reason, "exit_code": member.exit_code})
    except OSError as error:
        log.error("%s cannot be written: %s", folder / MEMBER, error)


def ended(member: Member, code: int, reason: str, value: float | None) -> Member:
    """`member` once it has ended."""
    status = {OK: Status.done, PREEMPTED: Status.preempted}.get(code, Status.failed)
    unmeasured = "nothing to compare was measured" if value is None and code == OK else ""
    return Member(member.sweep, member.number, member.overrides, status.value, code, reason or unmeasured, value)


def members(sweep: Sweep, known: Sequence[Member]) -> list[Member]:
    """Those of this call, in order. known: those that this process ran itself. One of another process that did not end has failed."""
    found: dict[int, Member] = {}
    for file in sweep.folder.glob(f"*/{MEMBER}"):
        said = json.loads(file.read_text(encoding="utf-8"))
        if said.get("sweep") == sweep.key:
            member = Member(**said)
            found[member.number] = member if member.exit_code is not None else ended(member, INTERNAL, SILENT, None)
    return [member for _, member in sorted((found | {member.number: member for member in known}).items())]


def best(config: SweepConfig, ended: Sequence[Member]) -> Member | None:
    """The first member that nothing is better than; None where no objective was measured."""
    sign = 1.0 if config.direction is Direction.maximize else -1.0
    measured = [(sign * member.objective, -member.number, member) for member in ended if member.objective is not None]
    return max(measured)[2] if measured else None


def show(sweep: Sweep, all_members: Sequence[Member], console: Console | None = None) -> None:
    """The closing table: what became of each member, and what is left to do."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=WIDTH)
    winner = best(sweep.config, all_members)
    metric = "objective" if sweep.config.metric == AUTO else sweep.config.metric
    table = Table(title="sweep", title_justify="left", show_edge=False)
    for column in ("member", "status", metric, "reason"):
        table.add_column(column, justify="right" if column == metric else "left", overflow="fold")
    for member in all_members:
        value = "–" if member.objective is None else f"{member.objective:.6g}"
        style = "bold" if member is winner else ""
        table.add_row(Text(label(sweep, member)), Text(member.status), Text(value), Text(member.reason), style=style)
    console.print(table)
    done = sum(member.status == Status.done.value for member in all_members)
    total = f" of {sweep.members}" if sweep.members is not None else ""
    console.print(Text(f"{done}{total} done; each member's folder is in {sweep.folder}"), soft_wrap=True)
    if winner is not None:
        console.print(Text(f"best: {label(sweep, winner)} ({sweep.config.direction.value}s {metric})"), soft_wrap=True)
    if any(member.status != Status.done.value for member in all_members) or len(all_members) < (sweep.members or 0):
        console.print("the same command goes on: it leaves out what is done and tries the rest again")
