"""From a typed config to everything a run needs: models, data, sampler, teacher, evaluator, trainer."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.options import (
    Engine,
    Estimator,
    ModelConfig,
    OptimizerName,
    Placement,
    Quantization,
    TeacherWeights,
    naming_dataset,
    naming_teacher,
)
from opd.config.schema import Config
from opd.data.given import check_given
from opd.data.prompts import Prompt, encode_rows, first_of_each, labelled, text_warnings
from opd.data.rewards import Grader, make_grader
from opd.data.sources import Rows, check_rows, load_rows
from opd.errors import ConfigError, DataError
from opd.models import load
from opd.models.adapters import trained_adapters
from opd.models.device import autocast, free_memory
from opd.models.distributed import on_main_process, prepare, run_stoppable, shards_weights
from opd.models.masters import MasterWeights
from opd.models.memory import head_rows
from opd.models.overlap import Overlap, end_ids
from opd.models.policy import (
    Policy,
    check_packing,
    check_positions,
    fuse_layers,
    is_quantized,
    position_limit,
    prepare_student,
    prepare_teacher,
    uses_packing,
)
from opd.samplers import Decoding, GenerateSampler, Sampler, SamplerSpec, longest_sequence, make_sampler, of_teachers
from opd.samplers.vllm import check_installed
from opd.samplers.vllm_server import ServedSampler
from opd.teachers import (
    ChangingTeacher,
    LocalTeacher,
    MovingAverage,
    ServedTeacher,
    Teacher,
    as_one,
    loading_device,
    place,
    starting_module,
    teaching_module,
)
from opd.training.checkpoint import Checkpoints, trained_tensors
from opd.training.evaluate import Evaluator
from opd.training.identity import content, digest, digest_tokenizer, identity
from opd.training.loop import COMPARED, Trainer
from opd.training.spans import make_spans
from opd.training.speed import measure_speed, product_parameters
from opd.training.step import Step

CANARY_PROMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects that a caller passes instead of names: modules, a tokenizer, rows, or prompts to train and to evaluate on."""

    student: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train_rows: Rows | None = None
    eval_rows: Rows | None = None
    prompts: tuple[list[Prompt], list[Prompt]] | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """A trainer and what else the runner needs.

    Args:
        adapters: peft's handle on the student's adapters, if it has any.
        differences: What does not match between student and teacher, or does not reach the student, one line each.
        sampling: The engine and weights that sample, in words.
        served: Where the teacher is, in words; empty for a local one.
        teacher_eos: The ids that end a teacher's completion, by the teacher's label.
    """

    trainer: Trainer
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    teacher_sampler: Sampler
    teacher_eos: dict[str, tuple[int, ...]]
    adapters: Any | None
    eos: tuple[int, ...]
    differences: list[str]
    sampling: str
    served: str


def build(
    config: Config, accelerator: Accelerator, checkpoints: Checkpoints, given: Given, stack: ExitStack, choices: dict[str, Any] | None
) -> Built:
    """Return everything a run needs. Cheap checks come before expensive loading.

    Args:
        stack: Closes the reward's process at the end of the run.
        choices: Decisions of the run that is resumed; None for a new run.
    """
    if config.sampling.engine is Engine.vllm and not config.sampling.by_server:
        check_installed()
    if given.teacher is not None and (config.is_served or config.teachers):
        option = "teachers" if config.teachers else "teacher.url"
        raise ConfigError(f"{option}: a teacher was passed as a module too; leave one of them out")
    if given.teacher is not None and config.names_weights:
        raise ConfigError(f"{config.weights_option}: a teacher was passed as a module too; leave one of them out")
    device, sharded = accelerator.device, shards_weights(accelerator)
    check_sharding(config, sharded)
    bf16 = load.computes_in_bf16(config.model.dtype, device)
    autocasts = bf16 and sharded  # without sharding the weights themselves are bf16, with float32 masters
    tokenizer = given.tokenizer or load.load_tokenizer(config.model, "model")
    parts = config.parts_by_teacher
    teacher_tokenizers = {}
    overlap = None
    has_spans = config.teacher.has_own_tokens  # then there is one teacher
    for label, part in parts.items():
        with naming_teacher(label):
            has_tokenizer = has_spans or (given.teacher is None and not part.teaches_itself)
            teacher_tokenizers[label] = load.load_tokenizer(part.teacher, "teacher") if has_tokenizer else tokenizer
            overlap = None if has_spans else load.check_same_ids(tokenizer, teacher_tokenizers[label]) or overlap
    if overlap is not None and len(parts) > 1:
        raise ConfigError("teachers: one of several has tokens of its own, or lacks some of the student's; use it alone, as teacher")
    train_prompts, eval_prompts = load_prompts(config, tokenizer, given, teacher_tokenizers[""] if has_spans else None)
    grader = make_run_grader(config, [*train_prompts, *eval_prompts], stack)

    torch.manual_seed(config.seed)
    student, adapters = build_student(config, given, device, autocasts)
    masters = MasterWeights(student) if bf16 and not sharded else None
    teacher_models: dict[str, PreTrainedModel | None] = {}
    own_models: dict[tuple[TeacherWeights, bool], PreTrainedModel] = {}
    average = None
    for label, part in parts.items():
        with naming_teacher(label):
            if part.teaches_itself:
                whose = (part.teacher_weights, part.names_weights)  # teachers that differ in what they read share a module
                if whose not in own_models:
                    own_models[whose] = teaching_module(part, student, sharded)
                teacher_models[label] = own_model = own_models[whose]
                if part.teacher_weights is TeacherWeights.ema:  # of `teacher` alone
                    average = MovingAverage(own_model, trained_tensors(student, masters), part.teacher.ema)
            else:
                teacher_models[label] = None if part.teacher.url is not None else build_teacher(part, given, accelerator)
    prompts = [*train_prompts, *eval_prompts]
    if has_spans:
        vocabulary = load.shared_vocabulary(tokenizer, student, None)
        teacher_vocabulary = own_vocabulary(teacher_tokenizers[""], teacher_models[""])
        load.check_known([replace(prompt, teacher_ids=None) for prompt in prompts], tokenizer, vocabulary)
        load.check_known([replace(prompt.for_teacher(), given=()) for prompt in prompts], teacher_tokenizers[""], teacher_vocabulary)
    else:
        vocabulary = min(load.shared_vocabulary(tokenizer, student, model) for model in teacher_models.values())
        teacher_vocabulary = vocabulary
        load.check_known(prompts, tokenizer, vocabulary, overlap)
    masked = None if overlap is None else overlap.masked(vocabulary).to(device)
    eos = load.eos_ids(student, tokenizer)
    teacher_eos = {label: load.eos_ids(model, teacher_tokenizers[label]) for label, model in teacher_models.items()}
    for label, model in teacher_models.items():
        if model is None and set(teacher_eos[label]) <= set(eos) and not has_spans:
            teacher_eos[label] = eos  # a tokenizer names one token, a model may have more
    spans = None
    if has_spans:
        teacher_model, ends = teacher_models[""], (eos, teacher_eos[""])
        views = [prompt.for_teacher() for prompt in prompts]
        limit = longest_served(config, views) if teacher_model is None else position_limit(teacher_model)
        spans = make_spans(config, tokenizer, teacher_tokenizers[""], ends, prompts, limit, (vocabulary, teacher_vocabulary), device)
        if teacher_model is None:
            teacher_eos[""] = tuple({*teacher_eos[""], spans.aligner.teacher_end})  # a tokenizer names one token
    own_eos, own_teacher_eos = eos, dict(teacher_eos)
    if overlap is not None:
        ((label, last_eos),) = teacher_eos.items()
        pairs = [(tokenizer, eos), (teacher_tokenizers[label], last_eos)]
        eos = teacher_eos[label] = end_ids(overlap, pairs, config.data.chat_template_kwargs)
    spec = SamplerSpec(
        model=student,
        eos=eos,
        pad_id=tokenizer.pad_token_id,
        vocabulary=vocabulary,
        seed=config.seed,
        bf16=autocasts,
        longest=longest_sequence(config, [*train_prompts, *eval_prompts]),
        batch_size=config.sampling.batch_size,
        is_main=accelerator.is_main_process,
        sharded=sharded,
        masked=masked,
    )
    read_by_teacher = teacher_tokenizers[""] if has_spans else None
    evaluator = make_evaluator(config, accelerator, tokenizer, eval_prompts, grader, vocabulary, autocasts, masked, read_by_teacher)
    local = {label: model for label, model in teacher_models.items() if model is not None}
    new_tokens = config.sampling.max_new_tokens
    check_positions(student, "model", "sampling.max_new_tokens", [len(prompt.ids) for prompt in train_prompts], new_tokens)
    check_evaluated_positions(evaluator, student, "model")
    for label, model in local.items():
        lengths = [max(map(len, prompt.scored_views)) for prompt in train_prompts if prompt.teacher == label]
        check_positions(model, "teacher", "sampling.max_new_tokens", lengths, new_tokens)
        check_evaluated_positions(evaluator, model, "teacher", label)
    packed = all(uses_packing(model, config.train.packing) for model in (student, *local.values()))
    if packed:
        with autocast(device, autocasts):
            check_packing(student, "model")
    choices = choices or make_choices(config, accelerator, spec, max(vocabulary, teacher_vocabulary))
    # Copies and checks the student, before it is sharded. A signal during the check stops all processes.
    sampler = run_stoppable(accelerator, lambda: make_sampler(config, spec, choices["bf16_copy"]))
    if isinstance(sampler, GenerateSampler):
        choices["bf16_copy"] = sampler.copy is not None
    connected = {}
    for label, part in parts.items():
        if teacher_models[label] is None:
            seen = [prompt for prompt in (*train_prompts, *eval_prompts) if prompt.teacher == label]
            with naming_teacher(label):
                read_with = teacher_tokenizers[label] if has_spans else tokenizer
                connected[label] = connect_teacher(part, accelerator, read_with, teacher_vocabulary, seen, choices, label, overlap)
    decodes_in = None if config.sampling.engine is Engine.vllm else torch.bfloat16 if choices["bf16_copy"] else student.dtype
    speed = measure_speed(config, student, local.get(""), bf16, decodes_in)
    speed = replace(speed, teachers={label: product_parameters(model) for label, model in local.items() if label})
    starts = [label for label, part in parts.items() if part.teacher_is_start]
    start = starting_module(config, student) if config.ppo.reference_coef > 0 and not starts else None
    copied = None if start is student else start
    digests = on_main_process(accelerator, lambda: content(tokenizer, student, teacher_models, train_prompts, eval_prompts, copied))
    if has_spans:
        digests["the teacher's tokenizer"] = digest_tokenizer(teacher_tokenizers[""])
    if overlap is not None:
        digests["masked ids"] = digest([overlap.masked(vocabulary).tolist(), eos])
    for label, model in local.items():
        with naming_teacher(label):
            place(model, parts[label].teacher.placement, device)  # after the digests, which read the weights where they were loaded
    checkpointing = load.recomputes_activations(config.train, device)
    policy = Policy(student, vocabulary, choices["head_rows"], checkpointing, config.train.compile, autocasts, masked)
    trained = masters.masters if masters is not None else [weight for weight in student.parameters() if weight.requires_grad]
    strategy = prepare(accelerator, policy, make_optimizer(config, trained), masters)
    teachers: dict[str, Teacher] = {}
    teacher_samplers: dict[str, Sampler] = {}
    for label, part in parts.items():
        teacher_model, bf16_teacher = teacher_models[label], part.teaches_itself and autocasts
        pad_id = teacher_tokenizers[label].pad_token_id if has_spans else tokenizer.pad_token_id
        teacher_spec = replace(
            spec, model=teacher_model or student, eos=teacher_eos[label], pad_id=pad_id, vocabulary=teacher_vocabulary, bf16=bf16_teacher
        )
        if teacher_model is None:
            teachers[label] = served = connected[label]
            teacher_samplers[label] = ServedSampler(served.servers[0], served.name, teacher_spec)
            continue
        changes = part.teacher_weights in (TeacherWeights.current, TeacherWeights.ema)
        kind: type[LocalTeacher] = ChangingTeacher if changes else LocalTeacher
        teachers[label] = kind(
            teacher_model,
            teacher_vocabulary,
            adapters if teacher_model is student and part.teacher_weights is TeacherWeights.base else None,
            choices["head_rows"],
            bf16=bf16_teacher,
            device=device,
            ready=strategy.gathered_weights if teacher_model is student else None,
            masked=masked,
        )
        teacher_samplers[label] = local_sampler = GenerateSampler(teacher_spec)
        if not part.teaches_itself:
            with naming_teacher(label), teachers[label].ready():
                if packed:
                    check_packing(teacher_model, "teacher")
                if any(prompt.teacher == label for prompt in evaluator.answered):
                    run_stoppable(accelerator, partial(local_sampler.check, "teacher"))
    teacher = as_one(teachers)
    reference = None
    if config.ppo.reference_coef > 0 and start is None:
        has_start = teachers[starts[0]]
        assert isinstance(has_start, LocalTeacher)
        reference = has_start
    elif start is not None:
        is_student = start is student
        gathered = strategy.gathered_weights if is_student else None
        own = adapters if is_student else None
        reference = LocalTeacher(start, vocabulary, own, choices["head_rows"], autocasts, device, gathered, masked)
    trainer = Trainer(
        config=config,
        strategy=strategy,
        student=student,
        sampler=sampler,
        evaluator=evaluator,
        checkpoints=checkpoints,
        prompts=train_prompts,
        scoring=Step(
            config=config,
            strategy=strategy,
            teacher=teacher,
            pad_id=tokenizer.pad_token_id,
            packed=packed,
            choices=choices,
            overlap=overlap,
            spans=spans,
            reference=reference,
            loss_weights={label: dataset.loss_weight for label, dataset in config.data.datasets.items()},
        ),
        speed=speed,
        max_steps=total_steps(config, len(train_prompts), accelerator.num_processes),
        average=average,
        saved_state={**identity(config, accelerator), "prompts": len(train_prompts), "content": digests, "choices": choices},
    )
    weights = "a bf16 copy of the weights" if choices["bf16_copy"] else "the trainer's weights"
    sampling = "vllm" if config.sampling.engine is Engine.vllm else f"generate with {weights}"
    warnings = text_warnings([*eval_prompts, *train_prompts], tokenizer, eos)
    differences = []
    for label, teacher_tokenizer in () if has_spans else teacher_tokenizers.items():
        found = load.pair_differences(tokenizer, teacher_tokenizer, (own_eos, own_teacher_eos[label]), overlap, eos)
        differences += [f"{label}: {difference}" if label else difference for difference in found]
    differences += warnings
    served_teachers = "; ".join(f"{served.name} at {', '.join(parts[label].teacher.urls)}" for label, served in connected.items())
    eos = tuple(sorted({*eos, *own_eos}))  # an end that is masked here may still be written by the trained model
    teacher_sampler = of_teachers(teacher_samplers, teachers)
    return Built(trainer, tokenizer, teacher, teacher_sampler, teacher_eos, adapters, eos, differences, sampling, served_teachers)


def build_student(config: Config, given: Given, device: torch.device, bf16: bool) -> tuple[PreTrainedModel, Any | None]:
    """Return the student and peft's handle on its adapters."""
    check_passed(config.model, given.student, "model")
    if given.student is not None and given.student is given.teacher:
        raise ConfigError("model and teacher_model are the same module, but the teacher must not change: load it twice")
    # With lora.rank an adapter is loaded below, to be trained; otherwise it is merged here.
    source = replace(config.model, adapter=None) if config.lora.rank else config.model
    model = given.student or load.load_model(source, "model", device)
    student = prepare_student(model, device, bf16, frozen=config.lora.rank > 0)
    if all(map(can_fuse, config.parts_by_teacher.values())):
        fuse_layers(student)
    return student, trained_adapters(student, config) if config.lora.rank else None


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


def build_teacher(config: Config, given: Given, accelerator: Accelerator) -> PreTrainedModel:
    check_passed(config.teacher, given.teacher, "teacher")
    device = loading_device(config.teacher, accelerator.device, accelerator.num_processes, shards_weights(accelerator))
    computes_on = device if config.teacher.placement is Placement.device else accelerator.device
    teacher = prepare_teacher(given.teacher or load.load_model(config.teacher, "teacher", computes_on), device)
    if can_fuse(config):
        fuse_layers(teacher)
    return teacher


def connect_teacher(
    config: Config,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    prompts: Sequence[Prompt],
    choices: dict[str, Any],
    label: str,
    overlap: Overlap | None = None,
) -> ServedTeacher:
    """Connect to a served teacher.

    Its scores of its first prompts are in `choices`, and have to be the same when the run is resumed.
    """
    views = [replace(prompt, ids=ids) for prompt in prompts for ids in prompt.scored_views]
    longest = longest_served(config, views) + 1
    canary = [tokenizer.eos_token_id, *(token for prompt in prompts[:CANARY_PROMPTS] for token in prompt.seen_by_teacher)]
    is_topk = config.ppo.estimator is Estimator.topk
    if is_topk and overlap is not None:
        raise ConfigError("ppo.estimator=topk: servers send ids that the student lacks among the most probable; set ppo.estimator=sampled")
    teacher = ServedTeacher(
        config.teacher,
        tokenizer,
        vocabulary,
        longest,
        canary[: longest - 1],
        config.ppo.k if is_topk else 0,
        overlap,
    )
    name = f"canary of {label}" if label else "canary"
    if config.resume_force:  # which accepts another teacher
        choices.pop(name, None)
        choices.pop(COMPARED, None)
    teacher.reference = choices.get(name, [])
    on_main_process(accelerator, teacher.check)
    choices[name] = teacher.reference
    return teacher


def longest_served(config: Config, views: Sequence[Prompt]) -> int:
    """Return the most tokens that a served teacher reads. In tokens of its own a completion may take twice as many; more are not scored."""
    spare = config.sampling.max_new_tokens if config.teacher.has_own_tokens else 0
    return longest_sequence(config, views) + spare


def own_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> int:
    """Return how many ids a teacher with another tokenizer has; a served one (None) as many as its tokenizer."""
    return max(tokenizer.get_vocab().values()) + 1 if model is None else load.shared_vocabulary(tokenizer, model, None)


def can_fuse(config: Config) -> bool:
    """Return whether Liger's kernels may be used: not where the teacher computes on another device than the student."""
    return config.teacher.placement is not Placement.device


def make_choices(config: Config, accelerator: Accelerator, spec: SamplerSpec, vocabulary: int) -> dict[str, Any]:
    """Return decisions that depend on the machine. All processes agree on them, and a resumed run keeps them: others would round otherwise.

    `head_rows`: tokens whose logits exist at a time. `max_tokens`: of a micro-batch, halved when memory runs out. `bf16_copy`: whether to
    sample with a bf16 copy of the weights.

    Args:
        vocabulary: The larger one of student and teacher.
    """
    rows = torch.tensor([head_rows(vocabulary, accelerator.device, free_memory(accelerator.device))], device=accelerator.device)
    return {
        "head_rows": int(accelerator.gather(rows).min()),
        "max_tokens": config.train.max_tokens_per_micro_batch,
        "bf16_copy": not is_quantized(spec.model)
        and on_main_process(
            accelerator, lambda: load.uses_bf16_copy(config.sampling.dtype, spec.model.device, spec.model.dtype == torch.bfloat16)
        ),
    }


def resumed_choices(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the choices of the run that `state` is of. Micro-batches that were halved stay so until another size is asked for."""
    asked = config.train.max_tokens_per_micro_batch
    changed = asked != state["config"]["train"]["max_tokens_per_micro_batch"]
    return {**state["choices"], **({"max_tokens": asked} if changed else {})}


def load_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, given: Given, teacher_tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Return prompts to train and to evaluate on. Raises `DataError` where rewards are asked for and nothing can be judged.

    Args:
        teacher_tokenizer: Of a teacher with tokens of its own, for its view.
    """
    if given.prompts is not None:
        return given.prompts
    if given.train_rows is not None and config.data.mix:
        raise ConfigError("data.mix: rows were passed, which are one dataset; leave one of them out")
    loaded = {}
    for label, part in config.parts.items():
        with naming_dataset(label), naming_teacher(config.teacher_of(label)):
            rows = load_rows(part.data) if given.train_rows is None else check_rows(given.train_rows, given.eval_rows or [], part.data)
            loaded[label] = Loaded(rows, encode_dataset(part, tokenizer, rows, label, teacher_tokenizer))
    return join_datasets(config, loaded)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rows of a dataset and their prompts, to train and to evaluate on."""

    rows: tuple[Rows, Rows]
    prompts: tuple[list[Prompt], list[Prompt]]


def encode_dataset(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows],
    label: str = "",
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of a single dataset, without its label, which is for messages."""
    train_rows, eval_rows = rows
    train_prompts = encode_rows(train_rows, tokenizer, config.data, "training", config.teacher, label, teacher_tokenizer)
    if config.data.completion is not None:
        check_given(train_prompts, config, label)
    evaluated = replace(config.teacher, contrast=None)
    if not len(eval_rows):
        return train_prompts, []
    return train_prompts, encode_rows(eval_rows, tokenizer, config.data, "evaluation", evaluated, label, teacher_tokenizer)


def join_datasets(config: Config, loaded: Mapping[str, Loaded]) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts of all datasets, labelled. Raises `DataError` where rewards are asked for and nothing can be judged."""
    teachers = {label: config.teacher_of(label) for label in loaded}
    train_prompts, eval_prompts = (
        labelled(
            {label: dataset.prompts[which] for label, dataset in loaded.items()},
            {label: len(dataset.rows[which]) for label, dataset in loaded.items()},
            teachers,
        )
        for which in (0, 1)
    )
    if config.eval.reward is not None and eval_prompts and not any(map(can_judge, eval_prompts)):
        raise DataError(
            f"eval.reward={config.eval.reward}: no evaluation prompt has an answer (data.answer={config.data.answer}, "
            f"data.answer_after={config.data.answer_after}); name the column with the answers, or evaluate without rewards: eval=kl"
        )
    if config.ppo.reward_coef > 0 and not any(map(can_judge, train_prompts)):
        raise DataError(
            f"ppo.reward_coef={config.ppo.reward_coef}: no training prompt has an answer; name their column as data.answer=COLUMN"
        )
    return train_prompts, eval_prompts


def can_judge(prompt: Prompt) -> bool:
    return bool(prompt.answers) or prompt.get_reward is not None


def make_run_grader(config: Config, prompts: list[Prompt], stack: ExitStack) -> Grader | None:
    """Return the configured grader; None where every prompt judges itself or none is judged."""
    if config.eval.reward is None or not any(prompt.answers and prompt.get_reward is None for prompt in prompts):
        return None
    return stack.enter_context(make_grader(config.eval.reward))


def make_evaluator(
    config: Config,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    grader: Grader | None,
    vocabulary: int,
    bf16: bool,
    masked: Tensor | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Evaluator:
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
        vocabulary=vocabulary,
        precision=partial(autocast, accelerator.device, bf16),
        masked=masked,
        teacher_tokenizer=teacher_tokenizer,
    )


def check_evaluated_positions(evaluator: Evaluator, model: PreTrainedModel, role: str, label: str = "") -> None:
    """Raise `ConfigError` where an evaluation needs more positions than the model has. `label`: the teacher's."""
    for option, prompts, decoding in (
        ("eval.max_new_tokens", evaluator.answered, evaluator.decoding),
        ("eval.kl_max_new_tokens", evaluator.kl_prompts, evaluator.kl_decoding),
    ):
        lengths = [len(prompt.ids) for prompt in prompts]
        if role == "teacher":
            lengths = [len(prompt.seen_by_teacher) for prompt in prompts if prompt.teacher == label]
        check_positions(model, role, option, lengths, decoding.max_new_tokens if lengths else 0)


def make_optimizer(config: Config, parameters: Sequence[Tensor]) -> Optimizer:
    """Return AdamW, in one fused kernel or with states in 8 bits (arXiv 2110.02861), with weight decay on matrices only.

    Raises `ConfigError` where the package of the 8-bit one is missing.
    """
    optim = config.optim
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = optim.betas
    groups = [group for group in groups if group["params"]]
    if optim.name is OptimizerName.adamw8bit:
        load.require_bitsandbytes("optim.name=adamw8bit")
        from bitsandbytes.optim import AdamW8bit

        small: Optimizer = AdamW8bit(groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps)
        return small
    return AdamW(groups, lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, fused=True)


def total_steps(config: Config, prompts: int, processes: int) -> int:
    """Return `train.max_steps`, or the number of steps of `train.epochs`, which draw so many times the number of all prompts."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * prompts / (config.train.batch_size * processes))
