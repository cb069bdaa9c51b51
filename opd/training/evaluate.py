"""Evaluation: rewards of answers where an answer is known, and the exact KL(student‖teacher) on the student's own samples."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.schema import Config
from opd.data.prompts import Prompt, first_of_each
from opd.data.rewards import Grader, best
from opd.data.rollouts import FinishReason, Request, Rollout, micro_batches
from opd.models.device import autocast
from opd.models.distributed import run_stoppable
from opd.models.load import decode
from opd.models.policy import check_positions, output_head, predicting_hidden
from opd.models.shared_ids import SharedIds
from opd.objective import chunked_stats, exact, reverse_kl
from opd.objective.head import TokenStats
from opd.objective.overlap import OVERLAP
from opd.samplers import Decoding, Sampler
from opd.teachers import Teacher
from opd.training.inputs import can_judge
from opd.training.metrics import add_by_position, take_by_position
from opd.training.tokens import Means

log = logging.getLogger(__name__)

Ready = Callable[[], AbstractContextManager[None]]

Z95 = 1.959964
KL = "kl"


@dataclass(frozen=True, slots=True)
class Rewards:
    """Mean reward with its 95 % interval over `count` judged answers, mean completion tokens, and the share that was truncated.

    `each`: the reward of each prompt, in their order, so that runs can be compared prompt by prompt; None where it judged none.
    """

    mean: float
    low: float
    high: float
    count: int
    length: float
    truncated: float
    each: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """What an `Evaluation` measured on the prompts of one dataset."""

    rewards: Rewards | None
    kl: float | None
    overlap: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The student after `step` steps, or the teacher.

    Args:
        rewards: None without answers.
        kl: Exact KL(student‖teacher) at T = 1, nats per token.
        example: A prompt with its answer.
        overlap: Top-k overlap on the samples of the KL: means `share` and `mass`, and `by_position` as in metrics.jsonl.
        datasets: The same of each dataset of `data.mix`; empty without.
    """

    step: int
    rewards: Rewards | None
    kl: float | None
    example: str | None = None
    overlap: dict[str, Any] | None = None
    datasets: Mapping[str, DatasetResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.datasets else {name: value for name, value in values.items() if name != "datasets"}

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
    model: PreTrainedModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    vocabulary: int,
    max_tokens: int,
    pad_id: int,
    masked: Tensor | None = None,
    overlaps: Callable[[list[Rollout], TokenStats], None] = lambda rollouts, stats: None,
) -> tuple[float, int]:
    """Return the sum over tokens of KL(student‖teacher) at T = 1 over the shared vocabulary, in nats, and the number of tokens.

    Args:
        masked: As in `Head`.
        overlaps: Gets the rollouts of each micro-batch and the overlap of each of their tokens.
    """
    total, tokens = 0.0, 0
    head = output_head(model, vocabulary, masked=masked)
    for batch in micro_batches(rollouts, max_tokens, pad_id):
        batch = batch.to(model.device)
        token_loss = exact(batch.ids_N, teacher.states(batch.teacher_inputs), 1.0, reverse_kl)

        def kl_of(logits_CV: Tensor, part: slice, token_loss: Any = token_loss) -> dict[str, Tensor]:
            loss_C, stats = token_loss(logits_CV, part)
            return {"kl": loss_C, **{name: stats[name] for name in OVERLAP}}

        with torch.no_grad():
            stats = chunked_stats(predicting_hidden(model.base_model, batch.inputs), head, kl_of)
        kl_N = stats.pop("kl")
        total, tokens = total + float(kl_N.double().sum()), tokens + len(kl_N)
        overlaps([rollouts[index] for index in batch.rollouts], stats)
    return total, tokens


Distances = Mapping[str, Means]  # the KL, as `KL`, and the overlap on the student's samples, by dataset


def added(parts: Iterable[Means]) -> Means:
    whole = Means()
    for part in parts:
        for name in part.sums:
            whole.add(name, part.sums[name], part.counts[name])
    return whole


def mean_kl(distances: Distances) -> float | None:
    return added(distances.values()).means().get(KL)


def mean_overlap(distances: Distances, max_new_tokens: int) -> dict[str, Any] | None:
    """Return the overlap as in `Evaluation`; None where it was not measured."""
    means = added(distances.values())
    if not means.counts.get(KL):
        return None
    by_position = take_by_position(means, max_new_tokens)
    return {name: value for name, value in means.means().items() if name != KL} | {"by_position": by_position}


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers: dataset, reward (None for one that was not judged), tokens, whether it was truncated, prompt with answer, and sample id."""

    rows: list[tuple[str, float | None, int, bool, str, int]]

    def rewards(self, dataset: str | None = None) -> Rewards | None:
        """Return the statistics of one dataset or, for None, of all; None without answers."""
        asked = sorted((row for row in self.rows if dataset in (None, row[0])), key=lambda row: row[5])
        rows = [row for row in self.rows if dataset in (None, row[0]) and row[1] is not None]
        if not rows:
            return None
        values = [row[1] for row in rows if row[1] is not None]
        low, high = interval(values)
        # Whole numbers as integers, which are short in JSON: most rewards are 0 or 1.
        each = tuple(int(row[1]) if row[1] is not None and row[1] == int(row[1]) else row[1] for row in asked)
        lengths, truncated = fmean(row[2] for row in rows), fmean(row[3] for row in rows)
        return Rewards(fmean(values), low, high, len(rows), lengths, truncated, each)

    def evaluation(self, step: int, distances: Distances, max_new_tokens: int) -> Evaluation:
        """Return the evaluation of these answers and of the distances on samples of at most `max_new_tokens`."""
        datasets = {}
        for label in sorted({*(row[0] for row in self.rows), *distances} - {""}):
            own = {label: distances[label]} if label in distances else {}
            datasets[label] = DatasetResult(self.rewards(label), mean_kl(own), mean_overlap(own, max_new_tokens))
        example = self.rows[0][4] if self.rows else None
        return Evaluation(step, self.rewards(), mean_kl(distances), example, mean_overlap(distances, max_new_tokens), datasets)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates with a share of the prompts in each process; every process gets the whole result, or `Preempted` when asked to stop.

    Args:
        answered: Prompts that are answered and judged.
        kl_prompts: Prompts on whose samples the KL is measured.
        precision: Context in which the student computes.
        masked: As in `Head`.
        teacher_tokenizer: Of a teacher with tokens of its own.
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
    masked: Tensor | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def check_positions(self, model: PreTrainedModel, role: str, label: str = "") -> None:
        """Raise `ConfigError` where an evaluation needs more positions than the model has. `label`: the teacher's."""
        for option, prompts, decoding in (
            ("eval.max_new_tokens", self.answered, self.decoding),
            ("eval.kl_max_new_tokens", self.kl_prompts, self.kl_decoding),
        ):
            lengths = [len(prompt.ids) for prompt in prompts]
            if role == "teacher":
                lengths = [len(prompt.seen_by_teacher) for prompt in prompts if prompt.teacher == label]
            check_positions(model, role, option, lengths, decoding.max_new_tokens if lengths else 0)

    def as_teacher(self) -> "Evaluator":
        """Return the evaluator of the teacher's completions, which may have other tokens."""
        return self if self.teacher_tokenizer is None else replace(self, tokenizer=self.teacher_tokenizer)

    def student(self, step: int, sampler: Sampler, model: PreTrainedModel, teacher: Teacher, ready: Ready = nullcontext) -> Evaluation:
        """Evaluate the student. `ready`: context in which model and teacher answer without collectives."""
        judged = self.answer(sampler)
        return judged.evaluation(step, self.distances(sampler, model, teacher, ready), self.kl_decoding.max_new_tokens)

    def teacher(self, sampler: Sampler) -> Evaluation:
        """Evaluate the teacher, with its own version of the prompts."""
        return self.answer(sampler, as_teacher=True).evaluation(0, {}, self.kl_decoding.max_new_tokens)

    def answer(self, sampler: Sampler, as_teacher: bool = False, samples: int = 1) -> "Judged":
        """Return the judged answers of the model behind `sampler` from all processes. `as_teacher`: with its prompts."""
        if not self.answered:
            return Judged([])
        prompts = [prompt.for_teacher() if as_teacher else prompt for prompt in self._share(self.answered)]
        requests = [Request(prompt, 0, attempt) for prompt in prompts for attempt in range(samples)]
        rollouts = run_stoppable(self.accelerator, lambda: sampler.sample(requests, self.decoding, "evaluation"))
        reader = self.as_teacher() if as_teacher else self
        judged = zip(reader.judge(rollouts), rollouts, map(reader.text, rollouts), strict=True)
        rows = [
            (
                rollout.request.prompt.dataset,
                reward,
                len(rollout.completion),
                rollout.finish_reason is FinishReason.length,
                f"{rollout.request.prompt.text} → {text}",
                rollout.request.prompt.sample_id,
            )
            for reward, rollout, text in judged
        ]
        return Judged(gather_object(rows))

    def distances(self, sampler: Sampler, model: PreTrainedModel, teacher: Teacher, ready: Ready = nullcontext) -> "Distances":
        """Return the KL and the overlap on the student's samples of all processes, by dataset; empty where they are not asked for."""
        if not self.kl_prompts:
            return {}
        requests = [Request(prompt) for prompt in self._share(self.kl_prompts)]
        rollouts = run_stoppable(self.accelerator, lambda: sampler.sample(requests, self.kl_decoding, "evaluation-kl"))
        results = {}
        with ready(), self.precision():
            for label in sorted({rollout.request.prompt.dataset for rollout in rollouts}):
                own = [rollout for rollout in rollouts if rollout.request.prompt.dataset == label]
                results[label] = self.distance(model, teacher, own)
        found: dict[str, list[Means]] = {}  # a process without prompts has none
        for label, means in gather_object(list(results.items())):
            found.setdefault(label, []).append(means)
        return {label: added(means) for label, means in found.items()}

    def distance(self, model: PreTrainedModel, teacher: Teacher, rollouts: Sequence[Rollout]) -> Means:
        """Return the KL and the overlap on these samples."""
        means = Means()

        def overlaps(rollouts: list[Rollout], stats: TokenStats) -> None:
            for name, values in stats.items():
                means.add_tensors(name.removeprefix("overlap/"), [values])
            add_by_position(means, stats, rollouts, self.kl_decoding.max_new_tokens)

        pad_id = self.tokenizer.pad_token_id
        means.add(KL, *exact_kl(model, teacher, rollouts, self.vocabulary, self.max_tokens, pad_id, self.masked, overlaps))
        return means

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


def make_evaluator(
    config: Config,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    grader: Grader | None,
    ids: SharedIds,
    bf16: bool = False,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluator:
    """Return the configured evaluator.

    Args:
        bf16: Whether the student computes under autocast.
        teacher_tokenizer: Of a teacher with tokens of its own.
    """
    judged = [prompt for prompt in prompts if can_judge(prompt)]
    # Servers send no whole distributions, and two vocabularies have none in common.
    has_distributions = teacher_tokenizer is None
    local = {label for label, part in config.parts_by_teacher.items() if part.teacher.url is None and has_distributions}
    return Evaluator(
        accelerator,
        tokenizer,
        answered=first_of_each(judged, config.eval.limit) if config.eval.reward is not None else [],
        kl_prompts=first_of_each([prompt for prompt in prompts if prompt.teacher in local], config.eval.kl_prompts),
        decoding=Decoding(config.eval.temperature, config.eval.max_new_tokens, batch_size=config.eval.batch_size),
        kl_decoding=Decoding(1.0, config.eval.kl_max_new_tokens, batch_size=config.eval.batch_size),
        grader=grader,
        max_tokens=config.train.max_tokens_per_micro_batch,
        vocabulary=ids.vocabulary,
        precision=partial(autocast, accelerator.device, bf16),
        masked=ids.masked,
        teacher_tokenizer=teacher_tokenizer,
    )
