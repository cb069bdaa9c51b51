"""What every teacher takes and gives."""

from typing import Protocol

from torch import Tensor

from opd.data.rollouts import MicroBatch
from opd.objective import TeacherStates


class Teacher(Protocol):
    """Scores tokens. Never trained, never saved."""

    def logp(self, batch: MicroBatch, temperature: float) -> Tensor:
        """The log-probs (N,) of the kept tokens at the temperature."""
        ...

    def states(self, batch: MicroBatch) -> TeacherStates:
        """Hidden states and head, for objectives that need whole distributions."""
        ...
