"""Weights that are sharded over processes (FSDP2): gathered while something computes with them, sharded again behind it.

At rest a process holds its shards of weights and optimizer state. Sampling, evaluation and the teacher's scores wait for no other process:
`whole` gathers all weights for them. Gradients are computed in one of two ways, by Accelerate's own setting `fsdp_reshard_after_forward`:

- true, a layer at a time: each is gathered for its forward and its backward pass, behind which its gradient goes into the shards. All
  processes have to make equally many passes: `idle` is one that counts nothing. One of them that runs out of memory cannot be waited for.
- false, within `whole`: each process computes by itself, and `add_up` reduces the gradients into the shards once all have theirs. Where one
  runs out of memory all can start again.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from opd.data.rollouts import Inputs

DTYPES = {  # the names that safetensors has for them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
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

    FSDP reduces in a backward pass.
    """
    if units(policy):
        idle(policy)


def idle(policy: nn.Module) -> None:
    """A forward and a backward pass of a token that counts nothing."""
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


def write_full(
    tensors: Mapping[str, Tensor], file: Path | None, values: Iterable[Tensor] | None = None, dtype: torch.dtype | None = None
) -> OSError | None:
    """Write all of `tensors` in full as safetensors, without ever holding more than one; all processes together, those without a file
    for the others' sake. Returns what kept it from being written.

    values: what is written in place of each, made as it is asked for, whole and of the same shape. dtype: of all that is written.
    """
    header = {}
    end = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        begin, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream, failure = None, None
    with ExitStack() as stack:
        try:
            if file is not None:
                stream = stack.enter_context(file.open("wb"))
                stream.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            failure = error
        for value in map(full, tensors.values()) if values is None else values:
            try:
                if stream is not None and failure is None:
                    stream.write(value.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
            except OSError as error:
                failure = error
    return failure


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
