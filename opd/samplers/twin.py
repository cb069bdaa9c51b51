"""A bf16 copy of a model that follows its weights, for sampling.

It reads half the bytes, which is what decoding waits for, and needs no autocast. What it rounds differently shows in `engine_gap`, and the
importance weight makes up for it.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


class Twin:
    """`source`'s copy in bf16. Tied weights stay tied; buffers, such as rotary frequencies, keep their dtype."""

    def __init__(self, source: PreTrainedModel) -> None:
        self.source = source
        # deepcopy takes these for copies that it has made already: float32 weights are never there twice
        memo: dict[int, object] = {
            id(weight): nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False) for weight in source.parameters()
        }
        self.copy: PreTrainedModel = copy.deepcopy(source, memo).eval()
        self.stale = False

    def up_to_date(self) -> PreTrainedModel:
        """The copy, with the weights that `source` has now if it was called stale."""
        if self.stale:
            with torch.no_grad():
                for mine, theirs in zip(self.copy.parameters(), self.source.parameters(), strict=True):
                    mine.copy_(theirs)
            self.stale = False
        return self.copy
