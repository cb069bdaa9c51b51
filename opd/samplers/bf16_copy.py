"""A bf16 copy of a model's weights for the time it samples.

It reads half the bytes, which is what decoding waits for, and needs no autocast. The difference in rounding shows in `engine_gap`, and the
importance weight corrects it.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd.objective import Head

ROWS = 8  # rows of a decoding batch that the packed layout is chosen for; any other number gives the same products


class PackedLinear(nn.Linear):
    """A linear layer on a CPU with its weights in the layout of the matrix kernels: converting them costs as much as a product."""

    packed: Tensor | None = None

    def pack(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, ROWS)
        self.weight.data = self.weight.data.new_empty(0)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        return product


class Bf16Copy:
    """`with copy as model:` yields a copy of `source` in bf16 with its current weights; outside of it the copy takes no memory on a CPU.

    Tied weights stay tied; buffers, such as rotary frequencies, keep their dtype.
    """

    def __init__(self, source: PreTrainedModel) -> None:
        self.source = source
        # deepcopy takes these for copies that it has already made
        empty: dict[int, object] = {
            id(weight): nn.Parameter(torch.empty(0, dtype=torch.bfloat16, device=weight.device), requires_grad=False)
            for weight in source.parameters()
        }
        self.model: PreTrainedModel = copy.deepcopy(source, empty).eval()
        head = self.model.get_output_embeddings()  # read as a matrix, and maybe tied to the embedding
        self.packed: list[PackedLinear] = []
        self.packed_head: PackedLinear | None = None
        if source.device.type == "cpu" and can_pack():
            for module in self.model.modules():
                if type(module) is nn.Linear and module is not head:
                    module.__class__ = PackedLinear
            self.packed = [module for module in self.model.modules() if isinstance(module, PackedLinear)]
            self.packed_head = PackedLinear(1, 1, bias=False, device="meta") if isinstance(head, nn.Linear) else None

    def __enter__(self) -> PreTrainedModel:
        for target, weight in zip(self.model.parameters(), self.source.parameters(), strict=True):
            if target.numel():
                target.data.copy_(weight.detach())
            else:
                target.data = weight.detach().to(torch.bfloat16)
        for layer in self.packed:
            layer.pack()
        return self.model

    def __exit__(self, *error: object) -> None:
        for weight in self.model.parameters():
            if not weight.is_cuda:  # a captured decode step needs the addresses
                weight.data = weight.data.new_empty(0)
        for layer in (*self.packed, self.packed_head):
            if layer is not None:
                layer.packed = None

    def head(self, head: Head) -> Head:
        """Return the copy's output head with packed weights, where the CPU has them; packed at the first call within `with`."""
        if self.packed_head is None:
            return head
        if self.packed_head.packed is None:
            layer = self.model.get_output_embeddings()
            self.packed_head.weight, self.packed_head.bias = nn.Parameter(layer.weight.data, requires_grad=False), layer.bias
            self.packed_head.pack()
        return replace(head, product=self.packed_head)


def can_pack() -> bool:
    """Return whether this torch has the private kernels of its own compiler."""
    kernels = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in kernels)
