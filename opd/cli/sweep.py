"""Sweeps (`opd train -m`): the plan, and the outcome of each member.

Members may run in other processes or on other machines (joblib, submitit), so each leaves its outcome in a file in its folder.
"""

import argparse
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict, read_write
from rich.table import Table
from rich.text import Text

from opd.cli import hydra_errors
from opd.config import compose
from opd.config.options import AUTO, Direction, SweepConfig
from opd.errors import INTERNAL, OK, PREEMPTED, ConfigError, OpdError
from opd.runs.folder import STATUS, SUMMARY, Status, read_json, write_json
from opd.runs.outcome import WORSE
from opd.runs.reader import MEMBER
from opd.runs.text import format_number, make_console

log = logging.getLogger(__name__)

SCREEN = "screen.txt"
EXTRAS = {"hydra_optuna_sweeper": "optuna", "hydra_joblib_launcher": "joblib", "hydra_submitit_launcher": "submitit"}
NO_OUTCOME = "left no outcome: killed, out of memory, or still running"


@dataclass(frozen=True, slots=True)
class Sweep:
    """One call of `opd train -m`.

    Attributes:
        folder: Contains one folder per member.
        members: Their number at most; None if only the sweeper knows it.
        swept: The options in which members differ.
        first: The words of the first member; None if only the sweeper knows them.
        unnamed: The keys that are not in the names of the members' folders: what all of them share.
        key: Tells members of this call from those of earlier calls in the same folder.
    """

    folder: Path
    members: int | None
    swept: frozenset[str]
    config: SweepConfig
    first: Sequence[str] | None = None
    unnamed: Sequence[str] = ()
    key: str = field(default_factory=lambda: os.urandom(8).hex())


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a sweep, as stored in its folder.

    Attributes:
        sweep: The key of its sweep.
        number: From 1, in the order in which members were proposed.
        objective: None if the member did not end well, or its metric was not measured.
    """

    sweep: str
    number: int
    overrides: list[str]
    status: str = Status.running.value
    exit_code: int | None = None
    reason: str = ""
    objective: float | None = None

    def ended(self, code: int, reason: str, objective: float | None) -> "Member":
        """Return this member with its outcome."""
        status = {OK: Status.done, PREEMPTED: Status.preempted}.get(code, Status.failed)
        if code == OK and objective is None:
            reason = reason or "no objective was measured"
        return replace(self, status=status.value, exit_code=code, reason=reason, objective=objective)


def plan(parsed: argparse.Namespace, processes: int) -> Sweep:
    """Return what Hydra is about to do with a command line. Raises `ConfigError` for what no member could do.

    Args:
        parsed: Hydra's arguments.
        processes: How many processes a launcher started; each of them sweeps.
    """
    loader = compose.loader(Path(parsed.config_dir) if parsed.config_dir is not None else None)
    composed = loader.load_configuration(parsed.config_name or "config", list(parsed.overrides), RunMode.MULTIRUN)
    for part in ("sweeper", "launcher"):
        name, target = str(composed.hydra.runtime.choices[f"hydra/{part}"]), str(composed.hydra[part]._target_)
        package = target.partition("hydra_plugins.")[2].partition(".")[0]
        if package and not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{package}")):
            extra = (
                f"the extra {EXTRAS[package]}: pip install 'opd[{EXTRAS[package]}]'" if package in EXTRAS else f"the package of {package}"
            )
            raise ConfigError(f"hydra/{part}={name} needs {extra}")
        if processes > 1 and name != "basic":
            raise ConfigError(
                f"hydra/{part}={name}: {processes} processes would each run their own sweep; start it once, with opd train -m"
            )
    config = OmegaConf.to_object(composed.sweep) if "sweep" in composed else SweepConfig()
    assert isinstance(config, SweepConfig)
    sweeper = composed.hydra.sweeper
    words = [*(f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()), *composed.hydra.overrides.task]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
    swept = frozenset(override.get_key_element() for override in overrides if override.is_sweep_override())
    if str(sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        refuse_repeated(overrides)
        of_members = BasicSweeper.split_arguments(overrides, None)[0]
        members: int | None = len(of_members)
        first: Sequence[str] | None = of_members[0]
        if len(of_members) > 1:
            refuse_shared_mistake(loader, parsed.config_name or "config", of_members, swept)
    else:
        members, first = int(sweeper.n_trials) if "n_trials" in sweeper else None, None
    unnamed = [*composed.hydra.job.config.override_dirname.exclude_keys]
    if swept:
        unnamed += [override.key_or_group for override in overrides if not override.is_sweep_override()]
    return Sweep(Path(composed.hydra.sweep.dir), members, swept, config, first, unnamed)


def refuse_repeated(overrides: Sequence[Override]) -> None:
    """Raise `ConfigError` where an option has a value more than once: its members would share a folder."""
    for override in overrides:
        if override.is_sweep_override() and override.is_discrete_sweep():
            key, counts = override.get_key_element(), Counter(override.sweep_string_iterator())
            repeated = [value for value, count in counts.items() if count > 1]
            if repeated:
                which = f"{', '.join(repeated)} {'is' if len(repeated) == 1 else 'are'} given more than once"
                raise ConfigError(f"{key}: {which}; give {key}={','.join(counts)}")


def refuse_shared_mistake(loader: ConfigLoader, name: str, members: Sequence[Sequence[str]], swept: frozenset[str]) -> None:
    """Raise the user's mistake in the options if it is the same for all members; one that some do not have is theirs to report."""
    first: OpdError | None = None
    for words in members:
        try:
            composed = loader.load_configuration(name, list(words), RunMode.RUN)
            HydraConfig.instance().set_config(composed)  # resolvers of the run's name read it
            with read_write(composed), open_dict(composed):
                composed.pop("hydra")
            compose.to_config(composed, words, swept)
            return
        except Exception as error:  # noqa: BLE001 - a defect is reported by the members
            mistake = hydra_errors.explain(error)
            if mistake is None or (first is not None and str(mistake) != str(first)):
                return
            first = mistake
        finally:
            HydraConfig.instance().cfg = None
    if first is not None:
        raise first


def title(sweep: Sweep, member: Member) -> str:
    """Return the line that is printed when a member starts."""
    of = f" of {sweep.members}" if sweep.members is not None else ""
    return f"member {member.number}{of}: {label(sweep, member)}"


def label(sweep: Sweep, member: Member) -> str:
    """Return the overrides in which members differ; all overrides if only the sweeper knows them."""
    return " ".join([word for word in member.overrides if word.partition("=")[0] in sweep.swept] or member.overrides)


def write_member(folder: Path, member: Member) -> None:
    """Store a member in its folder. One that failed before its run began becomes a failed run."""
    try:
        write_json(folder / MEMBER, asdict(member))
        if member.status == Status.failed.value and not (folder / STATUS).is_file():
            write_json(folder / STATUS, {"status": member.status, "reason": member.reason, "exit_code": member.exit_code})
    except OSError as error:
        log.error("cannot write %s: %s", folder / MEMBER, error)


def read_stored(sweep: Sweep) -> list[tuple[Member, dict[str, Any]]]:
    """Return the members of this call that are stored, each with the summary of its run; an empty one where it has none."""
    found = []
    for file in sweep.folder.glob(f"*/{MEMBER}"):
        stored = read_json(file) or {}
        if stored.get("sweep") == sweep.key:
            found.append((Member(**stored), read_json(file.parent / SUMMARY) or {}))
    return found


def read_members(sweep: Sweep, known: Sequence[Member]) -> list[Member]:
    """Return the members of this call in order: those `known`, which ran in this process, and those stored by other processes."""
    members: dict[int, Member] = {}
    for member, _ in read_stored(sweep):
        members[member.number] = member if member.exit_code is not None else member.ended(INTERNAL, NO_OUTCOME, None)
    members |= {member.number: member for member in known}
    return [members[number] for number in sorted(members)]


def best_member(config: SweepConfig, members: Sequence[Member]) -> Member | None:
    """Return the first member with the best objective; None if no objective was measured."""
    sign = 1.0 if config.direction is Direction.maximize else -1.0
    measured = [(sign * member.objective, -member.number, member) for member in members if member.objective is not None]
    return max(measured)[2] if measured else None


def name_metric(sweep: Sweep) -> str:
    """Return what the members' objective is: with `sweep.metric=auto` the reward, or minus the KL where there are no rewards."""
    if sweep.config.metric != AUTO:
        return sweep.config.metric
    measured = {name for _, summary in read_stored(sweep) for name, value in summary.items() if value is not None}
    return "reward" if "reward_after" in measured else "-KL" if "eval_kl_after" in measured else "objective"


def find_worse(sweep: Sweep) -> set[int]:
    """Return the numbers of the members of this call that made the student worse than it was before training."""
    return {member.number for member, summary in read_stored(sweep) if any(WORSE in warning for warning in summary.get("warnings", ()))}


def print_summary(sweep: Sweep, members: Sequence[Member]) -> None:
    """Print a table with the outcome of each member, the best member, and how to resume."""
    console = make_console()
    best = best_member(sweep.config, members)
    metric = name_metric(sweep)
    table = Table(title="sweep", title_justify="left", show_edge=False)
    for column in ("member", "status", metric, "reason"):
        table.add_column(column, justify="right" if column == metric else "left", overflow="fold")
    for member in members:
        cells = (label(sweep, member), member.status, format_number(member.objective, ".6g"), member.reason)
        table.add_row(*map(Text, cells), style="bold" if member is best else "")
    console.print(table)
    done = sum(member.status == Status.done.value for member in members)
    total = f" of {sweep.members}" if sweep.members is not None else ""
    waiting = (sweep.members or 0) - len(members)
    begun = f", {waiting} not begun" if waiting > 0 else ""
    console.print(Text(f"{done}{total} done{begun}; each member's folder is in {sweep.folder}"), soft_wrap=True)
    if best is not None:
        better = "highest" if sweep.config.direction is Direction.maximize else "lowest"
        ties = sum(member.objective == best.objective for member in members) - 1
        others = f"; {ties} more with the same" if ties else ""
        console.print(Text(f"best: {label(sweep, best)} ({better} {metric}{others})"), soft_wrap=True)
        if {member.number for member in members if member.objective is not None} <= find_worse(sweep):
            console.print("warning: all of these made the student worse than it was before training: none is to be chosen; lower optim.lr")
    if done < max(len(members), sweep.members or 0):
        console.print("the same command resumes the sweep: it skips what is done and tries the rest again")
