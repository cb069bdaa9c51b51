"""A round in micro-batches that fit the memory, with what the teacher says of each.

How rollouts are cut decides nothing that is learnt, so that it may change whenever memory runs out. All processes change it together.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from opd.config.schema import Config
from opd.data.rollouts import MicroBatch, Rollout, micro_batches
from opd.models.policy import padding_limit, release_memory
from opd.models.together import any_process
from opd.teachers import Teacher
from opd.training.learning import Scores, score
from opd.training.round import Round

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Batches:
    """choices: what was measured, as checkpoints keep it; with `max_tokens` of a micro-batch, halved where memory does not suffice.

    teacher_ready: within it, which all processes enter together, the teacher answers.
    """

    config: Config
    accelerator: Accelerator
    teacher: Teacher
    pad_id: int
    packed: bool
    choices: dict[str, Any]
    teacher_ready: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def max_tokens(self) -> int:
        return int(self.choices["max_tokens"])

    def split(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        return micro_batches(rollouts, self.max_tokens, self.pad_id, self.packed, padding_limit(self.accelerator.device))

    def score(self, current: Round) -> None:
        """Cut micro-batches and let the teacher score them; what it said of tokens before stands. All processes together."""
        with self.teacher_ready():
            current.parts = self.fitting(current, lambda: self.scored(current))
        said = [scores.logp_N for _, scores in current.parts if scores.logp_N is not None]
        if current.teacher_logp_N is None and said:
            current.teacher_logp_N = current.in_order(said)

    def scored(self, current: Round) -> list[tuple[MicroBatch, Scores]]:
        """The micro-batches with what the teacher, which has to be ready, says of each."""
        parts = []
        for batch in self.split(current.learnt):
            batch = batch.to(self.accelerator.device)
            bonus_N = None if current.bonus is None else current.bonus[batch.sequence_N]
            known_N = None if current.teacher_logp_N is None else current.teacher_logp_N[current.places(batch)]
            parts.append((batch, score(self.teacher, batch, self.config, bonus_N, known_N)))
        return parts

    def fitting(self, current: Round, work: Callable[[], T], again: Callable[[], None] = lambda: None) -> T:
        """What `work` on the round's micro-batches returns; while any process lacks the memory for it, all halve them and try again.

        `work` waits for no other process; `again`, which comes before it is tried once more, may.
        """
        while True:
            done: list[T] = []
            complaint = ""
            try:
                done.append(work())
            except torch.OutOfMemoryError as error:
                complaint = str(error).splitlines()[0]
            if not any_process(self.accelerator, not done):
                return done[0]
            current.parts = []
            again()
            release_memory(self.accelerator.device)
            self.halve(current, complaint)

    def halve(self, current: Round, complaint: str) -> None:
        """Raises OutOfMemoryError in all processes where every micro-batch is a single rollout already."""
        longest = max(rollout.length for rollout in current.learnt)
        if not any_process(self.accelerator, self.max_tokens > longest):
            raise torch.OutOfMemoryError(complaint or "another process of the run ran out of memory")
        self.choices["max_tokens"] = self.max_tokens // 2
        log.warning("out of memory%s: from here on micro-batches of %d tokens", complaint and f" ({complaint})", self.max_tokens)
