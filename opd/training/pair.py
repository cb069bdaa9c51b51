"""Student and teachers of a run as they are loaded: tokenizers, modules, and the token ids that they share."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.options import Estimator, ModelConfig, OptimizerName, Placement, PPOConfig, Quantization, TeacherWeights, naming_teacher
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.errors import ConfigError
from opd.models import load
from opd.models.adapters import trained_adapters
from opd.models.distributed import on_main_process, shards_weights
from opd.models.masters import MasterWeights
from opd.models.overlap import Overlap
from opd.models.policy import fuse_layers, position_limit, prepare_student, prepare_teacher
from opd.models.shared_ids import SharedIds
from opd.samplers import longest_sequence
from opd.teachers import MovingAverage, ServedTeacher, canary_ids, loading_device, starting_module, teaching_module
from opd.training.checks import COMPARED
from opd.training.inputs import Given
from opd.training.spans import Spans, make_spans
from opd.training.tensors import trained_tensors

log = logging.getLogger(__name__)


@dataclass(slots=True)
class TeacherParts:
    """What a teacher is made from.

    Args:
        label: In `teachers`; empty for `teacher`.
        config: The run on the rows that it scores.
        tokenizer: Its own.
        model: None where a server has it.
        eos: The ids with which it ends a completion.
    """

    label: str
    config: Config
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None = None
    eos: tuple[int, ...] = ()

    def sees(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts whose completions it scores."""
        return [prompt for prompt in prompts if prompt.teacher == self.label]


# What was passed or asked for and does not go together.


def check_modules(config: Config, given: Given) -> None:
    """Raise `ConfigError` where modules are passed although options name them, or say how to load them."""
    if given.teacher is not None and (config.is_served or config.teachers):
        option = "teachers" if config.teachers else "teacher.url"
        raise ConfigError(f"{option}: a teacher was passed as a module too; leave one of them out")
    if given.teacher is not None and config.names_weights:
        raise ConfigError(f"{config.weights_option}: a teacher was passed as a module too; leave one of them out")
    if given.teacher is not None and config.teaches_itself:
        raise ConfigError(f"teacher.path={config.teacher.path}: the model that gets adapters is the teacher without them; pass its path")


def check_passed(model: ModelConfig, module: PreTrainedModel | None, role: str) -> None:
    """Raise `ConfigError` where a module is passed although an option says how to load it."""
    if module is not None and model.quantization is not Quantization.none:
        raise ConfigError(f"{role}.quantization={model.quantization.value}: models are quantised on loading; pass the {role}'s path")
    if module is not None and model.adapter is not None:
        raise ConfigError(f"{role}.adapter={model.adapter}: adapters are loaded with a path; pass the {role}'s path")


def check_sharding(config: Config, sharded: bool) -> None:
    """Raise `ConfigError` for options that do not work with FSDP2."""
    if sharded and config.model.quantization is not Quantization.none:
        option = f"model.quantization={config.model.quantization.value}"
        raise ConfigError(f"{option}: FSDP2 cannot shard quantised weights; set launch.config_file=null, or model.quantization=none")
    if sharded and config.optim.name is OptimizerName.adamw8bit:
        raise ConfigError("optim.name=adamw8bit: FSDP2 cannot shard its states; set launch.config_file=null, or optim.name=adamw")


# Tokenizers, then modules.


def open_teachers(config: Config, given: Given, tokenizer: PreTrainedTokenizerBase) -> tuple[list[TeacherParts], Overlap | None]:
    """Return the run's teachers without their modules, and what the vocabularies share where they are not the same.

    Args:
        tokenizer: The student's.
    """
    teachers, overlap = [], None
    for label, part in config.parts_by_teacher.items():
        has_tokenizer = part.teacher.has_own_tokens or (given.teacher is None and not part.teaches_itself)
        with naming_teacher(label):
            teacher = TeacherParts(label, part, load.load_tokenizer(part.teacher, "teacher") if has_tokenizer else tokenizer)
            if not part.teacher.has_own_tokens:
                overlap = load.check_same_ids(tokenizer, teacher.tokenizer) or overlap
        teachers.append(teacher)
    if overlap is not None and len(teachers) > 1:
        raise ConfigError("teachers: one of several has tokens of its own, or lacks some of the student's; use it alone, as teacher")
    return teachers, overlap


def load_student(config: Config, given: Given, device: torch.device, bf16: bool) -> tuple[PreTrainedModel, Any | None]:
    """Return the student and peft's handle on its adapters. Raises `ConfigError` for a module of which nothing is trained."""
    check_passed(config.model, given.student, "model")
    if given.student is not None and given.student is given.teacher:
        raise ConfigError("model and teacher_model are the same module, but the teacher must not change: load it twice")
    # With lora.rank an adapter is loaded below, to be trained; otherwise it is merged here.
    source = replace(config.model, adapter=None) if config.lora.rank else config.model
    frozen = config.lora.rank > 0
    model = given.student or load.load_model(source, "model", device, frozen)
    if given.student is None and not frozen:
        model.requires_grad_(True)  # peft leaves the weights that it merged an adapter into frozen
    if given.student is not None and frozen and bf16 and any(weight.dtype == torch.float32 for weight in model.parameters()):
        log.warning("model: its weights are rounded to bf16, and stay so after the run; set model.dtype=float32 to keep them")
    student = prepare_student(model, device, bf16, frozen)
    if not frozen and not any(weight.requires_grad for weight in student.parameters()):
        raise ConfigError("model: all of its parameters have requires_grad=False; set it to True on those to train, or pass peft_config")
    if all(map(can_fuse, config.parts_by_teacher.values())):
        fuse_layers(student)
    return student, trained_adapters(student, config) if config.lora.rank else None


def load_teachers(
    teachers: Sequence[TeacherParts], given: Given, accelerator: Accelerator, student: PreTrainedModel, masters: MasterWeights | None
) -> MovingAverage | None:
    """Load the modules that no server has. Returns the teacher's weights, where they are an average of the student's."""
    average, own_models = None, {}
    for teacher in teachers:
        part = teacher.config
        with naming_teacher(teacher.label):
            if part.teaches_itself:
                whose = (part.teacher_weights, part.names_weights)  # teachers that differ in what they read share a module
                if whose not in own_models:
                    own_models[whose] = teaching_module(part, student, shards_weights(accelerator))
                teacher.model = own_models[whose]
                if part.teacher_weights is TeacherWeights.ema:  # of `teacher` alone
                    average = MovingAverage(teacher.model, trained_tensors(student, masters), part.teacher.ema)
            elif part.teacher.url is None:
                teacher.model = load_teacher(part, given, accelerator)
    return average


def load_teacher(config: Config, given: Given, accelerator: Accelerator) -> PreTrainedModel:
    check_passed(config.teacher, given.teacher, "teacher")
    device = loading_device(config.teacher, accelerator.device, accelerator.num_processes, shards_weights(accelerator))
    computes_on = device if config.teacher.placement is Placement.device else accelerator.device
    teacher = prepare_teacher(given.teacher or load.load_model(config.teacher, "teacher", computes_on), device)
    if can_fuse(config):
        fuse_layers(teacher)
    return teacher


def can_fuse(config: Config) -> bool:
    """Return whether Liger's kernels may be used: not where the teacher computes on another device than the student."""
    return config.teacher.placement is not Placement.device


def starting_model(config: Config, teachers: Sequence[TeacherParts], student: PreTrainedModel) -> PreTrainedModel | None:
    """Return the module with the weights of the student's start that `ppo.reference_coef` needs, unless one of the teachers has them."""
    needs_start = config.ppo.reference_coef > 0 and not any(teacher.config.teacher_is_start for teacher in teachers)
    return starting_module(config, student) if needs_start else None


# Ids.


def match_ids(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    teachers: Sequence[TeacherParts],
    overlap: Overlap | None,
    prompts: Sequence[Prompt],
) -> SharedIds:
    """Return the ids that the models share, and note which end the teachers' completions.

    Raises:
        ConfigError: A head is too narrow for its tokenizer, or `ppo.k` too large.
        DataError: A prompt has a token that its reader does not know.
    """
    eos = load.eos_ids(student, tokenizer)
    for teacher in teachers:
        teacher.eos = load.eos_ids(teacher.model, teacher.tokenizer)
        if teacher.model is None and set(teacher.eos) <= set(eos) and not config.teacher.has_own_tokens:
            teacher.eos = eos  # a tokenizer names one token, a model may have more
    if config.teacher.has_own_tokens:
        (teacher,) = teachers
        ids = SharedIds(load.shared_vocabulary(tokenizer, student, None), of_teacher=own_vocabulary(teacher))
        load.check_known([replace(prompt, teacher_ids=None) for prompt in prompts], tokenizer, ids.vocabulary)
        views = [replace(prompt.for_teacher(), given=()) for prompt in prompts]
        load.check_known(views, teacher.tokenizer, ids.teacher_vocabulary)
        return ids
    vocabulary = min(load.shared_vocabulary(tokenizer, student, teacher.model) for teacher in teachers)
    check_k(config.ppo, vocabulary)
    load.check_known(prompts, tokenizer, vocabulary, overlap)
    pairs = [(tokenizer, eos), *((teacher.tokenizer, teacher.eos) for teacher in teachers)]
    return SharedIds.of(vocabulary, overlap, pairs, config.data.chat_template_kwargs, student.device)


def check_k(config: PPOConfig, vocabulary: int) -> None:
    """Raise `ConfigError` where `topk` asks for more tokens than there are."""
    if config.estimator is Estimator.topk and config.k > vocabulary:
        raise ConfigError(f"ppo.k={config.k}: there are only {vocabulary} tokens in the vocabulary; set ppo.k to fewer, such as 64")


def own_vocabulary(teacher: TeacherParts) -> int:
    """Return how many ids a teacher with another tokenizer has; a served one as many as its tokenizer."""
    if teacher.model is None:
        return max(teacher.tokenizer.get_vocab().values()) + 1
    return load.shared_vocabulary(teacher.tokenizer, teacher.model, None)


def match_spans(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    teachers: Sequence[TeacherParts],
    ids: SharedIds,
    prompts: Sequence[Prompt],
) -> Spans | None:
    """Return what aligns completions with the tokens of a teacher that has its own; None where it has the student's."""
    if ids.of_teacher is None:
        return None
    (teacher,) = teachers
    views = [prompt.for_teacher() for prompt in prompts]
    limit = longest_served(config, views) if teacher.model is None else position_limit(teacher.model)
    ends = (load.eos_ids(student, tokenizer), teacher.eos)
    spans = make_spans(config, tokenizer, teacher.tokenizer, ends, prompts, limit, (ids.vocabulary, ids.of_teacher), student.device)
    if teacher.model is None:
        teacher.eos = tuple({*teacher.eos, spans.aligner.teacher_end})  # a tokenizer names one token
    return spans


# Served teachers.


def connect(
    teacher: TeacherParts,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    ids: SharedIds,
    prompts: Sequence[Prompt],
    choices: dict[str, Any],
) -> ServedTeacher:
    """Connect to a served teacher.

    Its scores of its first prompts are in `choices`, and have to be the same when the run is resumed.

    Args:
        tokenizer: The student's, unless the teacher has tokens of its own.
    """
    config = teacher.config
    seen = teacher.sees(prompts)
    longest = longest_served(config, [replace(prompt, ids=view) for prompt in seen for view in prompt.scored_views]) + 1
    is_topk = config.ppo.estimator is Estimator.topk
    if is_topk and ids.overlap is not None:
        raise ConfigError("ppo.estimator=topk: servers send ids that the student lacks among the most probable; set ppo.estimator=sampled")
    served = ServedTeacher(
        config.teacher,
        tokenizer,
        ids.teacher_vocabulary,
        longest,
        canary_ids(tokenizer, seen, longest),
        config.ppo.k if is_topk else 0,
        ids.overlap,
    )
    name = f"canary of {teacher.label}" if teacher.label else "canary"
    if config.resume_force:  # which accepts another teacher
        choices.pop(name, None)
        choices.pop(COMPARED, None)
    served.reference = choices.get(name, [])
    on_main_process(accelerator, served.check)
    choices[name] = served.reference
    return served


def longest_served(config: Config, views: Sequence[Prompt]) -> int:
    """Return the most tokens that a served teacher reads. In tokens of its own a completion may take twice as many; more are not scored."""
    spare = config.sampling.max_new_tokens if config.teacher.has_own_tokens else 0
    return longest_sequence(config, views) + spare
