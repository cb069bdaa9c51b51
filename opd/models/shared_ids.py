"""The token ids that student and teacher share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd.models.overlap import Overlap, end_ids

Pairs = Sequence[tuple[PreTrainedTokenizerBase, Sequence[int]]]


@dataclass(frozen=True, slots=True)
class SharedIds:
    """The ids of student and teacher.

    Args:
        vocabulary: Both heads have the ids below it.
        overlap: What the vocabularies share, where each has tokens of its own.
        masked: With an overlap, the ids below `vocabulary` that only one of them has.
        ends: With an overlap, the ids that end a completion of either; None where each has its own.
        of_teacher: How many ids a teacher with another tokenizer has, which shares none.
    """

    vocabulary: int
    overlap: Overlap | None = None
    masked: Tensor | None = None
    ends: tuple[int, ...] | None = None
    of_teacher: int | None = None

    @classmethod
    def of(cls, vocabulary: int, overlap: Overlap | None, pairs: Pairs, kwargs: Mapping[str, Any], device: torch.device) -> "SharedIds":
        """Return those of models with the same ids, or with overlapping ones; other arguments as in `end_ids`."""
        if overlap is None:
            return cls(vocabulary)
        return cls(vocabulary, overlap, overlap.masked(vocabulary).to(device), end_ids(overlap, pairs, kwargs))

    @property
    def teacher_vocabulary(self) -> int:
        return self.vocabulary if self.of_teacher is None else self.of_teacher
