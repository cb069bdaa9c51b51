"""A teacher on a device of its own scores a batch of completions while the student, on its own, decodes the next.

Only decoding batches are overlapped that are made anyway (`sampling.batch_size`): smaller ones would cost more than scoring takes. One
thread asks the teacher, which no other process takes part in; nothing else is asked of it until `said` has returned.

Shapes: `N` tokens that are learnt from, of all rollouts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd import signals
from opd.config.schema import Config, Estimator, Truncated
from opd.data.rollouts import MicroBatch, Request, Rollout
from opd.samplers import Decoding, GenerateSampler
from opd.teachers import Teacher


def can_overlap(config: Config) -> bool:
    """Whether the objective asks the teacher for log-probs of tokens alone, which do not depend on micro-batches."""
    return config.ppo.estimator is Estimator.sampled and not config.ppo.baseline


@dataclass(slots=True)
class Overlap:
    """cut: micro-batches of rollouts. device: the student's. scores: of each decoding batch, by the rollout's place among all."""

    sampler: GenerateSampler
    teacher: Teacher
    config: Config
    cut: Callable[[Sequence[Rollout]], list[MicroBatch]]
    device: torch.device
    background: Executor = field(default_factory=lambda: ThreadPoolExecutor(1))
    scores: list[Future[dict[int, Tensor]]] = field(default_factory=list)

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """As `Sampler.sample`. Where it raises, nothing is being scored any more."""
        self.scores = []
        try:
            return self.sampler.sample(
                requests, decoding, stream, lambda batch: self.scores.append(self.background.submit(self.score, batch))
            )
        except BaseException:
            for score in self.scores:
                score.cancel()
            wait(self.scores)
            raise

    def score(self, written: dict[int, Rollout]) -> dict[int, Tensor]:
        """Log-probs (tokens,) of each rollout's tokens that are learnt from; none of what is dropped. Raises `Preempted`."""
        drops = self.config.sampling.truncated is Truncated.drop
        kept = [place for place in sorted(written) if not (drops and written[place].truncated)]
        found: dict[int, Tensor] = {}
        for batch in self.cut([written[place].first(self.config.ppo.loss_prefix) for place in kept]):
            signals.check(in_any_thread=True)
            logp_N = self.teacher.logp(batch.to(self.device), self.config.sampling.temperature)
            sequence_N = batch.sequence_N.to(logp_N.device)
            found |= {kept[index]: logp_N[sequence_N == index] for index in set(batch.sequence_N.tolist())}
        return found

    def said(self, learnt: Sequence[Rollout]) -> Tensor | None:
        """The teacher's log-probs (N,) of what is learnt from, in the order of the rollouts of the last `sample`.

        Raises what scoring raised; None where the memory did not suffice, or something is learnt from that was taken for dropped.
        """
        wait(self.scores)
        found: dict[int, Tensor] = {}
        try:
            for score in self.scores:
                found |= score.result()
        except torch.OutOfMemoryError:
            return None
        finally:
            self.scores = []
        told = [place for place, rollout in enumerate(learnt) if rollout.completion]
        return torch.cat([found[place] for place in told]) if found.keys() >= set(told) else None
