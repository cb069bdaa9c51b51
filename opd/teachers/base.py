"""What every teacher takes and gives."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opd.data.rollouts import MicroBatch
from opd.objective import Head


@dataclass(frozen=True, slots=True)
class Scores:
    """What the teacher knows of a micro-batch's N kept tokens.

    logp_N: its log-prob of each at the sampling temperature. hidden_NH and head: its final hidden states and output layer, from which whole
    distributions are made chunk by chunk; None for a teacher that gives only log-probs.
    """

    logp_N: Tensor | None = None
    hidden_NH: Tensor | None = None
    head: Head | None = None


class Teacher(Protocol):
    """Scores tokens. Never trained, never saved."""

    def score(self, batch: MicroBatch, temperature: float) -> Scores:
        """The log-probs of the kept tokens at the temperature."""
        ...

    def distributions(self, batch: MicroBatch) -> Scores:
        """Hidden states and head, for objectives that need the whole vocabulary."""
        ...
