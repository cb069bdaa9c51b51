"""Tensors that are sharded over processes, in full: put together, written to a file one after the other, and shared out again."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

DTYPES = {  # the names that safetensors has for them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of which each process holds a part, in whatever way. assemble, put: all processes have to call them together.

    assemble: returns it in full, a copy. put: takes over what a full one holds.
    """

    shape: torch.Size
    dtype: torch.dtype
    assemble: Callable[[], Tensor]
    put: Callable[[Tensor], None]

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize


Held = Tensor | Part


def full(tensor: Held) -> Tensor:
    """The tensor put together from its shards, which all processes have to ask for; one that is not sharded as it is."""
    if isinstance(tensor, Part):
        return tensor.assemble()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Held], keep: bool) -> dict[str, Tensor]:
    """All of `tensors` in full, one after the other, on the CPU where they are sharded; empty unless `keep`."""
    found = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if keep:
            found[name] = value.cpu() if isinstance(tensor, DTensor | Part) else value
    return found


def write_full(tensors: Mapping[str, Held], file: Path | None) -> OSError | None:
    """Write all of `tensors` in full as safetensors, without ever holding more than one; all processes together, those without a file
    for the others' sake. Returns what kept it from being written.
    """
    header = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
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
        for tensor in tensors.values():
            value = full(tensor)
            try:
                if stream is not None and failure is None:
                    stream.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            except OSError as error:
                failure = error
    return failure


def like(value: Tensor, model: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded as `model` is. Talks to no other process."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


@torch.no_grad()
def put(tensor: Held, value: Tensor) -> None:
    """Let `tensor` hold what `value`, which every process has in full, does; all processes together."""
    if isinstance(tensor, Part):
        tensor.put(value)
    else:
        tensor.copy_(like(value, tensor))
