"""The tensors of a checkpoint: taken from student and optimizer, and restored bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from opd.errors import OutputError
from opd.models.distributed import gather_tensors, shard_like
from opd.models.masters import MasterWeights
from opd.training.checkpoint import FORMAT, MODEL, OPTIMIZER, Checkpoint, Snapshot


def snapshot(
    weights: dict[str, Tensor],
    optimizer: Optimizer,
    state: dict[str, Any],
    tables: Mapping[str, dict[str, Tensor] | None] | None = None,
    keep: bool = True,
) -> Snapshot:
    """Return the current state to save; tensors are those in use, not copies. Sharded ones are gathered, which is collective.

    Args:
        weights: As `model_tensors` returns them.
        state: With `step` and `inner`.
        tables: Further tensors by file name; those that are None have no file.
        keep: Whether this process needs the gathered tensors.
    """
    files = {name: gather_tensors(tensors, keep) for name, tensors in ((MODEL, weights), (OPTIMIZER, optimizer_tensors(optimizer)))}
    files |= {name: table for name, table in (tables or {}).items() if table is not None}
    return Snapshot(files, {**state, "format": FORMAT})


def model_tensors(model: nn.Module, masters: MasterWeights | None = None) -> dict[str, Tensor]:
    """Return trained parameters, or their float32 masters, and saved buffers; a tied one appears once."""
    persistent = model.state_dict().keys()
    return {**trained_tensors(model, masters), **{name: buffer for name, buffer in model.named_buffers() if name in persistent}}


def trained_tensors(model: nn.Module, masters: MasterWeights | None = None) -> dict[str, Tensor]:
    """Return trained parameters, or their float32 masters; a tied one appears once."""
    named = model.named_parameters() if masters is None else masters.named_parameters()
    return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by `<parameter number>.<name>`, sorted, so that a resumed run writes the same files."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, entries in sorted(state.items()) for name, tensor in sorted(flat(entries).items())}


def flat(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a parameter's state as tensors: bitsandbytes has some in a dictionary of its own, and counts steps with an int."""
    tensors: dict[str, Tensor] = {}
    for name, value in entries.items():
        # All parameters share one table of 256 codes, and safetensors stores no memory twice.
        is_shared = name in ("qmap1", "qmap2")
        tensors |= flat(value) if isinstance(value, dict) else {name: value.clone() if is_shared else torch.as_tensor(value)}
    return tensors


def restore(checkpoint: Checkpoint, weights: dict[str, Tensor], optimizer: Optimizer) -> None:
    """Restore weights and optimizer bit for bit, without holding more than one tensor of the file."""
    restore_weights(checkpoint, weights)
    file = checkpoint.path / OPTIMIZER
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key in tensor_names(file):
        number, _, name = key.partition(".")
        parameter, tensor = parameters[int(number)], stored_tensor(file, key)
        value = shard_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        is_count = tensor.ndim == 0 and not tensor.is_floating_point()  # AdamW's own count is a float
        state.setdefault(int(number), {})[name] = tensor.item() if is_count else value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def restore_weights(checkpoint: Checkpoint, tensors: dict[str, Tensor], of: str = MODEL) -> None:
    """Copy the weights of the file `MODEL` or `AVERAGE` into `tensors`. Raises `OutputError` where they are another model's."""
    file = checkpoint.path / of
    if tensor_names(file) != tensors.keys():
        raise OutputError(f"{checkpoint.path}: contains the weights of another model")
    for name, tensor in tensors.items():
        tensor.copy_(shard_like(stored_tensor(file, name), tensor))


def tensor_names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def stored_tensor(file: Path, name: str) -> Tensor:
    """Return a tensor that is memory-mapped; copy it if you keep it.

    The file is opened for this tensor only: pages that were read count as the process's memory until it is closed.
    """
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
