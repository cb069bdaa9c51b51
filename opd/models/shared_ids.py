"""The token ids that student and teacher share."""

from dataclasses import dataclass

from torch import Tensor

from opd.models.overlap import Overlap


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

    @property
    def teacher_vocabulary(self) -> int:
        return self.vocabulary if self.of_teacher is None else self.of_teacher
