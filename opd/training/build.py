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
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.schema import Config, Engine, Placement, Quantization, TokenAlignment
from opd.data.prompts import Prompt, closing_token, encode_rows, text_warnings, without_template
from opd.data.rewards import Grader, make_grader
from opd.data.sources import Rows, check_rows, load_rows
from opd.data.spans import Aligner
from opd.data.token_bytes import TokenBytes, check_student, check_teacher
from opd.errors import ConfigError, DataError
from opd.models import load
from opd.models.device import autocast
from opd.models.distributed import on_main_process, prepare, run_stoppable, shards_weights
from opd.models.masters import MasterWeights
from opd.models.memory import head_rows
from opd.models.policy import (
    Policy,
    add_adapters,
    check_packing,
    check_positions,
    fuse_layers,
    position_limit,
    prepare_student,
    prepare_teacher,
    uses_packing,
)
from opd.samplers import Decoding, GenerateSampler, Sampler, SamplerSpec, longest_sequence, make_sampler
from opd.samplers.vllm import check_installed
from opd.samplers.vllm_server import ServedSampler
from opd.teachers import LocalTeacher, ServedTeacher, Teacher, loading_device, place
from opd.training.checkpoint import Checkpoints
from opd.training.evaluate import Evaluator
from opd.training.identity import content, digest_tokenizer, identity
from opd.training.loop import Trainer
from opd.training.speed import measure_speed
from opd.training.step import Step

CANARY_PROMPTS = 8
PROBED_PROMPTS = 512  # whose texts the tokenizer of a teacher with other tokens has to keep


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
    """

    trainer: Trainer
    tokenizer: PreTrainedTokenizerBase
    teacher: Teacher
    teacher_sampler: Sampler
    teacher_eos: tuple[int, ...]
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
    if given.teacher is not None and config.teacher.url is not None:
        raise ConfigError("teacher.url: a teacher was passed as a module too; leave one of them out")
    device, sharded = accelerator.device, shards_weights(accelerator)
    bf16 = load.computes_in_bf16(config.model.dtype, device)
    autocasts = bf16 and sharded  # without sharding the weights themselves are bf16, with float32 masters
    tokenizer = given.tokenizer or load.load_tokenizer(config.model, "model")
    spans = config.teacher.alignment is TokenAlignment.spans
    teacher_tokenizer = tokenizer if given.teacher is not None and not spans else load.load_tokenizer(config.teacher, "teacher")
    if not spans:
        load.check_same_ids(tokenizer, teacher_tokenizer)
    train_prompts, eval_prompts = load_prompts(config, tokenizer, given, teacher_tokenizer)
    grader = make_run_grader(config, [*train_prompts, *eval_prompts], stack)

    torch.manual_seed(config.seed)
    student, adapters = build_student(config, given, device, autocasts)
    masters = MasterWeights(student) if bf16 and not sharded else None
    is_served = config.teacher.url is not None
    teacher_model = None if is_served else student if config.shares_base else build_teacher(config, given, accelerator)
    eos, teacher_eos = load.eos_ids(student, tokenizer), load.eos_ids(teacher_model, teacher_tokenizer)
    aligner = None
    if spans:
        vocabulary = load.shared_vocabulary(tokenizer, student, None)
        teacher_vocabulary = max(teacher_tokenizer.get_vocab().values()) + 1
        if teacher_model is not None:
            teacher_vocabulary = load.shared_vocabulary(teacher_tokenizer, teacher_model, None)
        load.check_known([replace(prompt, teacher_ids=None) for prompt in (*train_prompts, *eval_prompts)], tokenizer, vocabulary)
        load.check_known([prompt.for_teacher() for prompt in (*train_prompts, *eval_prompts)], teacher_tokenizer, teacher_vocabulary)
        limit = longest_for_teacher(config, train_prompts, eval_prompts) if teacher_model is None else position_limit(teacher_model)
        aligner = make_aligner(config, tokenizer, teacher_tokenizer, (eos, teacher_eos), [*train_prompts, *eval_prompts], limit)
        if is_served:
            teacher_eos = tuple({*teacher_eos, aligner.teacher_end})  # a tokenizer names one token
    else:
        vocabulary = teacher_vocabulary = load.shared_vocabulary(tokenizer, student, teacher_model)
        load.check_known([*train_prompts, *eval_prompts], tokenizer, vocabulary)
        if is_served and set(teacher_eos) <= set(eos):
            teacher_eos = eos  # a tokenizer names one token, a model may have more
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
    )
    evaluator = make_evaluator(config, accelerator, tokenizer, eval_prompts, grader, vocabulary, autocasts, teacher_tokenizer)
    local = {"model": student} if teacher_model is None else {"model": student, "teacher": teacher_model}
    for role, model in local.items():
        lengths = [len(prompt.seen_by_teacher if role == "teacher" else prompt.ids) for prompt in train_prompts]
        check_positions(model, role, "sampling.max_new_tokens", lengths, config.sampling.max_new_tokens)
        check_evaluated_positions(evaluator, model, role)
    packed = all(uses_packing(model, config.train.packing) for model in local.values())
    if packed:
        with autocast(device, autocasts):
            check_packing(student, "model")
    choices = choices or make_choices(config, accelerator, spec, max(vocabulary, teacher_vocabulary))
    # Copies and checks the student, before it is sharded. A signal during the check stops all processes.
    sampler = run_stoppable(accelerator, lambda: make_sampler(config, spec, choices["bf16_copy"]))
    if isinstance(sampler, GenerateSampler):
        choices["bf16_copy"] = sampler.copy is not None
    decodes_in = None if config.sampling.engine is Engine.vllm else torch.bfloat16 if choices["bf16_copy"] else student.dtype
    speed = measure_speed(config, student, teacher_model, bf16, decodes_in)
    digests = on_main_process(accelerator, lambda: content(tokenizer, student, teacher_model, train_prompts, eval_prompts))
    if spans:
        digests["the teacher's tokenizer"] = digest_tokenizer(teacher_tokenizer)
    if teacher_model is not None:
        place(teacher_model, config.teacher.placement, device)  # after the digests, which read the weights where they were loaded
    checkpointing = load.recomputes_activations(config.train, device)
    policy = Policy(student, vocabulary, choices["head_rows"], checkpointing, config.train.compile, bf16=autocasts)
    trained = masters.masters if masters is not None else [weight for weight in student.parameters() if weight.requires_grad]
    strategy = prepare(accelerator, policy, make_optimizer(config, trained), masters)
    teacher_spec = replace(
        spec,
        model=teacher_model or student,
        eos=teacher_eos,
        pad_id=teacher_tokenizer.pad_token_id if spans else spec.pad_id,
        vocabulary=teacher_vocabulary,
        bf16=config.shares_base and autocasts,
    )
    teacher: Teacher
    teacher_sampler: Sampler
    if teacher_model is None:
        teacher = served = connect_teacher(config, accelerator, teacher_tokenizer, teacher_vocabulary, train_prompts, eval_prompts, choices)
        teacher_sampler = ServedSampler(served.servers[0], served.name, teacher_spec)
    else:
        teacher = LocalTeacher(
            teacher_model,
            teacher_vocabulary,
            adapters if config.shares_base else None,
            choices["head_rows"],
            bf16=config.shares_base and autocasts,
            device=device,
            ready=strategy.gathered_weights if config.shares_base else None,
        )
        teacher_sampler = local_sampler = GenerateSampler(teacher_spec)
        if not config.shares_base:
            with teacher.ready():
                if packed:
                    check_packing(teacher_model, "teacher")
                if evaluator.answered:
                    run_stoppable(accelerator, lambda: local_sampler.check("teacher"))
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
            aligner=aligner,
        ),
        speed=speed,
        max_steps=total_steps(config, len(train_prompts), accelerator.num_processes),
        saved_state={**identity(config, accelerator), "prompts": len(train_prompts), "content": digests, "choices": choices},
    )
    weights = "a bf16 copy of the weights" if choices["bf16_copy"] else "the trainer's weights"
    sampling = "vllm" if config.sampling.engine is Engine.vllm else f"generate with {weights}"
    warnings = text_warnings([*eval_prompts, *train_prompts], tokenizer, eos)
    differences = warnings if spans else [*load.pair_differences(tokenizer, teacher_tokenizer, (eos, teacher_eos)), *warnings]
    place_of_teacher = "" if teacher_model is not None else f"{served.name} at {', '.join(config.teacher.urls)}"
    return Built(trainer, tokenizer, teacher, teacher_sampler, teacher_eos, adapters, eos, differences, sampling, place_of_teacher)


def build_student(config: Config, given: Given, device: torch.device, bf16: bool) -> tuple[PreTrainedModel, Any | None]:
    """Return the student and peft's handle on its adapters."""
    if given.student is not None and given.student is given.teacher:
        raise ConfigError("model and teacher_model are the same module, but the teacher must not change: load it twice")
    model = given.student or load.load_model(config.model, "model", device)
    student = prepare_student(model, device, bf16, frozen=config.lora.rank > 0)
    if can_fuse(config):
        fuse_layers(student)
    return student, add_adapters(student, config.lora) if config.lora.rank else None


def build_teacher(config: Config, given: Given, accelerator: Accelerator) -> PreTrainedModel:
    if given.teacher is not None and config.teacher.quantization is not Quantization.none:
        raise ConfigError(
            f"teacher.quantization={config.teacher.quantization.value}: models are quantised on loading; pass the teacher's path"
        )
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
    train: Sequence[Prompt],
    evaluation: Sequence[Prompt],
    choices: dict[str, Any],
) -> ServedTeacher:
    """Return the served teacher. Its scores of the first prompts are in `choices`, and have to be the same when the run is resumed."""
    longest = longest_for_teacher(config, train, evaluation) + 1
    canary = [tokenizer.eos_token_id, *(token for prompt in train[:CANARY_PROMPTS] for token in prompt.seen_by_teacher)]
    teacher = ServedTeacher(config.teacher, tokenizer, vocabulary, longest, canary[: longest - 1])
    teacher.reference = [] if config.resume_force else choices.get("canary", [])
    on_main_process(accelerator, teacher.check)
    choices["canary"] = teacher.reference
    return teacher


def longest_for_teacher(config: Config, train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> int:
    """Return the most tokens that a served teacher reads. In its own tokens a completion may take twice as many; more are not scored."""
    spare = config.sampling.max_new_tokens if config.teacher.alignment is TokenAlignment.spans else 0
    return longest_sequence(config, [prompt.for_teacher() for prompt in (*train, *evaluation)]) + spare


def can_fuse(config: Config) -> bool:
    """Return whether Liger's kernels may be used: not where the teacher computes on another device than the student."""
    return config.teacher.placement is not Placement.device


def make_aligner(
    config: Config,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    eos: tuple[Sequence[int], Sequence[int]],
    prompts: Sequence[Prompt],
    limit: int | None = None,
) -> Aligner:
    """Return what aligns the student's completions with the teacher's tokens.

    Args:
        eos: The ids that end a completion of the student, and one of the teacher.
        prompts: Their texts probe the teacher's tokenizer.
        limit: Tokens that the teacher can read; None for any number.

    Raises:
        ConfigError: One of the tokenizers does not say which bytes its tokens cover, or the teacher's changes texts.
        DataError: A prompt has no messages to render for the teacher.
    """
    ours, theirs = TokenBytes(student, "model"), TokenBytes(teacher, "teacher")
    check_student(ours)
    check_teacher(theirs, [text for prompt in prompts[:PROBED_PROMPTS] for text in (prompt.text, *prompt.answers) if text])
    for prompt in prompts:
        if prompt.teacher_ids is None:
            raise DataError(
                f"row {prompt.sample_id}: teacher.alignment=spans: a prompt given as ids has no messages to render for the teacher; give "
                "its text or messages"
            )
    kwargs = config.data.chat_template_kwargs
    end, teacher_end = closing_token(student, kwargs), closing_token(teacher, without_template(kwargs))
    end = end if end in eos[0] else student.eos_token_id
    # The teacher need not stop there itself: its template says how an answer ends.
    is_control = teacher_end is not None and (teacher_end in eos[1] or theirs.piece(teacher_end) is None)
    teacher_end = teacher_end if is_control else teacher.eos_token_id
    assert end is not None and teacher_end is not None  # `load_tokenizer` sees to it
    return Aligner(ours, theirs, end, teacher_end, frozenset(eos[0]), limit)


def describe_alignment(aligner: Aligner) -> str:
    """Return what a person should know of a teacher with another tokenizer."""
    end, teacher_end = aligner.student.name(aligner.end), aligner.teacher.name(aligner.teacher_end)
    others = ", ".join(repr(aligner.student.name(token)) for token in sorted(aligner.eos - {aligner.end}))
    also = f"; {others} also ends the student and is never trained on" if others else ""
    return (
        f"teacher.alignment=spans: the teacher reads its own prompts and tokens; end of turn {end!r} for the student, {teacher_end!r} for "
        f"the teacher{also}; no KL over the vocabulary in evaluations, reverse_kl of each step estimates it"
    )


def make_choices(config: Config, accelerator: Accelerator, spec: SamplerSpec, vocabulary: int) -> dict[str, Any]:
    """Return decisions that depend on the machine. All processes agree on them, and a resumed run keeps them: others would round otherwise.

    `head_rows`: tokens whose logits exist at a time. `max_tokens`: of a micro-batch, halved when memory runs out. `bf16_copy`: whether to
    sample with a bf16 copy of the weights.
    """
    rows = torch.tensor([head_rows(vocabulary, accelerator.device)], device=accelerator.device)
    return {
        "head_rows": int(accelerator.gather(rows).min()),
        "max_tokens": config.train.max_tokens_per_micro_batch,
        "bf16_copy": on_main_process(
            accelerator, lambda: load.uses_bf16_copy(config.sampling.dtype, spec.model.device, spec.model.dtype == torch.bfloat16)
        ),
    }


def resumed_choices(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return the choices of the run that `state` is of. Micro-batches that were halved stay so until another size is asked for."""
    asked = config.train.max_tokens_per_micro_batch
    changed = asked != state["config"]["train"]["max_tokens_per_micro_batch"]
    return {**state["choices"], **({"max_tokens": asked} if changed else {})}


def load_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, given: Given, teacher_tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[Prompt]]:
    """Return prompts to train and to evaluate on. Raises `DataError` where rewards are asked for and nothing can be judged."""
    if given.prompts is not None:
        return given.prompts
    if given.train_rows is None:
        train_rows, eval_rows = load_rows(config.data)
    else:
        train_rows, eval_rows = check_rows(given.train_rows, given.eval_rows or [], config.data)
    theirs = config.teacher.system, teacher_tokenizer if config.teacher.alignment is TokenAlignment.spans else None
    train_prompts = encode_rows(train_rows, tokenizer, config.data, "training", *theirs)
    eval_prompts = encode_rows(eval_rows, tokenizer, config.data, "evaluation", *theirs) if len(eval_rows) else []
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
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> Evaluator:
    has_distributions = config.teacher.url is None and config.teacher.alignment is TokenAlignment.ids  # over one vocabulary, and sent
    judged = [prompt for prompt in prompts if can_judge(prompt)]
    return Evaluator(
        accelerator,
        tokenizer,
        answered=judged[: config.eval.limit] if config.eval.reward is not None else [],
        kl_prompts=prompts[: config.eval.kl_prompts] if has_distributions else [],
        decoding=Decoding(config.eval.temperature, config.eval.max_new_tokens, batch_size=config.eval.batch_size),
        kl_decoding=Decoding(1.0, config.eval.kl_max_new_tokens, batch_size=config.eval.batch_size),
        grader=grader,
        max_tokens=config.train.max_tokens_per_micro_batch,
        vocabulary=vocabulary,
        precision=partial(autocast, accelerator.device, bf16),
        teacher_tokenizer=teacher_tokenizer,
    )


def check_evaluated_positions(evaluator: Evaluator, model: PreTrainedModel, role: str) -> None:
    """Raise `ConfigError` where an evaluation needs more positions than the model has."""
    for option, prompts, decoding in (
        ("eval.max_new_tokens", evaluator.answered, evaluator.decoding),
        ("eval.kl_max_new_tokens", evaluator.kl_prompts, evaluator.kl_decoding),
    ):
        lengths = [len(prompt.seen_by_teacher if role == "teacher" else prompt.ids) for prompt in prompts]
        check_positions(model, role, option, lengths, decoding.max_new_tokens if prompts else 0)


def make_optimizer(config: Config, parameters: Sequence[Tensor]) -> AdamW:
    """Return AdamW in one fused kernel, with weight decay on matrices only."""
    optim = config.optim
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = optim.betas
    return AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=(beta1, beta2), eps=optim.eps, fused=True)


def total_steps(config: Config, prompts: int, processes: int) -> int:
    """Return `train.max_steps`, or the number of steps of `train.epochs`."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * prompts / (config.train.batch_size * processes))
