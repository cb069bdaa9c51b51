"""FSDP2. Gradients are computed in one of two ways, by Accelerate's own setting `fsdp_reshard_after_forward`:

- true, a layer at a time: each is gathered for its forward and its backward pass, and its gradient is sharded after it. All
  processes have to make equally many passes (`idle` is one that counts nothing), and none can wait for one that runs out of memory
- false, within `whole`: each process computes by itself, and `add_up` reduces the gradients into the shards once all have theirs. Where one
  runs out of memory all can start again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from opd.models.passes import nothing, one_token


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
    found = units(model)
    for unit in found:
        unit.set_reshard_after_forward(False, recurse=False)
    gather(model)
    try:
        yield
    finally:
        for unit in found:
            unit.reshard()
        for layer in found[1:]:  # the first is the model itself, with the output head: the loss reads it behind the layers
            layer.set_reshard_after_forward(True, recurse=False)


def shard(layers: Sequence[nn.Module]) -> None:
    """Shard each of the layers, which are never trained, over all processes."""
    for layer in layers:
        fully_shard(layer)


def settle(policy: nn.Module, layerwise: bool) -> None:
    """Make a model that was just sharded compute as it is; all processes together. layerwise: its gradients, a layer at a time.

    The first forward pass decides which module is FSDP's root: it has to be that of the whole.
    """
    root = units(policy)[0]
    root.set_reshard_after_backward(layerwise)
    root.set_reduce_scatter_unused_params(True)  # a weight that one process's tokens need not may be another's, in a mixture of experts
    for unit in units(policy):
        unit.set_force_sum_reduction_for_comms(True)  # losses are divided by one global count; gloo has no mean either
        unit.set_gradient_divide_factor(1.0)
    with torch.no_grad(), whole(policy):
        policy(one_token(policy), lambda hidden_NH, head: None)


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

    FSDP reduces in a backward pass.
    """
    if units(policy):
        nothing(policy).backward()


def check_settings(settings: Any) -> str | None:
    """What of Accelerate's FSDP plugin does not work here, with the remedy; None where all does."""
    if settings.fsdp_version != 2:
        return "fsdp_version: 1 is not supported; set fsdp_version: 2 in the Accelerate config"
    if isinstance(settings.cpu_offload, torch.distributed.fsdp.CPUOffloadPolicy):
        return "fsdp_offload_params: true is not supported; set it to false"
    return None
