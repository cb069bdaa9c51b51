"""`launch.processes`: this process starts `accelerate launch` with its own overrides, passes signals on, and ends as the run does.

In a sweep it composes all members and starts a launcher for each: a sweeper proposes once a member, not once a process.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig

from opd import signals
from opd.cli import launched
from opd.config.schema import Config
from opd.errors import INTERNAL, INTERRUPTED, OK, PREEMPTED, ConfigError, LaunchedRunFailed
from opd.runs.outcome import objective

OF_THE_SWEEP = ("hydra.mode", "hydra.run.dir", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper")


def wanted(config: Config) -> bool:
    """Whether processes are to be started: not by those that a launcher started."""
    return config.launch.several and not any(name in os.environ for name in signals.LAUNCHED)


def run(config: Config, folder: Path) -> float | None:
    """Run in processes of its own and return the objective for sweepers. Raises `LaunchedRunFailed` when the run did not end well."""
    file = config.launch.config_file
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"launch.config_file={file}: there is no such file; scripts/accelerate/ has some, `accelerate config` writes one")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="opd-launch-") as place:
        code = started(command(config, folder), Path(place))
    if code != OK:
        raise LaunchedRunFailed(code)
    summary = folder / "summary.json"
    return objective(config.sweep, json.loads(summary.read_text())) if summary.is_file() else None  # the first node has it


def command(config: Config, folder: Path) -> list[str]:
    """The launcher's command line: how many processes, on what, by which file, and what each is to run."""
    launch = config.launch
    return [
        *(sys.executable, "-m", "opd.cli.launcher", str(launch.processes or ""), config.device.value, launch.config_file or ""),
        *("-m", "opd.train", *words(folder)),
    ]


def words(folder: Path) -> list[str]:
    """The overrides that compose in every process what was composed here, for the run folder `folder`."""
    hydra = HydraConfig.get()
    own = [path.path for path in hydra.runtime.config_sources if path.provider == "command-line"]
    return [
        *(word for path in own for word in ("--config-dir", path)),
        *("--config-name", str(hydra.job.config_name)),
        *hydra.overrides.task,
        *(word for word in hydra.overrides.hydra if not word.lstrip("+~").startswith(OF_THE_SWEEP)),
        f"hydra.run.dir={quoted(str(folder))}",
    ]


def quoted(text: str) -> str:
    """A value as Hydra reads it, whatever characters it has."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def started(words: Sequence[str], folder: Path) -> int:
    """Run the launcher until it ends, and return the exit code of the run. folder: where its processes leave theirs."""
    asked: list[int] = []
    environment = {**os.environ, launched.FOLDER: str(folder)}
    # Out of the terminal's reach: a Ctrl-C comes here, and from here once to each process.
    launcher = subprocess.Popen(words, env=environment, start_new_session=True)
    with passed_on(launcher, folder, asked):
        returned = launcher.wait()
    return outcome(returned, launched.processes(folder), asked)


@contextmanager
def passed_on(launcher: "subprocess.Popen[bytes]", folder: Path, asked: list[int]) -> Iterator[None]:
    """Within it the signals that ask a run to stop go to its processes, or, before there are any, to the launcher; `asked` notes them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signals.seen.add(number)
        running = [process.pid for process in launched.processes(folder) if process.code is None]
        for pid in running or [launcher.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, number if running else signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in signals.ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(returned: int, processes: Sequence[launched.Process], asked: Sequence[int]) -> int:
    """The exit code of a run: that of the process that failed first. returned: the launcher's; asked: the signals that were passed on.

    The others of a run that failed were told to stop and say so: theirs counts only if none has another.
    """
    if returned == OK:
        return OK
    failed = [process.code for process in processes if process.code not in (None, OK, PREEMPTED)]
    if failed:
        return int(failed[0] or INTERNAL)
    if asked and (not processes or any(process.code is None for process in processes)):
        return INTERRUPTED if asked[0] == signal.SIGINT else PREEMPTED
    gone = [process.number for process in processes if process.code is None]
    if gone:
        print(f"opd: error: process {gone[0]} of the run was killed, by lack of memory perhaps", file=sys.stderr, flush=True)
        return INTERNAL
    if processes:
        return PREEMPTED
    return returned if returned > 1 else INTERNAL
