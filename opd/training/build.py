"""From a typed config to everything a run needs: models, data, sampler, teacher, evaluator, trainer."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.schema import Config, Engine, Placement, Quantization
from opd.data.prompts import Prompt, encode_rows
from opd.data.rewards import Grader, make_grader
from opd.data.rollouts import Request
from opd.data.sources import Rows, check_rows, load_rows
from opd.errors import ConfigError, DataError
from opd.models import load as models
from opd.models import sharding
from opd.models.accelerator import SHARDING, layerwise, prepare, shards_weights
from opd.models.policy import Policy, add_adapters, autocast, free_memory, prepare_student, prepare_teacher, uses_packing
from opd.models.together import on_main_process
from opd.objective import chunk_rows
from opd.samplers import Choice, Decoding, GenerateSampler, Material, Sampler, choose, longest, make_sampler
from opd.samplers.vllm import check_installed
from opd.teachers import LocalTeacher, home, place
from opd.training.batches import Batches
from opd.training.checkpoint import Checkpoints
from opd.training.evaluate import Evaluator
from opd.training.identity import content, identity
from opd.training.loop import Trainer
from opd.training.overlap import can_overlap
from opd.training.update import Update

ADAM_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a caller brings along instead of names: modules, a tokenizer, rows, or prompts to train and to evaluate on."""

    student: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train_rows: Rows | None = None
    eval_rows: Rows | None = None
    prompts: tuple[list[Prompt], list[Prompt]] | None = None


@dataclass(frozen=True, slots=True)
class Built:
    """A trainer, and what its surroundings need besides.

    adapters: peft's handle on the student's, if it has any. differences: what does not match between student and teacher, a line each.
    sampling: what was chosen to sample with.
    """

    trainer: Trainer
    tokenizer: PreTrainedTokenizerBase
    teacher: LocalTeacher
    teacher_sampler: Sampler
    adapters: Any | None
    eos: tuple[int, ...]
    differences: list[str]
    sampling: Choice


def build(
    config: Config, accelerator: Accelerator, checkpoints: Checkpoints, given: Given, stack: ExitStack, choices: dict[str, Any] | None
) -> Built:
    """Everything a run needs. What is cheap to check comes before what is costly to load. choices: those of the run that goes on."""
    check_engine(config)
    device = accelerator.device
    bf16 = models.computes_in_bf16(config.model.dtype, device)
    tokenizer = given.tokenizer or models.load_tokenizer(config.model, "model")
    teacher_tokenizer = tokenizer if given.teacher is not None else models.load_tokenizer(config.teacher, "teacher")
    models.check_same_ids(tokenizer, teacher_tokenizer)
    train_prompts, eval_prompts = load_prompts(config, tokenizer, given)
    grader = make_run_grader(config, [*train_prompts, *eval_prompts], stack)
    torch.manual_seed(config.seed)
    if given.student is not None and given.student is given.teacher:
        raise ConfigError("model and teacher_model are the same module: the teacher has to stay as it is; load it twice")
    student = prepare_student(given.student or models.load_model(config.model, "model", device), device, bf16, frozen=config.lora.rank > 0)
    adapters = add_adapters(student, config.lora) if config.lora.rank else None
    if config.shares_base:
        teacher_model = student
    else:
        teacher_home = home(config.teacher, device, accelerator.num_processes, shards_weights(accelerator))
        if given.teacher is not None and config.teacher.quantization is not Quantization.none:
            raise ConfigError(f"teacher.quantization={config.teacher.quantization.value}: is done on loading; give the teacher's path")
        computes_on = teacher_home if config.teacher.placement is Placement.device else device
        teacher_model = prepare_teacher(given.teacher or models.load_model(config.teacher, "teacher", computes_on), teacher_home)
    vocabulary = models.shared_vocabulary(tokenizer, student, teacher_model)
    eos, teacher_eos = models.eos_ids(student, tokenizer), models.eos_ids(teacher_model, teacher_tokenizer)
    material = Material(
        config=config,
        model=student,
        eos=eos,
        pad_id=tokenizer.pad_token_id,
        vocabulary=vocabulary,
        bf16=bf16,
        longest=longest(config, [*train_prompts, *eval_prompts]),
        leads=accelerator.is_main_process,
        sharded=shards_weights(accelerator),
    )
    choices = choices or {
        **measured_choices(config, accelerator, vocabulary),
        "sampling": choose_sampling(accelerator, material, train_prompts),
    }
    rows, sampling = choices["head_rows"], Choice.from_dict(choices["sampling"])
    sampler = make_sampler(sampling, material)  # copies what it samples with, which cannot be done once weights are sharded
    digests = on_main_process(accelerator, lambda: content(tokenizer, student, teacher_model, train_prompts, eval_prompts))
    place(teacher_model, config.teacher.placement, device)
    teacher = LocalTeacher(
        teacher_model, vocabulary, adapters if config.shares_base else None, rows, bf16=config.shares_base and bf16, device=device
    )
    policy, optimizer = prepare(
        accelerator,
        Policy(
            student,
            vocabulary,
            rows,
            config.train.activation_checkpointing or False,
            config.train.compile,
            accelerator.distributed_type in SHARDING,
        ),
        make_optimizer(config, student),
        bf16,
    )
    batches = Batches(
        config=config,
        accelerator=accelerator,
        teacher=teacher,
        pad_id=tokenizer.pad_token_id,
        packed=uses_packing(student, config.train.packing) and uses_packing(teacher_model, config.train.packing),
        choices=choices,
        teacher_ready=partial(sharding.whole, policy) if config.shares_base else teacher.ready,
    )
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        policy=policy,
        student=student,
        optimizer=optimizer,
        sampler=sampler,
        evaluator=make_evaluator(config, accelerator, tokenizer, eval_prompts, grader, vocabulary, bf16),
        checkpoints=checkpoints,
        prompts=train_prompts,
        batches=batches,
        update=Update(
            config=config,
            accelerator=accelerator,
            policy=policy,
            optimizer=optimizer,
            batches=batches,
            layerwise=layerwise(accelerator),
        ),
        max_steps=total_steps(config, len(train_prompts), accelerator.num_processes),
        overlaps=overlaps(config, sampling.engine, teacher_model.device, student.device),
        saved_state={
            **identity(config, accelerator),
            "prompts": len(train_prompts),
            "content": digests,
            "choices": choices,
        },
    )
    teacher_sampler = GenerateSampler(
        teacher_model, teacher_eos, tokenizer.pad_token_id, vocabulary, config.seed, config.shares_base and bf16
    )
    differences = models.pair_differences(tokenizer, teacher_tokenizer, (eos, teacher_eos))
    return Built(trainer, tokenizer, teacher, teacher_sampler, adapters, eos, differences, sampling)


def check_engine(config: Config) -> None:
    """Raises `ConfigError` where the engine is missing."""
    if config.sampling.engine is Engine.vllm and not config.sampling.by_server:
        check_installed()


def overlaps(config: Config, engine: Engine, teacher: torch.device, student: torch.device) -> bool:
    """Whether the teacher scores while the student samples, each on the device where its weights are."""
    apart = config.teacher.placement is Placement.device and teacher != student
    return apart and engine is Engine.generate and can_overlap(config)


def measured_choices(config: Config, accelerator: Accelerator, vocabulary: int) -> dict[str, int]:
    """What is chosen by looking at the machine: agreed by all processes, kept by a run that goes on: another would round otherwise.

    head_rows: tokens whose logits exist at a time, in a twentieth of the free memory and at most 304 MiB (2 GiB on a GPU). A CPU gains
    nothing from more than 256 of them, or 16 MiB of logits. max_tokens: `train.max_tokens_per_micro_batch` until memory runs out.
    """
    on_gpu = accelerator.device.type == "cuda"
    most = chunk_rows(vocabulary, min(free_memory(accelerator.device) // 20, 2**31 if on_gpu else 304 * 2**20))
    rows = torch.tensor([most if on_gpu else min(most, max(256, 2**24 // (4 * vocabulary)))], device=accelerator.device)
    return {"head_rows": int(accelerator.gather(rows).min()), "max_tokens": config.train.max_tokens_per_micro_batch}


def kept_choices(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The choices of the run that goes on from `state`. Micro-batches that memory had halved stay so until another size is asked for."""
    asked = config.train.max_tokens_per_micro_batch
    changed = asked != state["config"]["train"]["max_tokens_per_micro_batch"]
    return {**state["choices"], **({"max_tokens": asked} if changed else {})}


def choose_sampling(accelerator: Accelerator, material: Material, prompts: list[Prompt]) -> dict[str, Any]:
    """The main process's `Choice`, tried on a step's first prompts."""
    config = material.config
    requests = [Request(prompt, 0, attempt) for prompt in prompts[: config.train.batch_size] for attempt in range(config.sampling.n)]
    return on_main_process(accelerator, lambda: choose(config.sampling, material, requests).to_dict())


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase, given: Given) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train and to evaluate on. Raises `DataError` where rewards are asked for and nothing can be judged."""
    if given.prompts is not None:
        return given.prompts
    if given.train_rows is None:
        train_rows, eval_rows = load_rows(config.data)
    else:
        train_rows, eval_rows = check_rows(given.train_rows, given.eval_rows or [], config.data)
    system = config.teacher.system
    train_prompts = encode_rows(train_rows, tokenizer, config.data, "training", system)
    eval_prompts = encode_rows(eval_rows, tokenizer, config.data, "evaluation", system) if len(eval_rows) else []
    judged = [prompt for prompt in eval_prompts if prompt.answer is not None or prompt.get_reward is not None]
    if config.eval.reward is not None and eval_prompts and not judged:
        raise DataError(
            f"eval.reward={config.eval.reward}: no evaluation prompt has an answer (data.answer={config.data.answer}, "
            f"data.answer_after={config.data.answer_after}); name the column with the answers, or evaluate without rewards: eval=kl"
        )
    if config.ppo.reward_coef > 0 and not any(prompt.answer is not None or prompt.get_reward is not None for prompt in train_prompts):
        raise DataError(
            f"ppo.reward_coef={config.ppo.reward_coef}: no training prompt has an answer; name their column as data.answer=COLUMN"
        )
    return train_prompts, eval_prompts


def make_run_grader(config: Config, prompts: list[Prompt], stack: ExitStack) -> Grader | None:
    """The configured grader, closed with the run; None where every prompt judges itself or none is judged."""
    if config.eval.reward is None or not any(prompt.answer is not None and prompt.get_reward is None for prompt in prompts):
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
) -> Evaluator:
    judged = [prompt for prompt in prompts if prompt.answer is not None or prompt.get_reward is not None]
    return Evaluator(
        accelerator,
        tokenizer,
        answered=judged[: config.eval.limit] if config.eval.reward is not None else [],
        kl_prompts=prompts[: config.eval.kl_prompts],
        decoding=Decoding(config.eval.temperature, config.eval.max_new_tokens, batch_size=config.eval.batch_size),
        kl_decoding=Decoding(1.0, config.eval.kl_max_new_tokens, batch_size=config.eval.batch_size),
        grader=grader,
        max_tokens=config.train.max_tokens_per_micro_batch,
        vocabulary=vocabulary,
        precision=partial(autocast, accelerator.device, bf16),
    )


def make_optimizer(config: Config, student: PreTrainedModel) -> AdamW:
    """AdamW in one fused kernel; weight decay on matrices alone."""
    optim = config.optim
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = optim.betas
    return AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=(first, second), eps=ADAM_EPS, fused=True)


def total_steps(config: Config, prompts: int, processes: int) -> int:
    """`train.max_steps`, or as many as `train.epochs` take."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * prompts / (config.train.batch_size * processes))
