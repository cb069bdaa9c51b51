"""Accelerate's handle on this process: a launcher says in the environment how many there are and whether weights are sharded."""

import atexit
import os
import sys
import threading
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from opd import signals
from opd.config.options import Tracker
from opd.config.schema import Config
from opd.errors import USAGE, ConfigError, NoPeers
from opd.models import load
from opd.runs.text import one_line

OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
PATIENCE = 180.0  # seconds; launchers start all processes within a few
FSDP_FILE = "scripts/accelerate/fsdp2_gpu8.yaml"


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """Return Accelerate's handle on this process.

    Raises `ConfigError` for a device or a strategy that does not work here, `NoPeers` for a launcher's variables that are not of this run.
    """
    device = load.find_device(config.device)
    # Load full weights on every rank: Accelerate's rank-0-only loading would leave the teacher, which it does not prepare, empty elsewhere.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if launcher_asks_for("DEEPSPEED"):
        raise ConfigError(f"distributed_type: DEEPSPEED is not supported; shard with FSDP2 instead: launch.config_file={FSDP_FILE}")
    AcceleratorState._reset_state()  # the next run of a sweep may compute in another dtype
    found = ", ".join(f"{name}={os.environ[name]}" for name in OF_A_LAUNCHER if name in os.environ) or "PMI_*, OMPI_* or ACCELERATE_*"
    remedy = f"{found} in the environment says how this process was started; unset what an earlier job has left"

    def give_up() -> None:
        print(f"opd: error: launch: the run's other processes did not start within {PATIENCE:g} s; {remedy}", file=sys.stderr, flush=True)
        os._exit(USAGE)

    timer = threading.Timer(PATIENCE, give_up)  # torch waits for half an hour, deaf to signals
    timer.daemon = True
    timer.start()
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            log_with=None if config.track.tool is Tracker.none else config.track.tool.value,
            project_dir=folder,
            mixed_precision="no",  # not the environment's: `model.dtype` decides
            dynamo_backend="no",
        )
    except (ValueError, RuntimeError) as error:
        raise NoPeers(f"launch: {one_line(str(error))[:200]}; {remedy}") from error
    finally:
        timer.cancel()
    if config.launch.processes not in (None, accelerator.num_processes) and signals.is_worker():
        raise NoPeers(f"launch.processes={config.launch.processes}: this is process 1 of {accelerator.num_processes}; {remedy}")
    if device.type == "cuda":
        # cuDNN's attention makes a plan for every new shape, which takes up to a second: see scripts/bench/README.md.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if accelerator.num_processes > 1:
        atexit.register(PartialState().destroy_process_group)
    if launcher_asks_for("FSDP") and device.type == "cpu" and accelerator.num_processes > 1:
        # Accelerate takes FSDP up on GPUs only and would continue with DDP.
        accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin())
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    check_distributed_type(accelerator)
    return accelerator


def launcher_asks_for(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def check_distributed_type(accelerator: Accelerator) -> None:
    """Raise `ConfigError` for a strategy, or a setting of FSDP, that opd does not support."""
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        raise ConfigError(f"distributed_type: {kind.value} is not supported; use MULTI_GPU (DDP), or FSDP as in {FSDP_FILE}")
    if kind is not DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError("fsdp_version: 1 is not supported; set fsdp_version: 2 in the Accelerate config")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("fsdp_offload_params: true is not supported; set it to false")
    if not plugin.reshard_after_forward:
        raise ConfigError("fsdp_reshard_after_forward: false is not supported; set it to true")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()  # autocast decides the dtype, as it does without sharding
