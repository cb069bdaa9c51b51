"""What every sampler takes and gives."""

from collections.abc import Sequence
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


class Sampler(Protocol):
    """Writes completions. `stream` keeps random numbers of different uses (training, evaluation) apart."""

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """One rollout for each request, in their order. Raises `Preempted`, between decode steps, when this process is asked to stop."""
        ...

    def refresh(self) -> None:
        """The model's weights changed."""
        ...
