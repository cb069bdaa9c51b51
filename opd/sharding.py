"""Weights that are sharded over processes (FSDP2): gathered while something computes with them, sharded again behind it.

Processes write completions of different lengths and cut them into different numbers of micro-batches, and any of them may run out of
memory in the middle. So nothing here communicates inside a forward or backward pass: `whole` gathers once, each process computes by itself,
and `add_up` reduces the gradients into the shards once all have theirs. At rest a process holds its shards of weights and optimizer state.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from opd.data.rollouts import Inputs

NO_DEEPSPEED = (
    "DeepSpeed is not supported: to shard weights take distributed_type: FSDP with fsdp_version: 2 (scripts/accelerate/fsdp2_gpu8.yaml), "
    "else MULTI_GPU (DDP)"
)


def units(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered one by one, the model itself the first; none where nothing is sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def at_rest(model: nn.Module) -> int:
    """How many parameters this process holds while nothing computes with them."""
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in model.parameters()]
    return sum(tensor.numel() for tensor in local)


def gather(model: nn.Module) -> None:
    for unit in units(model):
        unit.unshard()


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it each process holds all weights, and computing with them waits for no other. All processes have to enter.

    Does nothing where nothing is sharded.
    """
    gather(model)
    try:
        yield
    finally:
        for unit in units(model):
            unit.reshard()


def shard(layers: Sequence[nn.Module]) -> None:
    """Shard each of the layers, which are never trained, over all processes."""
    for layer in layers:
        unit = fully_shard(layer)
        unit.set_reshard_after_forward(False)


def settle(policy: nn.Module) -> None:
    """Make a model that was just sharded compute with gathered weights as it is; all processes together.

    The first forward pass decides which module is FSDP's root: it has to be that of the whole.
    """
    root = units(policy)[0]
    root.set_reshard_after_forward(False)
    root.set_reshard_after_backward(False)
    for unit in units(policy):
        unit.set_force_sum_reduction_for_comms(True)  # losses are divided by one global count; gloo has no mean either
        unit.set_gradient_divide_factor(1.0)
    with torch.no_grad(), whole(policy):
        policy(one_token(policy), lambda hidden_NH, head: None)


def one_token(policy: nn.Module) -> Inputs:
    device = next(policy.parameters()).device
    return Inputs(torch.zeros((1, 1), dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device))


def start_again(policy: nn.Module) -> None:
    """Within `whole`: forget a pass that was broken off and the gradients so far; all processes together."""
    if not units(policy):
        return
    for parameter in policy.parameters():
        parameter.grad = None
    units(policy)[0].reset_iter_state()
    gather(policy)


def add_up(policy: nn.Module) -> None:
    """Let each process's shards have the gradients that the processes have computed within `whole`, added up.

    FSDP reduces in a backward pass: this one is of a token that counts nothing.
    """
    if units(policy):
        nothing = policy(one_token(policy), lambda hidden_NH, head: hidden_NH.sum() * 0.0 + head.weight_VH[0, 0] * 0.0)
        nothing.backward()


def full(tensor: Tensor) -> Tensor:
    """The tensor put together from its shards, which all processes have to ask for; one that is not sharded as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All of `tensors` in full, one after the other, on the CPU where they are sharded; empty unless `keep`."""
    found = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def like(value: Tensor, model: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded as `model` is. Talks to no other process."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def check_settings(settings: Any) -> str | None:
    """What of Accelerate's FSDP plugin does not work here, with the remedy; None where all does."""
    if settings.fsdp_version != 2:
        return "fsdp_version: 1 is not supported; set fsdp_version: 2 in the Accelerate config"
    if isinstance(settings.cpu_offload, torch.distributed.fsdp.CPUOffloadPolicy):
        return "fsdp_offload_params: true is not supported; set it to false"
    return None
