"""Student and teacher side by side without a trainer: loaded, checked against each other, ready to write and to score."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.schema import ModelConfig
from opd.models import load as models
from opd.models.device import autocast
from opd.models.policy import prepare_student, prepare_teacher
from opd.samplers import GenerateSampler, SamplerSpec
from opd.teachers import LocalTeacher


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model to write and score with, and the ids that end its completions. bf16: it computes under autocast."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos: tuple[int, ...]
    bf16: bool

    def precision(self) -> AbstractContextManager[Any]:
        return autocast(self.model.device, self.bf16)

    def sampler(self, pad_id: int, vocabulary: int, seed: int) -> GenerateSampler:
        return GenerateSampler(SamplerSpec(model=self.model, eos=self.eos, pad_id=pad_id, vocabulary=vocabulary, seed=seed, bf16=self.bf16))

    def teacher(self, vocabulary: int) -> LocalTeacher:
        return LocalTeacher(self.model, vocabulary, bf16=self.bf16)


def load(config: ModelConfig, role: str, device: torch.device) -> Loaded:
    """As the trainer would: the student in float32 and bf16 by autocast, the teacher in what it computes in. role: model or teacher."""
    tokenizer = models.load_tokenizer(config, role)
    bf16 = role == "model" and models.computes_in_bf16(config.dtype, device)
    model = models.load_model(config, role, device)
    ready = prepare_student(model, device, bf16, frozen=True) if role == "model" else prepare_teacher(model, device)
    return Loaded(ready.requires_grad_(False), tokenizer, models.eos_ids(ready, tokenizer), bf16)


def shared(student: Loaded, teacher: Loaded) -> int:
    """How many ids both can speak of. Raises `ConfigError` where a token is another one in the other model."""
    models.check_same_ids(student.tokenizer, teacher.tokenizer)
    return models.shared_vocabulary(student.tokenizer, student.model, teacher.model)
