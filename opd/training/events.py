"""What happens in a run: the loop yields it, and the runner writes it down, shows it, and passes it on to callbacks."""

from dataclasses import dataclass

from opd.training.evaluation import Evaluation
from opd.training.metrics import Alternatives, ByPosition
from opd.training.tokens import Tokens


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step with its metrics.

    Args:
        alternatives: The teacher's most probable tokens for the rollouts that are stored, in some steps.
    """

    step: int
    metrics: dict[str, float]
    by_position: ByPosition
    tokens: Tokens
    alternatives: Alternatives


@dataclass(frozen=True, slots=True)
class Evaluated:
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    step: int


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run continues after `step`, with the weights of that time, and without the samples at the positions `left_out`."""

    step: int
    left_out: list[int]


Event = StepDone | Evaluated | Saved | Rewound
