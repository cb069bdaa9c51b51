"""The protocol of a sampler, and what samplers are made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from torch import Tensor
from transformers import PreTrainedModel

from opd.config.options import SamplingConfig
from opd.data.rollouts import Request, Rollout

OnMain = Callable[[Callable[[], Any]], Any]
"""Runs something in the main process while the others wait, and returns its result, or raises its error, in all of them."""
OnDone = Callable[[Sequence[Rollout]], Sequence[Rollout]]
"""Is given rollouts as soon as they are finished, while others are still sampled, and returns those to return in their place."""


def unchanged(rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
    """The `OnDone` that does nothing."""
    return rollouts


def ignore(count: int) -> None:
    """Do nothing with a number."""


def run_here(work: Callable[[], Any]) -> Any:
    """The `OnMain` of a process that is the only one."""
    return work()


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode: exactly this, nothing from the model's generation_config. Temperature 0 takes the most probable token.

    `ended` is called, while a batch is decoded in this process, with the number of its completions that have ended.
    """

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    ended: Callable[[int], None] = field(default=ignore, compare=False, repr=False)

    @classmethod
    def of(cls, config: SamplingConfig) -> Self:
        """Return the decoding of training, and of commands that sample as training does."""
        return cls(config.temperature, config.max_new_tokens, config.top_p, config.top_k, config.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """What samplers are made from.

    Args:
        model: The student as it is trained.
        eos: Ids that end a completion.
        pad_id: Id of padding.
        vocabulary: Only ids below it are drawn.
        masked: As in `Head`: of these, ids that are not drawn.
        seed: The run's seed.
        bf16: Whether the trainer computes in bf16.
        longest: Tokens of the longest prompt and the longest completion together.
        batch_size: Completions decoded side by side.
        is_main: Whether this is the main process, which syncs weights to a server that several processes use.
        sharded: Whether the student's weights are sharded.
    """

    model: PreTrainedModel
    eos: Sequence[int]
    pad_id: int
    vocabulary: int
    seed: int
    bf16: bool
    longest: int = 0
    batch_size: int = 64
    is_main: bool = True
    sharded: bool = False
    masked: Tensor | None = None

    @property
    def allowed(self) -> list[int] | None:
        """Return the ids that may be drawn, ascending; None where student and teacher have the same vocabulary."""
        if self.masked is None:
            return None
        masked = set(self.masked.tolist())
        return [token for token in range(self.vocabulary) if token not in masked]


class Sampler(Protocol):
    """Generates completions. `stream` keeps the random numbers of different uses (training, evaluation) apart."""

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str, on_done: OnDone = unchanged) -> list[Rollout]:
        """Return one rollout for each request, in order, as `on_done` returned it.

        Raises `Preempted`, between decode steps, when this process is asked to stop.
        """
        ...

    def refresh(self) -> None:
        """Note that the model's weights changed."""
        ...

    def sync_weights(self, on_main: OnMain = run_here) -> None:
        """Take over the current weights, where the sampler has weights of its own. All processes of the run call it."""
        ...
