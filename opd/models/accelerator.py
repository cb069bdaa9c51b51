"""Accelerate, and the strategy by which the processes of a run share weights, gradients and optimizer: DDP, FSDP2 or DeepSpeed's ZeRO.

Which it is a launcher says, in the environment of each process.
"""

import atexit
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import AutocastKwargs, DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, broadcast
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import AdamW
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from opd.config.schema import Config, Tracker
from opd.errors import ConfigError
from opd.models import fsdp2, sharding, zero
from opd.models import load as models
from opd.models.policy import Policy, give_back_at_once

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def make_accelerator(config: Config, folder: Path) -> Accelerator:
    """Accelerate, whether one process runs or many. Raises `ConfigError` for a device that is not there."""
    device = models.find_device(config.device)
    deepspeed = begin_deepspeed(device) if asks_for("DEEPSPEED") else None
    # Each process loads its weights before they are sharded: the main process alone reads them otherwise, and the teacher's are no one's.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    AcceleratorState._reset_state()  # the next member of a sweep may compute in another dtype
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        # DeepSpeed would hold the weights in it as well.
        mixed_precision="bf16" if models.computes_in_bf16(config.model.dtype, device) and deepspeed is None else "no",
        deepspeed_plugins=deepspeed,
        # bf16 copies of weights that autocast would keep for a second use are used once.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        log_with=None if config.track.tool is Tracker.none else config.track.tool.value,
        project_dir=folder,
    )
    if accelerator.num_processes > 1:
        atexit.register(PartialState().destroy_process_group)
    # Accelerate takes up FSDP and DeepSpeed on GPUs alone and would go on with DDP; both work on a CPU as well.
    on_cpus = device.type == "cpu" and accelerator.num_processes > 1
    if on_cpus and asks_for("FSDP"):
        take_up(accelerator, DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin())
    if on_cpus and deepspeed is not None:
        take_up(accelerator, DistributedType.DEEPSPEED, deepspeed_plugins=deepspeed)
    if deepspeed is not None:
        unset_hf_deepspeed_config()  # transformers would shard whatever it loads
    check_strategy(config, accelerator)
    if accelerator.distributed_type in SHARDING:
        give_back_at_once()
    return accelerator


def begin_deepspeed(device: torch.device) -> DeepSpeedPlugin:
    """Accelerate's settings of it. Raises `ConfigError` where it is not installed, or cannot be had as it is asked for."""
    if not zero.is_installed():
        raise ConfigError(zero.MISSING)
    if PartialState._shared_state.get("distributed_type") is DistributedType.DEEPSPEED:
        raise ConfigError(
            "DeepSpeed serves one run of a process: start a sweep as opd train -m … launch.config_file=FILE, which launches each member"
        )
    zero.begin(device)
    try:
        return DeepSpeedPlugin()
    except ValueError as error:
        raise ConfigError(f"deepspeed_config: {' '.join(str(error).split())}") from None


def take_up(accelerator: Accelerator, strategy: DistributedType, **plugin: Any) -> None:
    accelerator.state._shared_state.update(distributed_type=strategy, **plugin)
    PartialState._shared_state["distributed_type"] = strategy


def asks_for(strategy: str) -> bool:
    """Whether `accelerate launch` was told to use it."""
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "false").lower() == "true"


def check_strategy(config: Config, accelerator: Accelerator) -> None:
    """Raises `ConfigError` for what a launcher asks for and does not work here."""
    strategy = accelerator.distributed_type
    if strategy not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, *SHARDING):
        raise ConfigError(f"{strategy.value} is not supported; use MULTI_GPU (DDP)")
    if strategy is DistributedType.FSDP:
        problem = fsdp2.check_settings(accelerator.state.fsdp_plugin)
        if problem is not None:
            raise ConfigError(problem)
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()  # autocast decides, as it does without sharding
    if strategy is DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        problem = zero.check_settings(settings)
        if problem is not None:
            raise ConfigError(problem)
        zero.configure(settings, config.optim.max_grad_norm)


def prepare(accelerator: Accelerator, policy: Policy, optimizer: AdamW, bf16: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Student and optimizer under the launcher's strategy; where that shards weights, a layer at a time."""
    if accelerator.distributed_type not in SHARDING:
        # Not wrapped in DDP: it would hold a second copy of all gradients to send them in. The trainer adds them up once a step.
        module = accelerator.prepare_model(policy, evaluation_mode=True)
        if accelerator.num_processes > 1:
            for parameter in module.parameters():
                broadcast(parameter.data)  # a caller's own modules may differ
        return module, accelerator.prepare_optimizer(optimizer)
    policy.bf16 = bf16
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    prepared = accelerator.prepare(policy, optimizer)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return sharding.ZeroPolicy(prepared[0]), sharding.ZeroOptimizer(groups, prepared[0])
    fsdp2.settle(prepared[0], layerwise(accelerator))
    return prepared[0], prepared[1]


def layerwise(accelerator: Accelerator) -> bool:
    """Whether processes compute gradients together: with DeepSpeed, and with Accelerate's `fsdp_reshard_after_forward`."""
    if accelerator.distributed_type is DistributedType.FSDP:
        return bool(accelerator.state.fsdp_plugin.reshard_after_forward)
    return accelerator.distributed_type is DistributedType.DEEPSPEED


def shards_weights(accelerator: Accelerator) -> bool:
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return accelerator.distributed_type is DistributedType.FSDP
