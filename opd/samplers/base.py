"""What every sampler takes and gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd.data.rollouts import Request, Rollout


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode: exactly this, nothing from the model's generation_config. temperature 0 takes the most probable token."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64


Lead = Callable[[Callable[[], None]], object]
"""Lets one process of a run do something, and the others wait for it and raise what it raises."""


def by_itself(work: Callable[[], None]) -> None:
    """The `Lead` of a process that is the only one."""
    work()


class Sampler(Protocol):
    """Writes completions. `stream` keeps random numbers of different uses (training, evaluation) apart."""

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """One rollout for each request, in their order. Raises `Preempted`, between decode steps, when this process is asked to stop."""
        ...

    def refresh(self) -> None:
        """The model's weights changed."""
        ...

    def sync_weights(self, lead: Lead = by_itself) -> None:
        """Have the weights of now before `sample`, if it samples with others than the model's own. All processes of a run together."""
        ...
