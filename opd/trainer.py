"""The step and the loop of on-policy distillation. Builds nothing, prints nothing: `run` yields what happened.

A step: the student samples, the teacher scores every token, and for each inner step all micro-batches give gradients scaled by one global
token count, which are clipped and applied. Around it: evaluate the weights, step, save.

Shapes: `N` kept completion tokens of a micro-batch.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from opd.checkpoint import Checkpoints
from opd.config.schema import Config, Reduction
from opd.data.order import take
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, MicroBatch, Request, Rollout, micro_batches
from opd.errors import NumericError
from opd.evaluate import Evaluation, Evaluator
from opd.learning import Scores, score, token_loss
from opd.metrics import Means
from opd.objective import chunked_loss, group_normalised
from opd.objective.head import Head, TokenLoss, TokenStats
from opd.samplers import Decoding, Sampler
from opd.schedule import lr_factor
from opd.teachers import Teacher

log = logging.getLogger(__name__)

NON_FINITE_LIMIT = 3


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with the log-probs of its tokens, each (completion tokens,), before the update."""

    rollout: Rollout
    logp: Tensor
    teacher_logp: Tensor


@dataclass(frozen=True, slots=True)
class StepDone:
    step: int
    metrics: dict[str, float]
    scored: list[Scored]


@dataclass(frozen=True, slots=True)
class Evaluated:
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    step: int


Event = StepDone | Evaluated | Saved


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Everything a run needs, built elsewhere (`opd.runner`). policy: the student as `Policy`, prepared by Accelerate.

    step: how many steps are done. best: the best evaluation's score so far.
    """

    config: Config
    accelerator: Accelerator
    policy: nn.Module
    student: Any
    optimizer: Optimizer
    sampler: Sampler
    teacher: Teacher
    evaluator: Evaluator
    checkpoints: Checkpoints
    prompts: Sequence[Prompt]
    pad_id: int
    packed: bool
    max_steps: int
    saved_state: dict[str, Any]
    step: int = 0
    evaluated: int | None = None
    best: float | None = None
    graded_tokens: int = 0
    non_finite: int = 0

    @property
    def prompts_per_step(self) -> int:
        processes: int = self.accelerator.num_processes
        return self.config.train.batch_size * processes

    def run(self) -> Iterator[Event]:
        """Steps until `max_steps`, evaluations every `eval.steps` and before and after, checkpoints every `checkpoint.every` steps."""
        while True:
            last = self.step >= self.max_steps
            if self.evaluation_due(last):
                yield from self.evaluate()
            if last:
                return
            yield self.train_step()
            if self.step % self.config.checkpoint.every == 0 or self.step == self.max_steps:
                yield self.save()

    def evaluation_due(self, last: bool) -> bool:
        every = self.config.eval.steps
        return self.evaluated != self.step and (self.step == 0 or last or (every > 0 and self.step % every == 0))

    def evaluate(self) -> Iterator[Event]:
        evaluation = self.evaluator.student(self.step, self.sampler, self.student, self.teacher)
        self.evaluated = self.step
        score = evaluation.score
        if score is not None and self.step > 0 and (self.best is None or score > self.best):
            self.best = score
            if self.config.checkpoint.keep_best:
                yield self.save()
                if self.accelerator.is_main_process:
                    self.checkpoints.mark_best(self.step, score)
        yield Evaluated(evaluation)

    def save(self) -> Saved:
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, self.student, self.optimizer, self.saved_state)
        self.accelerator.wait_for_everyone()
        return Saved(self.step)

    def train_step(self) -> StepDone:
        """Sample, score, and take `ppo.steps` optimizer steps on all of it."""
        begin = time.perf_counter()
        rate = self.set_learning_rate()
        written = self.sampler.sample(self.requests(), self.decoding(), "train")
        sampled_at = time.perf_counter()
        bonus = self.task_bonus(written)
        rollouts = [rollout.first(self.config.ppo.loss_prefix) for rollout in written]
        batches = [batch.to(self.accelerator.device) for batch in self.split(rollouts)]
        scores = [score(self.teacher, batch, self.config, None if bonus is None else bonus[batch.sequence_N]) for batch in batches]
        scored_at = time.perf_counter()
        means, first = Means(), list[TokenStats]()
        for inner in range(self.config.ppo.steps):
            old_logp = [stats["logp"] for stats in first] if inner else [None] * len(batches)
            seen = self.inner_step(rollouts, batches, scores, old_logp, means)
            first = first or seen
        self.step += 1
        end = time.perf_counter()
        self.describe(means, written, batches, first)
        metrics = self.reduce(means)
        seconds = {"sample": sampled_at - begin, "score": scored_at - sampled_at, "update": end - scored_at, "step": end - begin}
        tokens = self.global_sum(sum(len(rollout.completion) for rollout in rollouts))
        self.graded_tokens += int(tokens)
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        metrics |= {
            "optim/lr": rate,
            "reverse_kl_p99": self.quantile([stats["reverse_kl"] for stats in first], 0.99),
            "tokens": tokens,
            "tokens_total": float(self.graded_tokens),
            "tokens_per_second": tokens / (end - begin),
            "epoch": self.step * self.prompts_per_step / len(self.prompts),
        }
        return StepDone(self.step, metrics, self.scored(written, batches, first))

    def requests(self) -> list[Request]:
        """This process's share of the step's prompts, `sampling.n` times each."""
        size = self.config.train.batch_size
        start = self.step * self.prompts_per_step + self.accelerator.process_index * size
        drawn = take(self.config.seed, len(self.prompts), start, size)
        return [Request(self.prompts[index], epoch, attempt) for epoch, index in drawn for attempt in range(self.config.sampling.n)]

    def decoding(self) -> Decoding:
        sampling = self.config.sampling
        return Decoding(sampling.temperature, sampling.max_new_tokens, sampling.top_p, sampling.top_k, sampling.batch_size)

    def split(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        return micro_batches(rollouts, self.config.train.max_tokens_per_micro_batch, self.pad_id, self.packed)

    def task_bonus(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        """`ppo.reward_coef` times each rollout's reward, normalised within its prompt's completions, (rollouts,); None where it is off."""
        coefficient = self.config.ppo.reward_coef
        if coefficient == 0:
            return None
        rewards = torch.tensor([reward or 0.0 for reward in self.evaluator.judge(rollouts)])
        groups = torch.arange(len(rollouts)) // self.config.sampling.n
        return coefficient * group_normalised(rewards, groups).to(self.accelerator.device)

    def inner_step(
        self,
        rollouts: Sequence[Rollout],
        batches: Sequence[MicroBatch],
        scores: Sequence[Scores],
        old_logp: Sequence[Tensor | None],
        means: Means,
    ) -> list[TokenStats]:
        """One optimizer step over all micro-batches; adds to `means` and returns the tokens' statistics by micro-batch."""
        weights, total = self.token_weights(rollouts)
        # DDP averages over processes what is to be a sum over all of their tokens.
        scale = self.accelerator.num_processes / total
        seen: list[TokenStats] = []
        loss_sum = 0.0
        for number, (batch, scored, old_N) in enumerate(zip(batches, scores, old_logp, strict=True), start=1):
            objective = token_loss(self.config, batch, scored, old_N)
            weight_N = weights[batch.sequence_N]

            def head_loss(hidden_NH: Tensor, head: Head, objective: TokenLoss = objective, weight_N: Tensor = weight_N) -> Any:
                return chunked_loss(hidden_NH, head, objective, weight_N=weight_N)

            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.policy):
                loss, stats = self.policy(batch.inputs, head_loss)
                (loss * scale).backward()  # not accelerator.backward, which divides by what a launcher says of accumulation
            loss_sum += float(loss.detach())
            seen.append(stats)
        means.add("loss", loss_sum, float(len(rollouts) if self.config.ppo.reduction is Reduction.sequence else sum(map(len_of, seen))))
        for stats in seen:
            means.add_tensors({name: stats[name] for name in ("ratio", "clipped") if name in stats})
        self.apply(loss_sum, means)
        return seen

    def token_weights(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, float]:
        """Each rollout's weight for each of its tokens (rollouts,), and what all processes' weighted token counts add up to."""
        lengths = torch.tensor([len(rollout.completion) for rollout in rollouts], dtype=torch.float32, device=self.accelerator.device)
        if self.config.ppo.reduction is Reduction.token:
            return torch.ones_like(lengths), self.global_sum(float(lengths.sum()))
        return 1.0 / lengths, self.global_sum(float(len(rollouts)))

    def apply(self, loss_sum: float, means: Means) -> None:
        """Clip and step; or, if anything is not finite in any process, leave weights and optimizer as they are, and say so."""
        norm = float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.optim.max_grad_norm))
        finite = self.global_sum(0.0 if math.isfinite(loss_sum) and math.isfinite(norm) else 1.0) == 0
        if finite:
            self.optimizer.step()
            self.sampler.refresh()
            means.add("optim/grad_norm", norm, 1.0)
        self.optimizer.zero_grad()
        means.add("optim/skipped", 0.0 if finite else 1.0, 1.0)
        self.non_finite = 0 if finite else self.non_finite + 1
        if not finite:
            log.error("step %d: loss %s, gradient norm %s: the update is left out", self.step + 1, loss_sum, norm)
        if self.non_finite == NON_FINITE_LIMIT:
            raise NumericError(
                f"{NON_FINITE_LIMIT} updates in a row were not finite (step {self.step + 1}): lower optim.lr, set ppo.advantage_clip, or "
                "compute in model.dtype=float32; the last checkpoint is untouched"
            )

    def describe(self, means: Means, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], first: Sequence[TokenStats]) -> None:
        """Adds what is known of the rollouts before the update."""
        for stats, batch in zip(first, batches, strict=True):
            means.add_tensors({name: stats[name] for name in ("reverse_kl", "entropy", "advantage", "cut") if name in stats})
            means.add_tensors({"teacher_nll": -stats["teacher_logp"], "engine_gap": (batch.behaviour_logp_N - stats["logp"]).abs()})
        means.add("length", float(sum(len(rollout.completion) for rollout in rollouts)), len(rollouts))
        means.add("truncated", float(sum(rollout.finish_reason is FinishReason.length for rollout in rollouts)), len(rollouts))

    def scored(self, rollouts: Sequence[Rollout], batches: Sequence[MicroBatch], first: Sequence[TokenStats]) -> list[Scored]:
        """The first `track.rollouts_per_step` rollouts with both models' log-probs."""
        sequence_N = torch.cat([batch.sequence_N for batch in batches])
        logp_N = torch.cat([stats["logp"] for stats in first])
        teacher_N = torch.cat([stats["teacher_logp"] for stats in first])
        return [
            Scored(rollouts[index], logp_N[sequence_N == index].cpu(), teacher_N[sequence_N == index].cpu())
            for index in range(min(self.config.track.rollouts_per_step, len(rollouts)))
        ]

    def set_learning_rate(self) -> float:
        rate = self.config.optim.lr * lr_factor(self.config.optim, self.step, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def global_sum(self, value: float) -> float:
        """The value added up over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def reduce(self, means: Means) -> dict[str, float]:
        if self.accelerator.num_processes > 1:
            means = means.from_tensor(self.accelerator.reduce(means.to_tensor(self.accelerator.device), "sum"))
        return means.means()

    def quantile(self, values: Sequence[Tensor], q: float) -> float:
        """The quantile of all processes' values."""
        own = torch.cat(list(values)).float()
        if self.accelerator.num_processes > 1:
            own = self.accelerator.gather(self.accelerator.pad_across_processes(own, pad_index=float("nan")))
        return float(own.nanquantile(q))


def len_of(stats: TokenStats) -> int:
    return len(stats["logp"])
