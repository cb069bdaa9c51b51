"""`launch.processes` and `launch.config_file`: run in several processes, which Accelerate's launcher starts.

`run` is called in the process of `opd train`. It starts this module as a child process with the same overrides, forwards signals to it, and
ends with its exit code. The child (`main`) starts the workers from a thread, while its main thread forwards signals to them. A sweep
composes its members in the parent and launches each of them, so that a sweeper proposes once per member, not once per process.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml
from hydra.core.hydra_config import HydraConfig

from opd import signals
from opd.config.files import local_path, missing
from opd.config.options import Device, LaunchConfig
from opd.config.schema import Config
from opd.errors import DATA, ENGINE, INTERNAL, INTERRUPTED, NUMERIC, OK, OUTPUT, PREEMPTED, USAGE, ConfigError, LaunchedRunFailed, OpdError
from opd.runs.folder import SUMMARY
from opd.runs.outcome import objective

OF_THE_SWEEP = ("hydra.mode", "hydra.run.dir", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper")
REASONS = (USAGE, DATA, OUTPUT, ENGINE, NUMERIC, INTERRUPTED)  # exit codes that never follow from the failure of another worker


def is_requested(config: Config) -> bool:
    """Return whether to start workers; a worker never starts others."""
    return config.launch.several and not signals.is_worker()


def run(config: Config, folder: Path) -> float | None:
    """Run in several processes and return the objective for sweepers.

    Raises:
        ConfigError: `launch.config_file` cannot be used.
        LaunchedRunFailed: The run failed or was asked to stop, and its processes have reported why.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        signals.received.add(number)
        child.send_signal(number)

    with tempfile.TemporaryDirectory(prefix="opd-launch-") as place:
        content = read_config_file(config.launch)
        words = [config.device.value, *launch_arguments(config.launch, content, place), "-m", "opd.train", *overrides(folder)]
        processes = config.launch.processes or content.get("num_processes", "several")
        if content.get("machine_rank", 0) == 0:  # of several nodes one prints
            with suppress(OSError):  # a closed terminal or pipe ends no run
                print(f"starting {processes} {'process' if processes == 1 else 'processes'}", flush=True)  # which import for seconds
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.ASKING)  # inherited by child and workers, until they can handle the signals
        try:
            # In a session of its own, or Ctrl-C in the terminal would reach it twice.
            child = subprocess.Popen([sys.executable, "-m", "opd.cli.launch", *words], start_new_session=True)
            with signals.handled(forward):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ASKING)
                code = child.wait()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ASKING)
    if code < 0:
        raise OpdError(f"the launcher of the run's processes was killed by {signal.Signals(-code).name}")
    if code != OK:
        raise LaunchedRunFailed(code)
    summary = folder / SUMMARY  # only the first node has it
    return objective(config.sweep, json.loads(summary.read_text())) if summary.is_file() else None


def read_config_file(launch: LaunchConfig) -> dict[str, Any]:
    """Return the content of Accelerate's config file, empty without one. Raises `ConfigError` where it cannot be used."""
    if launch.config_file is None:
        return {}
    file = local_path(launch.config_file)
    try:
        content = dict(yaml.safe_load(file.read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) if file.exists() else missing(file, "file")
        raise ConfigError(f"launch.config_file={file}: {reason}; use one from scripts/accelerate/ or `accelerate config`") from None
    if content.get("distributed_type") == "DEEPSPEED":
        raise ConfigError(f"launch.config_file={file}: DeepSpeed is not supported; use FSDP2, as in scripts/accelerate/fsdp2_gpu8.yaml")
    return content


def launch_arguments(launch: LaunchConfig, content: Mapping[str, Any], place: str) -> list[str]:
    """Return the arguments of `accelerate launch`.

    Args:
        content: Of the config file. Without one, `launch_workers` writes one in the folder `place`.
    """
    file = f"{place}/accelerate.yaml" if launch.config_file is None else str(local_path(launch.config_file))
    arguments = ["--config_file", file]
    if launch.processes is not None:
        arguments += ["--num_processes", str(launch.processes)]
    if not content.get("main_process_port") and content.get("num_machines", 1) == 1:
        arguments += ["--main_process_port", "0"]  # a free one: two runs on one machine must not share a port
    return arguments


def overrides(folder: Path) -> list[str]:
    """Return the command line with which each worker composes the current config, for the run folder `folder`."""
    hydra = HydraConfig.get()
    config_dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    quoted_folder = str(folder).replace("'", "\\'")
    return [
        *(word for path in config_dirs for word in ("--config-dir", path)),
        *("--config-name", str(hydra.job.config_name)),
        *hydra.overrides.task,
        *(word for word in hydra.overrides.hydra if not word.lstrip("+~").startswith(OF_THE_SWEEP)),
        f"hydra.run.dir='{quoted_folder}'",
    ]


def main(argv: Sequence[str]) -> int:
    """Start the workers and return the exit code of the run. `argv`: the device, and the arguments of `accelerate launch`."""
    signals.die_with_parent(signal.SIGTERM)
    # torch elastic installs signal handlers in a main thread only; its own would leave the workers 30 seconds to save.
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(launch_workers, Device[argv[0]], argv[1:])
        with signals.handled(forward_to_workers):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ASKING)
            return code.result()


def forward_to_workers(number: int, frame: FrameType | None) -> None:
    workers = psutil.Process().children()
    if not workers:  # before the first of them is started, nothing is to be saved
        os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def launch_workers(device: Device, arguments: Sequence[str]) -> int:
    """Call `accelerate launch` and return the exit code of the run."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    parsed = launch_command_parser().parse_args(arguments)
    file, processes = Path(parsed.config_file), parsed.num_processes
    option = f"launch.config_file={file}" if file.exists() else f"launch.processes={processes}"
    if not file.exists():
        gpus = torch.cuda.device_count()
        on_cpu = device is Device.cpu or (device is Device.auto and not torch.cuda.is_available())
        if not on_cpu and processes > gpus:
            fewer = f"launch.processes={gpus} or " if gpus else ""
            print(f"opd: error: {option}: torch sees {gpus} GPUs here; use {fewer}device=cpu", file=sys.stderr)
            return USAGE
        content = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": on_cpu, "num_machines": 1}
        file.write_text(yaml.safe_dump({**content, "num_processes": processes, "machine_rank": 0, "mixed_precision": "no"}))
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode))
        return exit_code({rank: failure.exitcode for rank, failure in failures})
    except subprocess.CalledProcessError as error:  # a single process is started without torch elastic
        return exit_code({0: error.returncode})
    except Exception as error:  # noqa: BLE001 - Accelerate rejects a config with many kinds of exceptions
        print(f"opd: error: {option}: Accelerate cannot start this: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    return OK


def exit_code(failures: Mapping[int, int]) -> int:
    """Return the exit code of a run whose workers failed.

    Args:
        failures: Exit codes by rank, the first failure first. Negative: the number of the signal that ended a worker.
    """
    by_signal = {-number: INTERRUPTED if number == signal.SIGINT else PREEMPTED for number in signals.ASKING}
    codes = {rank: by_signal.get(code, code) for rank, code in failures.items()}
    # When a worker fails, the others lose a peer (70) or are asked to stop (75): any other code is the reason.
    reason = next((code for code in codes.values() if code in REASONS), None)
    rank, code = next(((rank, code) for rank, code in codes.items() if code != PREEMPTED), (0, PREEMPTED))
    if reason is None and code < 0:
        hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
        print(f"opd: error: process {rank} of the run was killed by {signal.Signals(-code).name}{hint}", file=sys.stderr, flush=True)
    return reason or (PREEMPTED if code == PREEMPTED else INTERNAL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
