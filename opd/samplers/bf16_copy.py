"""A bf16 copy of a model's weights, for as long as it samples.

It reads half the bytes, which is what decoding waits for, and needs no autocast. What it rounds differently shows in `engine_gap`, and the
importance weight makes up for it.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd.objective import Head

# Any number of rows gives the same products; the layout is chosen for this many, about a batch that is decoded.
ROWS = 8


class PackedLinear(nn.Linear):
    """A linear layer on a CPU, its weights laid out as matrix kernels read them: for few rows that costs as much as the product."""

    packed: Tensor | None = None

    def pack(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data, ROWS)
        self.weight.data = self.weight.data.new_empty(0)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        return product


class Twin:
    """`with twin as model:` gives `source`'s copy in bf16 with the weights of now; afterwards it holds none, which training has room for.

    Tied weights stay tied; buffers, such as rotary frequencies, keep their dtype.
    """

    def __init__(self, source: PreTrainedModel) -> None:
        self.source = source
        # deepcopy takes these for copies that it has made already
        empty: dict[int, object] = {
            id(weight): nn.Parameter(torch.empty(0, dtype=torch.bfloat16, device=weight.device), requires_grad=False)
            for weight in source.parameters()
        }
        self.copy: PreTrainedModel = copy.deepcopy(source, empty).eval()
        head = self.copy.get_output_embeddings()  # is read as a matrix, and may be the embedding too
        linear = [module for module in self.copy.modules() if type(module) is nn.Linear and module is not head]
        self.packed: list[PackedLinear] = []
        self.packed_head: PackedLinear | None = None
        if source.device.type == "cpu" and can_pack():
            for module in linear:
                module.__class__ = PackedLinear
            self.packed = [module for module in self.copy.modules() if isinstance(module, PackedLinear)]
            self.packed_head = PackedLinear(1, 1, bias=False, device="meta") if isinstance(head, nn.Linear) else None

    def __enter__(self) -> PreTrainedModel:
        for mine, theirs in zip(self.copy.parameters(), self.source.parameters(), strict=True):
            mine.data = theirs.detach().to(torch.bfloat16)
        for layer in self.packed:
            layer.pack()
        return self.copy

    def head(self, head: Head) -> Head:
        """The copy's output layer as it is quickest here. Within `with`, at whose first call it is packed: not every engine asks."""
        if self.packed_head is None:
            return head
        if self.packed_head.packed is None:
            layer = self.copy.get_output_embeddings()
            self.packed_head.weight, self.packed_head.bias = nn.Parameter(layer.weight.data, requires_grad=False), layer.bias
            self.packed_head.pack()
        return replace(head, product=self.packed_head)

    def __exit__(self, *error: object) -> None:
        for mine in self.copy.parameters():
            mine.data = mine.data.new_empty(0)
        for layer in (*self.packed, self.packed_head):
            if layer is not None:
                layer.packed = None


def can_pack() -> bool:
    """Whether this torch has the kernels; they are those of its own compiler, and not promised to stay."""
    kernels = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in kernels)
