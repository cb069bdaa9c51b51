"""Verbs with a config: let Hydra compose it, run the task, and turn a failure into one line and an exit code.

A user's mistake never shows a traceback. A defect of `opd` leaves its traceback in the run's log.
"""

import argparse
import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opd import errors, signals
from opd.cli import hydra_errors, sweep
from opd.cli.arguments import Parser, split_targets
from opd.cli.implied import composed, implied_data
from opd.cli.words import explain, last_of_each, readable, refuse_unknown
from opd.config import compose, secrets
from opd.config.files import local_path
from opd.config.schema import Config
from opd.runs.folder import RUN
from opd.runs.reader import is_run
from opd.runs.text import one_line

Task = Callable[[Config, Path], float | None]
FlaggedTask = Callable[[Config, Path, argparse.Namespace], float | None]

WITHOUT_FILES = ("hydra/job_logging=errors", "hydra/hydra_logging=none")
WITHOUT_FOLDER = (*WITHOUT_FILES, "hydra.run.dir=.")
SAME_ON_ALL_RANKS = (errors.ConfigError, errors.DataError, errors.NumericError, errors.OutputError, errors.Preempted)
REFUSALS = (errors.USAGE, errors.DATA, errors.OUTPUT)
STOPPED = (errors.PREEMPTED, errors.INTERRUPTED)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE)
SWEEP_LAUNCHERS = ("joblib", "submitit")  # packages whose exceptions are about the processes of a sweep

log = logging.getLogger(__name__)


def parse(words: Sequence[str], verb: str = "train") -> argparse.Namespace:
    """Parse Hydra's flags and the overrides, in any order. Raises `ConfigError` for a flag that Hydra does not know."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = get_args_parser().parse_intermixed_args(words)
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        if "--resume" in words:
            reason = "--resume: the same command resumes a run without a flag; resume=never and resume=CHECKPOINT do otherwise"
        elif dashed := re.search(r"unrecognized arguments: --([\w.-]+)", reason):
            word = dashed[1].replace("-", "_")
            known = compose.options()
            meant = [word] if word in known else [option for option in known if option.endswith(f".{word}")]
            reason += f": an option has no dashes: {' or '.join(f'{option}=VALUE' for option in meant)}" if meant else ""
        raise errors.ConfigError(f"{reason}; opd {verb} --help shows the flags") from None
    if parsed.experimental_rerun is not None:
        raise errors.ConfigError("--experimental-rerun reads a pickle, which can run code; give the options of that run again instead")
    return parsed


def remove_if_alone(files: Sequence[Path], if_empty: bool = False) -> None:
    """Remove the file that Hydra wrote for a start that began nothing, and its folder, where nothing else is in the folder.

    Args:
        if_empty: Only a log without a line.
    """
    for file in files:
        with contextlib.suppress(OSError):
            if list(file.parent.iterdir()) == [file] and not (if_empty and file.stat().st_size):
                file.unlink()
                file.parent.rmdir()


def log_files() -> list[Path]:
    return [Path(handler.baseFilename) for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]


def say(text: str) -> None:
    """Print a line for this process: with its rank, unless it is the first."""
    rank = signals.launched_as()[0]
    with contextlib.suppress(OSError):
        print(f"opd: {f'[rank {rank}] ' if rank else ''}{text}", file=sys.stderr, flush=True)


class Job:
    """One command: its task, its verb, this process's rank, and the exit codes of its runs so far (a sweep has several)."""

    def __init__(self, task: Task, verb: str, own_config: Path | None = None) -> None:
        self.task = task
        self.verb = verb
        self.own_config = own_config
        self.rank = signals.launched_as()[0]
        self.codes: list[int] = []
        self.reason = ""  # the last error message
        self.sweep: sweep.Sweep | None = None
        self.is_sweeping = True
        self.members: list[sweep.Member] = []  # those that ran in this process
        self.began = time.time()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up the process that a sweep's launcher (joblib, submitit) starts for a member."""
        self.__dict__.update(state, is_sweeping=False)
        compose.register()

    def holds_earlier_run(self, folder: Path) -> bool:
        """Return whether the run in a folder began before this command: a start that was refused is no part of its log."""
        file = folder / RUN
        return file.is_file() and file.stat().st_mtime < self.began

    def report(self, error: Exception) -> int:
        """Print and log `error` and return its exit code. Rank 0 alone prints what fails in the same way on all ranks."""
        files = log_files()
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            error = errors.OutputError(f"{error.filename or 'output'}: {error.strerror}")
        if isinstance(error, errors.OpdError):
            self.reason = one_line(str(error))
            if files and not (error.exit_code in REFUSALS and self.holds_earlier_run(files[0].parent)):
                log.error(self.reason)
            if self.rank == 0 or type(error) not in SAME_ON_ALL_RANKS:
                say(self.reason if isinstance(error, errors.Preempted) else f"error: {self.reason}")
            if error.exit_code in REFUSALS:
                remove_if_alone(files)
            return error.exit_code
        self.reason = one_line(f"internal error: {type(error).__name__}: {error}")
        if files:
            log.error("internal error", exc_info=error)
            say(f"{self.reason}; the traceback is in {', '.join(map(str, files))}")
        else:
            traceback.print_exception(error)
            say(self.reason)
        return errors.INTERNAL

    def report_stop(self, stop: SystemExit | KeyboardInterrupt) -> int:
        """Print why the command stops, unless that was reported before, and return the exit code."""
        if isinstance(stop, KeyboardInterrupt):
            self.reason = "interrupted"
            remove_if_alone(log_files(), if_empty=True)
            if self.rank == 0:
                say(self.reason)
            return errors.INTERRUPTED
        if isinstance(stop.__cause__, errors.Preempted):  # from `signals.raised`
            return self.report(stop.__cause__)
        return errors.USAGE if stop.code == 1 else int(stop.code or errors.OK)  # Hydra exits with 1 for an unknown --package

    def run(self, composed: DictConfig) -> float | None:
        """Run the task; this is the function that Hydra calls. Only a request to stop is raised, so that a sweep continues after a failure.

        Raises:
            SystemExit: The run was asked to stop.
        """
        logging.captureWarnings(True)  # to the log, not to the screen
        value = None
        try:
            config = hydra_errors.explained(lambda: self.to_config(composed))
            value = self.task(config, Path(HydraConfig.get().runtime.output_dir))
            code = errors.OK
        except errors.LaunchedRunFailed as error:
            code = error.exit_code
        except Exception as error:  # noqa: BLE001 - any defect must end in a message and an exit code
            if self.sweep is None:
                signals.keep_exit_code()
            code = self.report(error)
        finally:
            logging.captureWarnings(False)
        self.codes.append(code)
        if code in STOPPED:
            raise SystemExit(code)
        return value

    def to_config(self, composed: DictConfig) -> Config:
        """Return the typed config. Overrides of a run's config are checked where they are applied."""
        if self.own_config is not None:
            return compose.to_unchecked_config(composed)
        swept = frozenset() if self.sweep is None else self.sweep.swept
        return compose.to_config(composed, HydraConfig.get().overrides.task, swept, self.verb)

    def run_member(self, composed: DictConfig) -> float | None:
        """Run one member of a sweep and store its outcome in its folder. In a process of its own, its screen output goes to a file."""
        assert self.sweep is not None
        if self.rank:
            return self.run(composed)
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        member = sweep.Member(self.sweep.key, int(hydra_config.job.num) + 1, [str(word) for word in hydra_config.overrides.task])
        title = sweep.title(self.sweep, member)
        print(title, flush=True)
        sweep.write_member(folder, member)
        self.reason, value, stopped = "", None, False
        with contextlib.ExitStack() as stack:
            if not self.is_sweeping:
                screen = stack.enter_context((folder / sweep.SCREEN).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(screen))
            try:
                value = self.run(composed)
                code = self.codes[-1]
            except (SystemExit, KeyboardInterrupt) as stop:
                code, stopped = self.report_stop(stop), True
        member = member.ended(code, self.reason, value)
        self.members.append(member)
        sweep.write_member(folder, member)
        if self.is_sweeping and stopped:
            raise SystemExit(code)  # the other members are not started
        if not self.is_sweeping:
            print(f"{title}: {member.status}", flush=True)
            if code == errors.PREEMPTED and signals.TIME_IS_UP in signals.received:
                requeue()
        return value


def requeue() -> None:
    """Call submitit's signal handler, which queues this job again and ends the process. Returns if there is none or it refuses."""
    handler = signal.getsignal(signals.TIME_IS_UP)
    if callable(handler):
        with contextlib.suppress(Exception):
            handler(signals.TIME_IS_UP, None)


def run_sweep(job: Job, hydra_main: Callable[[Callable[[DictConfig], float | None]], Callable[[], None]]) -> None:
    """Let Hydra run the members, and print a table of their outcomes, whatever ends the sweep."""
    assert job.sweep is not None
    try:
        with signals.raised():
            hydra_errors.explained(hydra_main(job.run_member))
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in SWEEP_LAUNCHERS:
            raise
        reason = hydra_errors.first_line(error if str(error) else error.__cause__ or error)
        raise errors.OpdError(f"{package} ended the sweep: {reason}") from error
    finally:
        if job.rank == 0:
            members = sweep.read_members(job.sweep, job.members)
            job.codes = [member.exit_code or errors.OK for member in members]
            if members:
                sweep.print_summary(job.sweep, members)
            else:
                remove_if_alone([job.sweep.folder / "multirun.yaml"])


def prepare(parsed: argparse.Namespace) -> list[str]:
    """Register the options and the choices, and return the overrides as Hydra reads them. Raises `ConfigError` for unknown options."""
    folders = [Path(parsed.config_dir)] if parsed.config_dir is not None else []
    compose.register(folders)
    overrides = [readable(word, folders) for word in parsed.overrides]
    hydra_errors.refuse_lists_of_choices(overrides)
    refuse_unknown(overrides, folders)
    overrides, replaced = last_of_each(overrides)
    for text in replaced if signals.launched_as()[0] == 0 else ():
        say(f"warning: {text}")
    return overrides


def compose_and_run(job: Job, words: Sequence[str]) -> None:
    """Let Hydra compose the config and call `job.run` once, or `job.run_member` for each member of a sweep."""
    secrets.refuse_in_words(words)
    parsed = parse(words, job.verb)
    if parsed.cfg or parsed.help or parsed.info:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--cfg job | head -1` must not end in a traceback
    if parsed.help and (names := [word for word in parsed.overrides if "=" not in word]):
        parsed.overrides = [word for word in parsed.overrides if "=" in word]
        parsed.overrides = prepare(parsed)
        print(explain(names, composed(parsed) if parsed.overrides else None))
        return
    flags = [word for word in words if word not in parsed.overrides]
    parsed.overrides = prepare(parsed)
    parsed.overrides += implied_data(parsed, job.own_config)
    overrides = [*parsed.overrides, *(WITHOUT_FILES if job.rank else ())]
    if job.verb != "train":
        if parsed.multirun:
            raise errors.ConfigError(f"--multirun: opd {job.verb} takes one config at a time")
        overrides = [*parsed.overrides, *WITHOUT_FOLDER, f"hydra/help={job.verb}"]
    hydra_main = hydra.main(version_base="1.3", config_path=str(compose.conf_dir()), config_name="config")
    is_sweep = parsed.multirun and not (parsed.cfg or parsed.info)
    if is_sweep:
        job.sweep = hydra_errors.explained(lambda: sweep.plan(parsed, signals.launched_as()[1]))
        overrides.append(f"hydra.job.config.override_dirname.exclude_keys={job.sweep.unnamed}")
    # Hydra reads `sys.argv`, and with this variable it raises errors instead of printing them. One process runs one command.
    sys.argv = [sys.argv[0], *flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if is_sweep:
        run_sweep(job, hydra_main)
    else:
        hydra_errors.explained(hydra_main(job.run))


def run_verb(task: Task, words: Sequence[str], verb: str = "train", own_config: Path | None = None) -> int:
    """Compose the config that the command line `words` asks for, call `task` with it and the run folder, and return the exit code.

    Verbs other than `train` get no run folder and leave no files of Hydra's.

    Args:
        own_config: The run to whose config the overrides apply: the target, or that of a checkpoint (`evaluation.target`).
    """
    job = Job(task, verb, own_config)
    logging.raiseExceptions = False  # a log on a full disk must not fill the screen with tracebacks
    try:
        signals.follow_launcher()
        compose_and_run(job, words)
    except (SystemExit, KeyboardInterrupt) as stop:
        return job.report_stop(stop)
    except Exception as error:  # noqa: BLE001 - any defect must end in a message and an exit code
        job.codes.append(job.report(error))
    if errors.PREEMPTED in job.codes:
        return errors.PREEMPTED
    return next((code for code in job.codes if code), errors.OK)


class FlagParser(Parser):
    """The flags that `opd VERB` has besides config options and Hydra's flags. Hydra prints the help.

    Args:
        task: Gets the config, the run folder and the flags.
        second_target: What to suggest when two targets are given; None for a verb without a target. `flags.target` is the target, or None.
    """

    def __init__(self, verb: str, task: FlaggedTask, second_target: str | None = None) -> None:
        super().__init__(verb, task, add_help=False)
        self.second_target = second_target

    def run(self, words: Sequence[str]) -> int:
        """Parse the flags, compose the config from the other words, run the task and return the exit code."""
        try:
            self.check_dashes(words)
            flags, hydra_words = self.parse_known_args(list(words))
            if self.second_target is not None:
                targets, hydra_words = split_targets(hydra_words)
                if len(targets) > 1:
                    raise errors.ConfigError(f"{targets[1]}: only one target is allowed; {self.second_target}")
                flags.target = targets[0] if targets else None
        except errors.ConfigError as error:
            return Job(lambda config, folder: None, self.verb).report(error)
        own_config = None
        if self.second_target is not None and flags.target is not None:
            target = local_path(flags.target)
            own_config = next((path for path in (target, target.absolute().parent.parent) if is_run(path)), None)
        return run_verb(lambda config, folder: self.task(config, folder, flags), hydra_words, self.verb, own_config)
