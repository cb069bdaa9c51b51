"""What every verb with a config does: compose it, hand it to the task, and turn what goes wrong into one line and an exit code.

A user's mistake never shows a traceback. A defect of `opd` leaves its traceback in the log of the run.
"""

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opd import errors, signals
from opd.cli import hydra_errors as mistakes
from opd.cli import launched, sweep
from opd.cli.arguments import Parser, targets
from opd.config import compose as store
from opd.config import secrets
from opd.config.schema import Config
from opd.runs.text import one_line

Task = Callable[[Config, Path], float | None]
FlaggedTask = Callable[[Config, Path, argparse.Namespace], None]

WITHOUT_FILES = ("hydra/job_logging=errors", "hydra/hydra_logging=none")
WITHOUT_FOLDER = (*WITHOUT_FILES, "hydra.run.dir=.")
SAME_ON_ALL_RANKS = (errors.ConfigError, errors.DataError, errors.NumericError, errors.OutputError, errors.Preempted)
STOPPED = (errors.PREEMPTED, errors.INTERRUPTED)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE)

log = logging.getLogger(__name__)


@contextlib.contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """Set the environment variable `name`, or remove it for None, and put back what was there."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """Let Hydra, which reads `sys.argv`, see `words` behind the program's name."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def parse(words: Sequence[str], verb: str = "train") -> argparse.Namespace:
    """Hydra's flags and the overrides, in any order. Raises `ConfigError` for a flag that Hydra does not know."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = get_args_parser().parse_intermixed_args(words)
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        raise errors.ConfigError(f"{reason}; opd {verb} --help shows the flags") from None
    if parsed.experimental_rerun is not None:
        raise errors.ConfigError("--experimental-rerun reads a pickle, which can run code; give the options of that run again instead")
    return parsed


def log_files() -> list[str]:
    """The files that Python's logging writes to."""
    return [handler.baseFilename for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]


class Job:
    """One command: its task, its verb, the process's rank, and the exit codes of its runs so far (several in a sweep)."""

    def __init__(self, task: Task, verb: str = "train") -> None:
        self.task = task
        self.verb = verb
        self.rank = int(os.environ.get("RANK") or 0)
        self.full_error = os.environ.get("HYDRA_FULL_ERROR")
        self.codes: list[int] = []
        self.reason = ""  # what was said last of what went wrong
        self.sweep: sweep.Sweep | None = None
        self.members: list[sweep.Member] = []  # those that ran in this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that a sweep's launcher started for a member: tell Hydra what it must know there too."""
        self.__dict__.update(state)
        store.register()

    def say(self, text: str) -> None:
        where = f"[rank {self.rank}] " if self.rank else ""
        print(f"opd: {where}{text}", file=sys.stderr, flush=True)

    def report(self, error: Exception) -> int:
        """Tell the user about `error` and return its exit code. What fails alike on all ranks is said by the first one alone."""
        if isinstance(error, errors.OpdError):
            message = self.reason = one_line(str(error))
            if log_files():
                log.error(message)
            if self.rank == 0 or type(error) not in SAME_ON_ALL_RANKS:
                self.say(message if isinstance(error, errors.Preempted) else f"error: {message}")
            return error.exit_code
        summary = self.reason = one_line(f"internal error: {type(error).__name__}: {error}")
        files = log_files()
        if files:
            log.error("internal error", exc_info=error)
            self.say(f"{summary}; the traceback is in {', '.join(files)}")
        else:
            traceback.print_exception(error)
            self.say(summary)
        return errors.INTERNAL

    def run(self, composed: DictConfig) -> float | None:
        """The task function that Hydra calls. Nothing is raised: the other members of a sweep have to go on."""
        with environment("HYDRA_FULL_ERROR", self.full_error):  # programs that the task starts must not inherit it
            logging.captureWarnings(True)  # into the log: on the screen they would be other people's
            try:
                config = mistakes.explained(lambda: store.to_config(composed))
                return self.task(config, Path(HydraConfig.get().runtime.output_dir))
            except OSError as error:
                full = errors.OutputError(f"{error.filename or 'output'}: {error.strerror}") if error.errno in CANNOT_WRITE else error
                self.codes.append(self.report(full))
            except errors.LaunchedRunFailed as error:
                if error.exit_code in STOPPED:
                    raise SystemExit(error.exit_code) from None
                self.codes.append(error.exit_code)
            except errors.Preempted as error:
                raise SystemExit(self.report(error)) from None  # asked to stop: the other members of a sweep are not begun
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends in a message and an exit code
                self.codes.append(self.report(error))
            finally:
                logging.captureWarnings(False)
        return None

    def member(self, composed: DictConfig) -> float | None:
        """`run` as one of a sweep: says so, and leaves in its folder how it ended. In a process of its own, its screen is a file."""
        assert self.sweep is not None
        if self.rank:
            return self.run(composed)
        hydra_config, is_here = HydraConfig.get(), self.sweep.is_here
        folder = Path(hydra_config.runtime.output_dir)
        member = sweep.Member(self.sweep.key, int(hydra_config.job.num) + 1, [str(word) for word in hydra_config.overrides.task])
        title = sweep.title(self.sweep, member)
        print(title, flush=True)
        self.reason = ""
        stopped: BaseException | None = None
        with contextlib.ExitStack() as stack:
            sweep.tell(folder, member)
            if not is_here:
                screen = stack.enter_context((folder / sweep.SCREEN).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(screen))
            before, value = len(self.codes), None
            try:
                value = self.run(composed)
                code = next(iter(self.codes[before:]), errors.OK)
            except SystemExit as stop:
                code, stopped = int(stop.code or errors.OK), stop
            except KeyboardInterrupt as stop:
                code, self.reason, stopped = errors.INTERRUPTED, "interrupted", stop
        member = sweep.ended(member, code, self.reason, value)
        self.members.append(member)
        sweep.tell(folder, member)
        if is_here and stopped is not None:
            raise stopped  # asked to stop: the other members are not begun
        if not is_here:
            print(f"{title}: {member.status}", flush=True)
            if code == errors.PREEMPTED and signals.TIME_IS_UP in signals.seen:
                queue_again()
        return value


def queue_again() -> None:
    """Let submitit, in whose process a member was stopped because its time is up, queue it again, which ends the process.

    Returns where there is no submitit, and where submitit will not, because `max_num_timeout` is reached.
    """
    handler = signal.getsignal(signals.TIME_IS_UP)
    if callable(handler):
        with contextlib.suppress(Exception):
            handler(signals.TIME_IS_UP, None)


def run_sweep(job: Job, composed_by: Callable[[Callable[[DictConfig], float | None]], Callable[[], None]]) -> None:
    """Let Hydra run the members, and tell what became of them, whatever ends the sweep."""
    assert job.sweep is not None
    try:
        with signals.raised():
            mistakes.explained(composed_by(job.member))
    except Exception as error:
        launcher = type(error).__module__.partition(".")[0]
        if launcher not in sweep.LAUNCHERS:
            raise
        reason = mistakes.first_line(error if str(error) else error.__cause__ or error)
        raise errors.OpdError(f"{launcher} ended the sweep: {reason}") from error
    finally:
        if job.rank == 0:
            ended = sweep.members(job.sweep, job.members)
            job.codes = [member.exit_code or errors.OK for member in ended]
            if ended:
                sweep.show(job.sweep, ended)


def compose_and_run(job: Job, words: Sequence[str]) -> None:
    """Let Hydra compose the config and call `job.run`, once or for each member of a sweep."""
    secrets.refuse_in_words(words)
    parsed = parse(words, job.verb)
    if parsed.cfg or parsed.help or parsed.info:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--cfg job | head -1` ends without a complaint
    store.register([Path(parsed.config_dir)] if parsed.config_dir is not None else [])
    mistakes.refuse_choices(parsed.overrides)
    flags = [word for word in words if word not in parsed.overrides]
    overrides = [*parsed.overrides, *(WITHOUT_FILES if job.rank else ())]
    if job.verb != "train":
        if parsed.multirun:
            raise errors.ConfigError(f"--multirun: opd {job.verb} looks at one config at a time")
        overrides = [*parsed.overrides, *WITHOUT_FOLDER, f"hydra/help={job.verb}"]
    main = hydra.main(version_base="1.3", config_path=str(store.conf_dir()), config_name="config")
    with environment("HYDRA_FULL_ERROR", "1"), command_line([*flags, *overrides]):  # Hydra then raises instead of printing
        if parsed.multirun and not (parsed.cfg or parsed.info):
            job.sweep = mistakes.explained(lambda: sweep.plan(parsed, int(os.environ.get("WORLD_SIZE") or 1)))
            run_sweep(job, main)
        else:
            mistakes.explained(main(job.run))


def launch(task: Task, words: Sequence[str], verb: str = "train") -> int:
    """Compose the config that the command line `words` asks for, call `task` with it and the run folder, and return the exit code.

    Any other verb than `train` gets no run folder, and leaves no file of Hydra's behind.
    """
    launched.begin()
    code = composed(Job(task, verb), words)
    launched.end(code)
    return code


def launch_with_flags(own: Parser, task: FlaggedTask, words: Sequence[str], second: str | None = None) -> int:
    """As `launch`, for a verb with flags of its own, which `task` gets.

    second: what to say to a second target; None for a verb that has no target. The target is `given.target`, None where none is named.
    """
    verb = own.prog.rpartition(" ")[2]
    try:
        given, rest = own.parse_known_args(list(words))
        if second is not None:
            named, rest = targets(rest)
            if len(named) > 1:
                raise errors.ConfigError(f"{named[1]}: name one target; {second}")
            given.target = named[0] if named else None
    except errors.ConfigError as error:
        return Job(lambda config, folder: None, verb).report(error)
    return launch(lambda config, folder: task(config, folder, given), rest, verb)


def composed(job: Job, words: Sequence[str]) -> int:
    signals.follow_launcher()
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is no reason to fill the screen
    try:
        compose_and_run(job, words)
    except KeyboardInterrupt:
        if job.rank == 0:
            job.say("interrupted")
        return errors.INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__cause__, errors.Preempted):  # between members
            return job.report(stop.__cause__)
        return errors.USAGE if stop.code == 1 else int(stop.code or errors.OK)  # 1 is Hydra's: --package names nothing
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends in a message and an exit code
        job.codes.append(job.report(error))
    if errors.PREEMPTED in job.codes:
        return errors.PREEMPTED
    return next((code for code in job.codes if code), errors.OK)
