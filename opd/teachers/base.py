"""The protocol of a teacher."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opd.data.rollouts import Inputs, Rollout
from opd.objective import TeacherStates, TeacherTop
from opd.objective.head import TokenStats


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with the log-probs of its trained tokens, of spans with another tokenizer, in nats at temperature 1.

    Args:
        rollout: With at least one trained token.
        teacher_logp: The served teacher's.
        logp: The student's, before it learned from them.
    """

    rollout: Rollout
    teacher_logp: list[float]
    logp: list[float]


class Teacher(Protocol):
    """Scores tokens. Never trained, never saved."""

    def logp(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> Tensor:
        """Return the log-probs (N,), in nats at the temperature, of the trained tokens `ids_N` of the sequences."""
        ...

    def columns(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> TokenStats:
        """Return the log-probs as `teacher_logp` and, where its vocabulary overlaps the student's, what `masked_stats` returns."""
        ...

    def states(self, inputs: Inputs) -> TeacherStates:
        """Return final hidden states (N, H) and output head, for objectives that need whole distributions."""
        ...

    def top(self, inputs: Inputs) -> TeacherStates | TeacherTop:
        """Return what `ppo.estimator=topk` needs: the states, or the `ppo.k` most probable ids."""
        ...

    def expect(self, rollouts: Sequence[Rollout]) -> None:
        """Begin to score rollouts that will be asked for, where that does not keep this process from its work."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Let its model compute as the teacher for the block, also when a sampler uses it."""
        ...

    def check(self) -> None:
        """Raise `EngineError` where it is no longer the teacher that the run began with. In the main process only."""
        ...

    def check_scores(self, scored: Sequence[Scored]) -> None:
        """Raise `EngineError` where a second try, or its weights, score the run's first batch otherwise. In the main process only."""
        ...

    def ready(self) -> AbstractContextManager[None]:
        """Make the teacher answer without collectives for the block. All processes enter."""
        ...
