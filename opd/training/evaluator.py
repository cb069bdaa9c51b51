"""How a model is evaluated: its answers are judged, and the exact KL(student‖teacher) is taken on the student's own samples."""

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.compose import PACKAGE
from opd.config.schema import Config
from opd.data.grading import Item, describe
from opd.data.prompts import GetReward, Prompt, first_of_each
from opd.data.python_rows import as_number, name_of
from opd.data.rewards import Grader, best
from opd.data.rollouts import FinishReason, Request, Rollout, micro_batches
from opd.errors import RewardError
from opd.models.device import autocast
from opd.models.distributed import run_stoppable
from opd.models.load import decode
from opd.models.policy import check_positions, output_head, predicting_hidden
from opd.models.shared_ids import SharedIds
from opd.objective import chunked_stats, exact, reverse_kl
from opd.objective.head import TokenStats
from opd.objective.overlap import OVERLAP
from opd.runs.answers import Answer
from opd.runs.progress import Progress
from opd.runs.text import one_line
from opd.samplers import Decoding, Sampler
from opd.teachers import Teacher
from opd.training.evaluation import KL, Distances, Evaluation, Judged, add_kl_squares, added
from opd.training.inputs import can_judge
from opd.training.metrics import add_by_position
from opd.training.tokens import Means

log = logging.getLogger(__name__)

Ready = Callable[[], AbstractContextManager[None]]


def exact_kl(
    model: PreTrainedModel,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    vocabulary: int,
    max_tokens: int,
    pad_id: int,
    masked: Tensor | None = None,
    overlaps: Callable[[list[Rollout], TokenStats], None] = lambda rollouts, stats: None,
    by_rollout: Callable[[list[float], list[int]], None] = lambda sums, tokens: None,
) -> tuple[float, int]:
    """Return the sum over tokens of KL(student‖teacher) at T = 1 over the shared vocabulary, in nats, and the number of tokens.

    Args:
        masked: As in `Head`.
        overlaps: Gets the rollouts of each micro-batch and the overlap of each of their tokens.
        by_rollout: Gets the sum over the tokens, and their number, of each rollout.
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
        lengths = [len(rollouts[index].trained) for index in batch.rollouts]
        by_rollout([float(part.double().sum()) for part in kl_N.cpu().split(lengths)], lengths)
    return total, tokens


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates with a share of the prompts in each process; every process gets the whole result, or `Preempted` when asked to stop.

    Args:
        answered: Prompts that are answered and judged.
        kl_prompts: Prompts on whose samples the KL is measured.
        choices: The run's, with `max_tokens` of a micro-batch, which a step that runs out of memory halves.
        precision: Context in which the student computes.
        masked: As in `Head`.
        teacher_tokenizer: Of a teacher with tokens of its own.
        progress: Tells how far an evaluation is.
    """

    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    answered: Sequence[Prompt]
    kl_prompts: Sequence[Prompt]
    decoding: Decoding
    kl_decoding: Decoding
    grader: Grader | None
    choices: Mapping[str, Any]
    vocabulary: int
    precision: Callable[[], Any]
    masked: Tensor | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts of evaluations, each once."""
        return list({(prompt.dataset, prompt.sample_id): prompt for prompt in (*self.answered, *self.kl_prompts)}.values())

    @property
    def missed(self) -> int:
        """How often the reward hit its limits so far, in this process."""
        return 0 if self.grader is None else self.grader.not_judged

    @property
    def judges(self) -> list[str]:
        """The names of the functions that were passed to judge answers; empty where `eval.reward` judges some."""
        functions = [prompt.get_reward for prompt in self.answered if prompt.get_reward is not None]
        return list(dict.fromkeys(map(name_of, functions))) if len(functions) == len(self.answered) else []

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
        return self.answer(sampler, as_teacher=True, name="teacher").evaluation(0, {}, self.kl_decoding.max_new_tokens)

    def sample(self, sampler: Sampler, requests: Sequence[Request], decoding: Decoding, stream: str, what: str) -> list[Rollout]:
        """Return this process's completions, and tell how far all processes are. `what`: the work, in words."""
        done, processes = 0, self.accelerator.num_processes

        def on_done(rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
            nonlocal done
            done += len(rollouts)
            note(done * processes)
            return rollouts

        with self.progress.of(what, len(requests) * processes) as note:
            watched = replace(decoding, ended=lambda ended: note((done + ended) * processes))
            return run_stoppable(self.accelerator, lambda: sampler.sample(requests, watched, stream, on_done))

    def answer(self, sampler: Sampler, as_teacher: bool = False, samples: int = 1, name: str = "student") -> "Judged":
        """Return the judged answers of the model behind `sampler` from all processes.

        Args:
            as_teacher: With the teacher's prompts.
            name: The model's, for the progress.
        """
        if not self.answered:
            return Judged([])
        prompts = [prompt.for_teacher() if as_teacher else prompt for prompt in self._share(self.answered)]
        requests = [Request(prompt, 0, attempt) for prompt in prompts for attempt in range(samples)]
        rollouts = self.sample(sampler, requests, self.decoding, "evaluation", f"evaluating the {name}")
        reader = self.as_teacher() if as_teacher else self
        missed_before = self.missed
        with self.progress.of(f"grading the answers of the {name}"):
            rewards = reader.judge(rollouts)
        judged = zip(rewards, rollouts, map(reader.text, rollouts), strict=True)
        rows = [
            Answer(
                rollout.request.prompt.dataset,
                reward,
                len(rollout.completion),
                rollout.finish_reason is FinishReason.length,
                text,
                rollout.request.prompt.sample_id,
                rollout.request.prompt.text,
                rollout.request.prompt.answers,
            )
            for reward, rollout, text in judged
        ]
        return Judged(gather_object(rows), sum(gather_object([self.missed - missed_before])), self.judges)

    def distances(self, sampler: Sampler, model: PreTrainedModel, teacher: Teacher, ready: Ready = nullcontext) -> "Distances":
        """Return the KL and the overlap on the student's samples of all processes, by dataset; empty where they are not asked for."""
        if not self.kl_prompts:
            return {}
        requests = [Request(prompt) for prompt in self._share(self.kl_prompts)]
        rollouts = self.sample(sampler, requests, self.kl_decoding, "evaluation-kl", "sampling for the KL to the teacher")
        results = {}
        with self.progress.of("measuring the KL to the teacher"), ready(), self.precision():
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
        squares, max_tokens = partial(add_kl_squares, means), self.choices["max_tokens"]
        means.add(KL, *exact_kl(model, teacher, rollouts, self.vocabulary, max_tokens, pad_id, self.masked, overlaps, squares))
        return means

    def _share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        return prompts[self.accelerator.process_index :: self.accelerator.num_processes]

    def text(self, rollout: Rollout) -> str:
        return decode(self.tokenizer, rollout.answer, skip_special_tokens=True)

    def judge(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return each completion's reward by its prompt's own `get_reward`, else by the configured one; None without either.

        Raises `RewardError` where one of them fails.
        """
        texts = list(map(self.text, rollouts))
        prompts = [rollout.request.prompt for rollout in rollouts]
        items = [[] if prompt.get_reward else prompt.to_grade(text) for prompt, text in zip(prompts, texts, strict=True)]
        graded = iter(self.grade([item for each in items for item in each]))
        against_answers = [best(islice(graded, len(each))) for each in items]
        return [
            own_reward(prompt.get_reward, text) if prompt.get_reward else reward
            for prompt, text, reward in zip(prompts, texts, against_answers, strict=True)
        ]

    def grade(self, items: Sequence[Item]) -> list[float | None]:
        """Return the configured reward of each answer, and tell how many hit a limit."""
        if self.grader is None:
            return [None] * len(items)
        before = self.grader.not_judged
        rewards = self.grader.grade(items)
        missed = self.grader.not_judged - before
        if missed and missed != self.grader.reported:
            self.grader.reported = missed
            log.warning(
                "%d of %d answers were not judged: a reward took too long or too much memory (%s)", missed, len(items), self.grader.limits
            )
        return rewards


def own_reward(get_reward: GetReward, completion: str) -> float | None:
    """Return the reward by a prompt's own function. Raises `RewardError`, with the function's line, where it fails or returns no number."""
    try:
        value = get_reward(completion)
    except RewardError:  # of functions in `reward_funcs`, which says what they returned
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        place = next((f"{frame.filename}:{frame.lineno}: " for frame in frames if not frame.filename.startswith(str(PACKAGE))), "")
        raise RewardError(f"{place}the reward failed: {describe(error)}, on the completion {one_line(completion)[:200]!r}") from error
    return as_number(value, "get_reward")


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
        choices={"max_tokens": config.train.max_tokens_per_micro_batch},
        vocabulary=ids.vocabulary,
        precision=partial(autocast, accelerator.device, bf16),
        masked=ids.masked,
        teacher_tokenizer=teacher_tokenizer,
    )
