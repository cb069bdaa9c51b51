"""What tests of the trainer share: a small trainer, rollouts made by hand, and stand-ins for its parts."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from conftest import random_model
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from opd.config.compose import to_config
from opd.config.options import Best
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.models.distributed import prepare
from opd.models.policy import Policy
from opd.objective import TeacherStates
from opd.samplers import GenerateSampler, SamplerSpec
from opd.teachers import LocalTeacher, Teacher
from opd.training.build import make_optimizer
from opd.training.checkpoint import Checkpoints
from opd.training.evaluation import Evaluation
from opd.training.events import StepDone
from opd.training.loop import Trainer
from opd.training.spans import Spans
from opd.training.speed import Speed
from opd.training.step import Step
from opd.training.tensors import optimizer_tensors

hypothesis_settings.register_profile("opd", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("opd")

VOCABULARY = 23
EOS = 1
SERVER = {"sampling__lag": 1, "sampling__engine": "vllm", "sampling__vllm__url": "http://localhost:1"}  # what sampling.lag needs

UNEVEN = {"sampling__n": 4, "sampling__max_new_tokens": 16}  # truncated completions and complete ones of many lengths in every step
TIMED = ("time/", "perf/", "memory/", "tokens_per_second")  # metrics that differ between equal runs


def config(**options: Any) -> Config:
    """Return a config for small models. Options have `__` in place of the dot."""
    values = {
        "optim.eps": 1e-3,  # at the default, Adam takes a full step for a gradient that is all rounding error
        "optim.lr": 1e-2,
        "optim.warmup_steps": 0,
        "sampling.max_new_tokens": 8,
        "sampling.n": 2,
        "train.batch_size": 3,
        "train.max_steps": 4,
        **{name.replace("__", "."): value for name, value in options.items()},
    }
    base = OmegaConf.structured(Config)
    for key, value in values.items():
        OmegaConf.update(base, key, value)
    return to_config(base)


class NoEvaluator:
    """An evaluator for runs without anything to evaluate."""

    def student(self, step: int, *_: Any) -> Evaluation:
        return Evaluation(step, None, None)


def make_prompts(contrast: bool = False) -> list[Prompt]:
    """Return ten prompts of two to five random ids, with `contrast` in a second view of the teacher's too."""
    generator = torch.Generator().manual_seed(0)
    if contrast:
        return [replace(prompt, contrast_ids=(7, 8, *prompt.ids[1:])) for prompt in make_prompts()]
    return [Prompt(i, tuple(torch.randint(2, VOCABULARY, (2 + i % 4,), generator=generator).tolist()), "") for i in range(10)]


def make_sampler(student: PreTrainedModel, seed: int = 0, bf16_copy: bool = False) -> GenerateSampler:
    return GenerateSampler(SamplerSpec(model=student, eos=(EOS,), pad_id=0, vocabulary=VOCABULARY, seed=seed, bf16=False), bf16_copy)


def make_trainer(
    folder: Path,
    student: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    bf16_copy: bool = False,
    prompts: list[Prompt] | None = None,
    spans: Spans | None = None,
    **options: Any,
) -> Trainer:
    """Return a trainer of one process on the CPU, with checkpoints in `folder`. `spans`: for a teacher with another tokenizer."""
    settings = config(**options)
    student = student or random_model(VOCABULARY, seed=1)
    teacher = (teacher or random_model(VOCABULARY, seed=2, hidden=24)).requires_grad_(False)
    policy = Policy(student, VOCABULARY, 7, bool(settings.train.activation_checkpointing), settings.train.compile)
    strategy = prepare(Accelerator(cpu=True), policy, make_optimizer(settings, list(student.parameters())))
    choices = {"max_tokens": settings.train.max_tokens_per_micro_batch, "bf16_copy": bf16_copy}
    return Trainer(
        config=settings,
        strategy=strategy,
        student=student,
        sampler=make_sampler(student, settings.seed, bf16_copy),
        evaluator=NoEvaluator(),
        checkpoints=Checkpoints(folder / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.best is not Best.drop),
        prompts=prompts or make_prompts(settings.teacher.contrast is not None),
        scoring=Step(
            config=settings,
            strategy=strategy,
            teacher=LocalTeacher(teacher, VOCABULARY if spans is None else len(spans.aligner.teacher.pieces)),
            pad_id=0,
            packed=bool(settings.train.packing),
            choices=choices,
            spans=spans,
        ),
        speed=Speed(1e9, 1e9, 100, 200, passes=3, weight_bytes=400, cache_bytes=10, batch_size=settings.sampling.batch_size),
        max_steps=settings.train.max_steps or 1,
        saved_state={"config": {}, "choices": choices},
    )


def weights(trainer: Trainer) -> torch.Tensor:
    """Return a copy of all of the student's weights in one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.student.parameters()])


def weights_after(folder: Path, steps: int = 2, **options: Any) -> torch.Tensor:
    """Return the weights of a new trainer after some steps."""
    trainer = make_trainer(folder, **options)
    for _ in range(steps):
        trainer.train_step()
    return weights(trainer)


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of the optimizer's tensors."""
    return {name: value.clone() for name, value in optimizer_tensors(trainer.strategy.optimizer).items()}


def untimed(done: StepDone) -> dict[str, float]:
    """Return the metrics that a repetition of the step has to reproduce."""
    return {name: value for name, value in done.metrics.items() if not name.startswith(TIMED)}


def rollout_of(
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    finish: FinishReason = FinishReason.stop,
    index: int = 0,
    mask: tuple[bool, ...] | None = None,
    logp: Sequence[float] | None = None,
) -> Rollout:
    """Return a rollout with `logp` (0 without it) as its behaviour log-probs."""
    behaviour_logp = torch.zeros(len(completion)) if logp is None else torch.tensor(logp)
    return Rollout(Request(Prompt(index, prompt, "")), completion, behaviour_logp, finish, mask)


class FixedSampler:
    """A sampler that returns given rollouts."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = rollouts

    def sample(self, *_: Any) -> list[Rollout]:
        return self.rollouts

    def refresh(self) -> None: ...

    def sync_weights(self, *_: Any) -> None: ...


class ServerSampler:
    """Samples with the weights of the last `sync_weights`, whatever happens to the trainer's meanwhile."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model = trainer, copy.deepcopy(trainer.student)
        self.inner = make_sampler(self.model)

    def sample(self, *args: Any) -> list[Rollout]:
        return self.inner.sample(*args)

    def refresh(self) -> None: ...

    def sync_weights(self, *_: Any) -> None:
        self.model.load_state_dict(self.trainer.student.state_dict())


class PoisonedTeacher:
    """A teacher whose answer for the first token of each micro-batch is NaN while `is_poisoned()`."""

    def __init__(self, teacher: Teacher, is_poisoned: Any = lambda: True) -> None:
        self.teacher, self.is_poisoned = teacher, is_poisoned
        self.ready, self.check, self.expect = teacher.ready, teacher.check, teacher.expect

    def logp(self, *args: Any) -> torch.Tensor:
        logp_N = self.teacher.logp(*args)
        return logp_N.index_fill(0, torch.tensor([0]), math.nan) if self.is_poisoned() else logp_N

    def states(self, *args: Any) -> TeacherStates:
        states = self.teacher.states(*args)
        poisoned_NH = states.hidden_NH.index_fill(0, torch.tensor([0]), math.nan)
        return replace(states, hidden_NH=poisoned_NH) if self.is_poisoned() else states


token = st.integers(0, 50)
ids = st.lists(token, min_size=1, max_size=9).map(tuple)


@st.composite
def rollout_lists(draw: Any) -> list[Rollout]:
    """Rollouts of unequal lengths, masks with holes, some prompts with a teacher's version; no two behaviour log-probs are alike."""
    rollouts = []
    for index in range(draw(st.integers(1, 7))):
        prompt = Prompt(index, draw(ids), "", teacher_ids=draw(st.none() | ids))
        completion = draw(ids)
        mask = draw(st.none() | st.lists(st.booleans(), min_size=len(completion), max_size=len(completion)).map(tuple))
        logp = -torch.arange(len(completion)) - 100.0 * index
        request = Request(prompt, epoch=draw(st.integers(0, 3)), attempt=draw(st.integers(0, 3)))
        rollouts.append(Rollout(request, completion, logp, draw(st.sampled_from(FinishReason)), mask))
    return rollouts


def trained_ids(rollout: Rollout) -> list[int]:
    return [rollout.completion[offset] for offset in rollout.trained]


def trained_logp(rollout: Rollout) -> list[float]:
    return [float(rollout.behaviour_logp[offset]) for offset in rollout.trained]
