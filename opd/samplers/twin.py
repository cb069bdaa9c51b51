"""A bf16 copy of a model's weights, for as long as it samples.

It reads half the bytes, which is what decoding waits for, and needs no autocast. What it rounds differently shows in `engine_gap`, and the
importance weight makes up for it.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


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

    def __enter__(self) -> PreTrainedModel:
        for mine, theirs in zip(self.copy.parameters(), self.source.parameters(), strict=True):
            mine.data = theirs.detach().to(torch.bfloat16)
        return self.copy

    def __exit__(self, *error: object) -> None:
        for mine in self.copy.parameters():
            mine.data = mine.data.new_empty(0)
