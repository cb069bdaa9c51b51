"""Evaluation: rewards of answers where an answer is known, and the exact KL(student‖teacher) on the student's own samples."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.data.prompts import Prompt
from opd.data.rewards import Grader, best
from opd.data.rollouts import FinishReason, Request, Rollout, micro_batches
from opd.models.distributed import run_stoppable
from opd.models.load import decode
from opd.models.policy import output_head, predicting_hidden
from opd.objective import chunked_stats, exact, reverse_kl
from opd.samplers import Decoding, Sampler
from opd.teachers import Teacher

log = logging.getLogger(__name__)

Ready = Callable[[], AbstractContextManager[None]]

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Rewards:
    """Mean reward with its 95 % interval over `count` judged answers, mean completion tokens, and the share that was truncated."""

    mean: float
    low: float
    high: float
    count: int
    length: float
    truncated: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The student after `step` steps. `rewards`: None without answers. `kl`: exact KL(student‖teacher) at T = 1, nats per token."""

    step: int
    rewards: Rewards | None
    kl: float | None
    example: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def score(self) -> float | None:
        """The value by which evaluations are ranked: the mean reward, else minus the KL."""
        if self.rewards is not None:
            return self.rewards.mean
        return None if self.kl is None else -self.kl


def interval(rewards: Sequence[float], shares: bool = True) -> tuple[float, float]:
    """Return the 95 % interval of the mean: Wilson's for rewards of 0 and 1, which is sound at 0 % and 100 %, else the normal one.

    Args:
        shares: False for differences of rewards, which may be 0 and 1 by chance.
    """
    count, mean = len(rewards), fmean(rewards)
    if shares and all(reward in (0.0, 1.0) for reward in rewards):
        centre = mean + Z95**2 / (2 * count)
        spread = Z95 * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
        low, high = (centre - spread) / (1 + Z95**2 / count), (centre + spread) / (1 + Z95**2 / count)
        return max(low, 0.0), min(high, 1.0)  # rounding
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(count - 1, 1)
    spread = Z95 * math.sqrt(variance / count)
    return mean - spread, mean + spread


def exact_kl(
    model: PreTrainedModel, teacher: Teacher, rollouts: Sequence[Rollout], vocabulary: int, max_tokens: int, pad_id: int
) -> tuple[float, int]:
    """Return the sum over tokens of KL(student‖teacher) at T = 1 over the vocabulary, in nats, and the number of tokens."""
    total, tokens = 0.0, 0
    head = output_head(model, vocabulary)
    for batch in micro_batches(rollouts, max_tokens, pad_id):
        batch = batch.to(model.device)
        token_loss = exact(batch.ids_N, teacher.states(batch.teacher_inputs), 1.0, reverse_kl)

        def kl_of(logits_CV: Tensor, part: slice, token_loss: Any = token_loss) -> dict[str, Tensor]:
            return {"kl": token_loss(logits_CV, part)[0]}

        with torch.no_grad():
            kl_N = chunked_stats(predicting_hidden(model.base_model, batch.inputs), head, kl_of)["kl"]
        total, tokens = total + float(kl_N.double().sum()), tokens + len(kl_N)
    return total, tokens


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates with a share of the prompts in each process; every process gets the whole result, or `Preempted` when asked to stop.

    Args:
        answered: Prompts that are answered and judged.
        kl_prompts: Prompts on whose samples the KL is measured.
        precision: Context in which the student computes.
    """

    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    answered: Sequence[Prompt]
    kl_prompts: Sequence[Prompt]
    decoding: Decoding
    kl_decoding: Decoding
    grader: Grader | None
    max_tokens: int
    vocabulary: int
    precision: Callable[[], Any]
    teacher_tokenizer: PreTrainedTokenizerBase

    def as_teacher(self) -> "Evaluator":
        """Return the evaluator of the teacher's completions, which may have other tokens."""
        return replace(self, tokenizer=self.teacher_tokenizer)

    def student(self, step: int, sampler: Sampler, model: PreTrainedModel, teacher: Teacher, ready: Ready = nullcontext) -> Evaluation:
        """Evaluate the student. `ready`: context in which model and teacher answer without collectives."""
        rewards, example = self.rewards(sampler)
        return Evaluation(step, rewards, self.kl(sampler, model, teacher, ready), example)

    def rewards(self, sampler: Sampler, as_teacher: bool = False) -> tuple[Rewards | None, str | None]:
        """Return the rewards of the model behind `sampler`, and the first prompt with its answer. `as_teacher`: with its prompts."""
        if not self.answered:
            return None, None
        requests = [Request(prompt.for_teacher() if as_teacher else prompt) for prompt in self._share(self.answered)]
        rollouts = run_stoppable(self.accelerator, lambda: sampler.sample(requests, self.decoding, "evaluation"))
        reader = self.as_teacher() if as_teacher else self
        judged = zip(reader.judge(rollouts), rollouts, map(reader.text, rollouts), strict=True)
        rows = [
            (reward, len(rollout.completion), rollout.finish_reason is FinishReason.length, f"{rollout.request.prompt.text} → {text}")
            for reward, rollout, text in judged
            if reward is not None
        ]
        rows = gather_object(rows)
        if not rows:
            return None, None
        values = [row[0] for row in rows]
        low, high = interval(values)
        return Rewards(fmean(values), low, high, len(rows), fmean(row[1] for row in rows), fmean(row[2] for row in rows)), rows[0][3]

    def kl(self, sampler: Sampler, model: PreTrainedModel, teacher: Teacher, ready: Ready = nullcontext) -> float | None:
        if not self.kl_prompts:
            return None
        requests = [Request(prompt) for prompt in self._share(self.kl_prompts)]
        rollouts = run_stoppable(self.accelerator, lambda: sampler.sample(requests, self.kl_decoding, "evaluation-kl"))
        with ready(), self.precision():
            result = exact_kl(model, teacher, rollouts, self.vocabulary, self.max_tokens, self.tokenizer.pad_token_id)
        parts = gather_object([result])
        total, tokens = (sum(column) for column in zip(*parts, strict=True))
        return float(total / tokens)

    def _share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        return prompts[self.accelerator.process_index :: self.accelerator.num_processes]

    def text(self, rollout: Rollout) -> str:
        return decode(self.tokenizer, rollout.answer, skip_special_tokens=True)

    def judge(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return each completion's reward by its prompt's own `get_reward`, else by the configured one; None without either."""
        rewards: list[float | None] = []
        late = self.grader.timeouts if self.grader else 0
        for rollout in rollouts:
            prompt, text = rollout.request.prompt, self.text(rollout)
            if prompt.get_reward is not None:
                rewards.append(prompt.get_reward(text))
            else:
                rewards.append(best(self.grader.grade([(text, answer) for answer in prompt.answers])) if self.grader else None)
        if self.grader is not None and self.grader.timeouts > late:
            log.warning("%d answers took too long or too much memory to judge and count 0", self.grader.timeouts - late)
        return rewards
