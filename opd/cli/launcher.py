"""`accelerate launch` as `opd.cli.launch` starts it: `python -m opd.cli.launcher PROCESSES DEVICE CONFIG_FILE -m opd.train …`.

Without a config file it is DDP on this machine. The launcher itself shows nothing: its processes tell what happens.
"""

import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from opd import signals
from opd.config.schema import Device
from opd.errors import INTERNAL, OK, USAGE, ConfigError

FAILED = 1


def main(argv: Sequence[str]) -> int:
    """Launch and wait. Returns 0 or 1 as the processes ended, 64 or 70 where they could not be started."""
    signals.die_with_parent(signal.SIGTERM)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    processes, device, file, *command = argv
    try:
        with tempfile.TemporaryDirectory(prefix="opd-launch-") as folder:
            own = own_file(int(processes or 1), Device[device], Path(folder)) if not file else Path(file)
            arguments = ["--config_file", str(own), *free_port(own), *(["--num_processes", processes] if processes else [])]
            launch_command(launch_command_parser().parse_args([*arguments, *command]))
    except (ChildFailedError, SignalException):
        return FAILED
    except ConfigError as error:
        print(f"opd: error: {error}", file=sys.stderr)
        return USAGE
    except Exception as error:  # noqa: BLE001 - Accelerate says in many ways that it cannot read or do what a file asks for
        where = f"launch.config_file={file}" if file else "launch.processes"
        print(f"opd: error: {where}: Accelerate cannot start this: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE if file else INTERNAL
    return OK


def own_file(processes: int, device: Device, folder: Path) -> Path:
    """An Accelerate config for so many processes on this machine. Raises `ConfigError` where there are fewer GPUs."""
    on_cpu = device is Device.cpu or (device is Device.auto and not torch.cuda.is_available())
    gpus = torch.cuda.device_count()
    if not on_cpu and processes > gpus:
        raise ConfigError(f"launch.processes={processes}: torch sees {gpus} GPUs here; take launch.processes={gpus}, or device=cpu")
    content = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": on_cpu, "num_machines": 1}
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump({**content, "num_processes": processes, "machine_rank": 0, "mixed_precision": "no"}))
    return file


def free_port(file: Path) -> list[str]:
    """Arguments that let two runs on one machine talk on ports of their own, unless the file names one or has several machines.

    Raises `ConfigError` where the file asks for DeepSpeed, which is not installed.
    """
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    if content.get("distributed_type") == "DEEPSPEED":
        raise ConfigError(f"launch.config_file={file}: DEEPSPEED is not supported")
    if content.get("use_cpu"):
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it says that it looked for another
    return [] if content.get("main_process_port") or content.get("num_machines", 1) > 1 else ["--main_process_port", "0"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
