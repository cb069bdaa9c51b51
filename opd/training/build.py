"""From a typed config to everything a run needs: prompts, models, sampler, teachers, evaluator, trainer."""

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
    OptimizerName,
    TeacherWeights,
    naming_teacher,
)
from opd.config.schema import Config
from opd.data.prompts import Prompt, text_warnings
from opd.models import load
from opd.models.device import autocast, free_memory
from opd.models.distributed import Strategy, on_main_process, prepare, run_stoppable, shards_weights
from opd.models.masters import MasterWeights
from opd.models.memory import head_rows
from opd.models.policy import Policy, check_packing, check_positions, is_quantized, uses_packing
from opd.models.shared_ids import SharedIds
from opd.samplers import GenerateSampler, Sampler, SamplerSpec, longest_sequence, make_sampler, of_teachers
from opd.samplers.vllm import check_installed
from opd.samplers.vllm_server import ServedSampler
from opd.teachers import (
    ChangingTeacher,
    LocalTeacher,
    ServedTeacher,
    Teacher,
    as_one,
    place,
)
from opd.training.checkpoint import Checkpoints
from opd.training.evaluator import Evaluator, make_evaluator
from opd.training.identity import content, digest, digest_tokenizer, identity
from opd.training.inputs import Given, join_datasets, load_datasets, make_run_grader
from opd.training.loop import Trainer
from opd.training.pair import (
    TeacherParts,
    check_modules,
    check_sharding,
    connect,
    load_student,
    load_teachers,
    match_ids,
    match_spans,
    open_teachers,
    starting_model,
)
from opd.training.speed import measure_speed, product_parameters
from opd.training.step import Step, default_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A trainer and what else the runner needs.

    Args:
        adapters: peft's handle on the student's adapters, if it has any.
        differences: What does not match between student and teacher, or does not reach the student, one line each.
        sampling: The engine and weights that sample, in words.
        served: Where the teacher is, in words; empty for a local one.
        rows: The number of rows to train on, those included that are too long to be prompts.
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
    rows: int


def build(
    config: Config, accelerator: Accelerator, checkpoints: Checkpoints, given: Given, stack: ExitStack, choices: dict[str, Any] | None
) -> Built:
    """Return everything a run needs. Cheap checks come before expensive loading.

    Args:
        stack: Closes the reward's process at the end of the run, and restores a module that was passed.
        choices: Decisions of the run that is resumed; None for a new run.
    """
    if config.sampling.engine is Engine.vllm and not config.sampling.by_server:
        check_installed()
    device, sharded = accelerator.device, shards_weights(accelerator)
    check_modules(config, given)
    check_sharding(config, sharded)
    bf16 = load.computes_in_bf16(config.model.dtype, device)
    autocasts = bf16 and sharded  # without sharding the weights themselves are bf16, with float32 masters

    tokenizer = given.tokenizer or load.load_tokenizer(config.model, "model")
    teachers, overlap = open_teachers(config, given, tokenizer)
    own_reader = teachers[0].tokenizer if config.teacher.has_own_tokens else None  # then there is one teacher
    datasets = {} if given.prompts is not None else load_datasets(config, tokenizer, given, own_reader)
    train_prompts, eval_prompts = given.prompts or join_datasets(config, datasets)
    prompts = [*train_prompts, *eval_prompts]
    grader = make_run_grader(config, prompts, stack)

    torch.manual_seed(config.seed)
    student, adapters = load_student(config, given, device, bf16)
    rate = default_rate(student.num_parameters(), config.lora.rank > 0) if config.optim.lr is None else config.optim.lr
    composed, config = config, replace(config, optim=replace(config.optim, lr=rate))
    masters = MasterWeights(student) if bf16 and not sharded else None
    if given.student is not None:  # also where the run is interrupted, or only evaluates
        if adapters is not None:
            stack.callback(adapters.unload)
        if masters is not None:
            stack.callback(masters.restore_module)
    average = load_teachers(teachers, given, accelerator, student, masters)
    start = starting_model(config, teachers, student)
    ids = match_ids(config, tokenizer, student, teachers, overlap, prompts)
    spans = match_spans(config, tokenizer, student, teachers, ids, prompts)
    evaluator = make_evaluator(config, accelerator, tokenizer, eval_prompts, grader, ids, autocasts, own_reader)
    check_lengths(config, evaluator, student, teachers, train_prompts)
    modules = {teacher.label: teacher.model for teacher in teachers if teacher.model is not None}
    packed = all(uses_packing(model, config.train.packing) for model in (student, *modules.values()))
    if packed:
        with autocast(device, autocasts):
            check_packing(student, "model")

    eos = load.eos_ids(student, tokenizer)
    spec = SamplerSpec(
        model=student,
        eos=ids.ends or eos,
        pad_id=tokenizer.pad_token_id,
        vocabulary=ids.vocabulary,
        seed=config.seed,
        bf16=autocasts,
        longest=longest_sequence(config, prompts),
        batch_size=config.sampling.batch_size,
        is_main=accelerator.is_main_process,
        sharded=sharded,
        masked=ids.masked,
    )
    choices = choices or make_choices(config, accelerator, spec, max(ids.vocabulary, ids.teacher_vocabulary))
    if composed.optim.lr is None:
        choices["lr"] = rate
    # Copies and checks the student, before it is sharded. A signal during the check stops all processes.
    sampler = run_stoppable(accelerator, lambda: make_sampler(config, spec, choices["bf16_copy"]))
    if isinstance(sampler, GenerateSampler):
        choices["bf16_copy"] = sampler.copy is not None
    served: dict[str, ServedTeacher] = {}
    for teacher in teachers:
        if teacher.model is None:
            with naming_teacher(teacher.label):
                served[teacher.label] = connect(teacher, accelerator, own_reader or tokenizer, ids, prompts, choices)
    decodes_in = None if config.sampling.engine is Engine.vllm else torch.bfloat16 if choices["bf16_copy"] else student.dtype
    speed = measure_speed(config, student, modules.get(""), bf16, decodes_in)
    speed = replace(speed, teachers={label: product_parameters(module) for label, module in modules.items() if label})

    copied = None if start is student else start
    taught = {teacher.label: teacher.model for teacher in teachers}
    digests = on_main_process(accelerator, lambda: content(tokenizer, student, taught, train_prompts, eval_prompts, copied))
    if own_reader is not None:
        digests["the teacher's tokenizer"] = digest_tokenizer(own_reader)
    if overlap is not None:
        digests["masked ids"] = digest([overlap.masked(ids.vocabulary).tolist(), spec.eos])
    for teacher in teachers:
        if teacher.model is not None:  # after the digests, which read the weights where they were loaded
            with naming_teacher(teacher.label):
                place(teacher.model, teacher.config.teacher.placement, device)
    checkpointing = load.recomputes_activations(config.train, device)
    policy = Policy(student, ids.vocabulary, choices["head_rows"], checkpointing, config.train.compile, autocasts, ids.masked)
    trained = masters.masters if masters is not None else [weight for weight in student.parameters() if weight.requires_grad]
    strategy = prepare(accelerator, policy, make_optimizer(config, trained), masters)

    scorer = partial(make_scorer, strategy=strategy, student=student, adapters=adapters, masked=ids.masked, rows=choices["head_rows"])
    scorers: dict[str, Teacher] = {}
    samplers: dict[str, Sampler] = {}
    for teacher in teachers:
        own_bf16, pad_id = teacher.config.teaches_itself and autocasts, (own_reader or tokenizer).pad_token_id
        own_spec = replace(spec, eos=ids.ends or teacher.eos, pad_id=pad_id, vocabulary=ids.teacher_vocabulary, bf16=own_bf16)
        if teacher.model is None:
            scorers[teacher.label] = server = served[teacher.label]
            samplers[teacher.label] = ServedSampler(server.servers[0], server.name, own_spec)
            continue
        scorers[teacher.label] = scorer(teacher.model, teacher.config.teacher_weights, ids.teacher_vocabulary, own_bf16)
        samplers[teacher.label] = own_sampler = GenerateSampler(replace(own_spec, model=teacher.model))
        if not teacher.config.teaches_itself:
            with naming_teacher(teacher.label), scorers[teacher.label].ready():
                if packed:
                    check_packing(teacher.model, "teacher")
                if teacher.sees(evaluator.answered):
                    run_stoppable(accelerator, partial(own_sampler.check, "teacher"))
    reference: Teacher | None = None
    if config.ppo.reference_coef > 0:
        starts = [scorers[teacher.label] for teacher in teachers if teacher.config.teacher_is_start]
        reference = starts[0] if start is None else scorer(start, TeacherWeights.base, ids.vocabulary, autocasts)
    assert isinstance(reference, LocalTeacher | None)
    trainer = Trainer(
        config=config,
        strategy=strategy,
        student=student,
        sampler=sampler,
        evaluator=replace(evaluator, choices=choices),
        checkpoints=checkpoints,
        prompts=train_prompts,
        scoring=Step(
            config=config,
            strategy=strategy,
            teacher=as_one(scorers),
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
        saved_state={**identity(composed, accelerator, given), "prompts": len(train_prompts), "content": digests, "choices": choices},
    )
    weights = "a bf16 copy of the weights" if choices["bf16_copy"] else "the trainer's weights"
    differences = [] if own_reader is not None else pair_differences(tokenizer, eos, teachers, ids)
    return Built(
        trainer=trainer,
        tokenizer=tokenizer,
        teacher=trainer.scoring.teacher,
        teacher_sampler=of_teachers(samplers, scorers),
        teacher_eos={teacher.label: ids.ends or teacher.eos for teacher in teachers},
        adapters=adapters,
        eos=tuple(sorted({*spec.eos, *eos})),  # an end that is masked here may still be written by the trained model
        differences=differences + text_warnings([*eval_prompts, *train_prompts], tokenizer, spec.eos),
        sampling="vllm" if config.sampling.engine is Engine.vllm else f"generate with {weights}",
        served="; ".join(f"{server.name} at {', '.join(server.config.urls)}" for server in served.values()),
        rows=sum(len(dataset.rows[0]) for dataset in datasets.values()) or len(train_prompts),
    )


def check_lengths(
    config: Config, evaluator: Evaluator, student: PreTrainedModel, teachers: Sequence[TeacherParts], prompts: Sequence[Prompt]
) -> None:
    """Raise `ConfigError` where training or evaluation needs more positions than a model has."""
    new_tokens = config.sampling.max_new_tokens
    check_positions(student, "model", "sampling.max_new_tokens", [len(prompt.ids) for prompt in prompts], new_tokens)
    evaluator.check_positions(student, "model")
    for teacher in teachers:
        if teacher.model is not None:
            lengths = [max(map(len, prompt.scored_views)) for prompt in teacher.sees(prompts)]
            check_positions(teacher.model, "teacher", "sampling.max_new_tokens", lengths, new_tokens)
            evaluator.check_positions(teacher.model, "teacher", teacher.label)


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


def make_scorer(
    model: PreTrainedModel,
    weights: TeacherWeights,
    vocabulary: int,
    bf16: bool,
    *,
    strategy: Strategy,
    student: PreTrainedModel,
    adapters: Any | None,
    masked: Tensor | None,
    rows: int,
) -> LocalTeacher:
    """Return what scores with a module of this process, which may be the student itself.

    Args:
        weights: Those of the student's start are without its adapters.
        bf16: Whether it computes under autocast.
    """
    is_student = model is student
    changes = weights in (TeacherWeights.current, TeacherWeights.ema)
    return (ChangingTeacher if changes else LocalTeacher)(
        model,
        vocabulary,
        adapters if is_student and weights is TeacherWeights.base else None,
        rows,
        bf16=bf16,
        device=strategy.accelerator.device,
        ready=strategy.gathered_weights if is_student else None,
        masked=masked,
    )


def make_optimizer(config: Config, parameters: Sequence[Tensor]) -> Optimizer:
    """Return AdamW, in one fused kernel or with states in 8 bits (arXiv 2110.02861), with weight decay on matrices only.

    Raises `ConfigError` where the package of the 8-bit one is missing.
    """
    optim = config.optim
    assert optim.lr is not None  # `build` chose one
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


def pair_differences(
    tokenizer: PreTrainedTokenizerBase, eos: tuple[int, ...], teachers: Sequence[TeacherParts], ids: SharedIds
) -> list[str]:
    """Return what differs between the student and each teacher, one line each, with the teacher's label first."""
    lines = []
    for teacher in teachers:
        found = load.pair_differences(tokenizer, teacher.tokenizer, (eos, teacher.eos), ids.overlap, ids.ends or ())
        lines += [f"{teacher.label}: {difference}" if teacher.label else difference for difference in found]
    return lines
