"""Estimate the memory that one process of a run needs, before any weights are loaded.

Parameters are counted on models without storage, built from `config.json` alone. What a layer saves for the backward pass is measured on
copies of the student with one and two layers and random weights. The rest is arithmetic, in bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd.config.options import (
    Dtype,
    Engine,
    Estimator,
    ModelConfig,
    OptimizerName,
    Placement,
    Quantization,
    TeacherConfig,
    TeacherWeights,
    naming_teacher,
)
from opd.config.schema import Config
from opd.data.order import prompt_order
from opd.data.prompts import Prompt, first_of_each
from opd.data.rollouts import split_by_tokens
from opd.errors import ConfigError
from opd.models.adapters import lora_options
from opd.models.device import free_memory
from opd.models.load import computes_in_bf16, load_config, recomputes_activations, uses_bf16_copy
from opd.models.measured import activations_of_layer, cache_bytes, measure
from opd.models.policy import MODEL_ERRORS, add_adapters, decoder_layers, padding_limit
from opd.objective import chunk_rows
from opd.objective.head import PIECE_BYTES
from opd.runs.text import format_bytes

FLOAT32, BFLOAT16 = 4, 2
NF4 = 0.5 + 4 / 64  # with one float32 scale for every 64 numbers
START = TeacherWeights.base
MOMENTS = 2  # AdamW's, for each trained parameter
MOMENT_8BIT, UNQUANTIZED = 1 + 4 / 256, 4096  # bytes of one, with a float32 scale for every 256; tensors of fewer numbers keep float32
STEP_8BIT = 6  # float32 copies of the largest tensor that bitsandbytes' step makes on a CPU: moments, gradient, and what rounds them again
LOGITS_COPIES = 4  # float32 copies of a decoding batch's logits while its next tokens are drawn
# Share of all layers' activations, where some are freed while others stay. On a CPU glibc's heap keeps freed blocks of up to 32 MiB, and
# many of the next ones do not fit: SmolLM2-135M needed 0.25 more with recomputed activations, 0.74 more with adapters, and nothing more
# with MALLOC_MMAP_THRESHOLD_=65536, that is, without the heap.
HEAP_SLACK = 0.42
STEPS = 20  # steps whose prompts decide how large micro-batches become


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one process needs on its device, by purpose, without the CUDA context.

    Attributes:
        resident: throughout the run.
        sampling: in addition while sampling or evaluating.
        update: in addition during the update.
    """

    resident: dict[str, int]
    sampling: dict[str, int]
    update: dict[str, int]

    @property
    def largest_phase(self) -> tuple[str, dict[str, int]]:
        phases = (("during the update", self.update), ("while sampling", self.sampling))
        return max(phases, key=lambda phase: sum(phase[1].values()))

    @property
    def parts(self) -> dict[str, int]:
        """The bytes at the peak, by purpose."""
        return {**self.resident, **self.largest_phase[1]}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """The bytes at the peak that the process does not use already."""
        return self.peak - self.resident["the process"]

    def to_dict(self) -> dict[str, Any]:
        return {"resident": self.resident, "sampling": self.sampling, "update": self.update, "peak": self.peak}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size)
        rest = "" if "activations" in self.update else "; activations, samples and the process itself are not included"
        return f"memory of each process, largest {self.largest_phase[0]}: {format_bytes(self.peak)} ({parts}){rest}"


def estimate(
    config: Config,
    processes: int,
    device: torch.device,
    sharded: bool = False,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]] | None = None,
    in_use: Callable[[], int] = int,
    free: int | None = None,
) -> Memory:
    """Estimate what `config` needs in each process.

    Args:
        processes: of the run.
        device: the student's.
        sharded: FSDP2 shards the student's weights, gradients and optimizer over all processes and gathers one layer at a time.
        prompts: those to train and to evaluate on; without them activations and samples are left out.
        in_use: returns the bytes that the process uses, once layers were measured: a CPU's heap keeps some of theirs.
        free: bytes that the device has besides; None to ask it.

    Raises:
        ConfigError: a model's config cannot be read.
    """
    student = empty_model(config.model, "model")
    teachers = []
    for label, part in config.parts_by_teacher.items():
        if part.teacher.url is None:
            with naming_teacher(label):
                teachers.append((part, student if part.teaches_itself else empty_model(part.teacher, "teacher")))
    parameters = count(student)
    uses_line = device.type == "cuda" and not sharded and config.sampling.engine is not Engine.vllm
    sampling = {} if prompts is None else sampling_bytes(config, student, teachers, *prompts, device, uses_line)  # without adapters
    bf16 = computes_in_bf16(config.model.dtype, device)
    quantized = quantized_bytes(student, config.model.quantization, width_of(config.model.dtype, device))  # less than 0
    # The files of quantised weights stay mapped into memory on a CPU: embeddings are not copied out of them.
    mapped = BFLOAT16 * quantized_numbers(student, config.model.quantization)
    mapped += BFLOAT16 * sum(quantized_numbers(model, part.teacher.quantization) for part, model in teachers if not part.teaches_itself)
    if config.lora.rank:
        student.requires_grad_(False)
        add_adapters(student, lora_options(config))
    trained, weights = trained_bytes(student), weight_bytes(student, bf16) + quantized
    # Teachers that are the student share a copy.
    kinds = {(part.teacher_weights, part.starts_at_base or (part.lora.rank > 0 and not part.names_weights)) for part, _ in teachers}
    copied = sum(copy_bytes(*kind, trained, weights, bf16, sharded) for kind in kinds)
    anchor = copy_bytes(START, config.starts_at_base, trained, weights, bf16, sharded)
    is_anchored = config.ppo.reference_coef > 0 and not any(part.teacher_is_start for part, _ in teachers)
    if bf16 and not sharded:
        weights += trained * BFLOAT16 // FLOAT32  # float32 masters in addition to the bf16 module
    share = 1 / processes if sharded else 1.0
    resident = {
        "the process": 0,
        "student": round(share * weights),
        "teacher": sum(teacher_bytes(part.teacher, model, processes, device) for part, model in teachers if not part.teaches_itself)
        + copied,
        "optimizer": round(share * optimizer_bytes(student, config.optim.name)),
    }
    if device.type == "cpu" and mapped:
        resident["mapped files"] = mapped
    if is_anchored:
        resident["reference"] = anchor
    if "decode line" in sampling:
        resident["decode line"] = sampling.pop("decode line")
    update = {"gradients": trained}
    if sharded:
        blocks = decoder_layers(student)
        rest = weights - sum(weight_bytes(block, bf16) for block in blocks)
        trained_rest = trained - sum(map(trained_bytes, blocks))
        sampling["gathered weights"] = weights
        # The next layer is gathered during a layer's backward pass; a gradient is copied once to be sent.
        update["gathered weights"] = rest + 2 * max(weight_bytes(block, bf16) for block in blocks)
        update["gradients"] = round(share * trained) + 2 * max(trained_rest, *map(trained_bytes, blocks))
    if prompts is not None:
        sampling["bf16 copy"] = BFLOAT16 * parameters if samples_with_copy(config, device, sharded) else 0
        update |= update_bytes(config, student, prompts[0], device, free_memory(device) if free is None else free)
    resident["the process"] = in_use()
    if config.optim.name is OptimizerName.adamw8bit and device.type == "cpu":
        largest = max(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        passes = update.get("activations", 0) + update.get("head chunks", 0)  # which are freed by then
        update["8-bit step"] = max(0, STEP_8BIT * FLOAT32 * largest - passes)
    return Memory(resident, sampling, update)


def samples_with_copy(config: Config, device: torch.device, sharded: bool = False) -> bool:
    """Return whether this process samples with a copy of the weights in bf16, of `generate` or of vLLM."""
    if config.sampling.engine is Engine.vllm:
        return not config.sampling.by_server
    if config.model.quantization is not Quantization.none:
        return False
    return uses_bf16_copy(config.sampling.dtype, device, computes_in_bf16(config.model.dtype, device) and not sharded)


def sampling_bytes(
    config: Config,
    student: PreTrainedModel,
    teachers: Sequence[tuple[Config, PreTrainedModel]],
    train: Sequence[Prompt],
    evaluation: Sequence[Prompt],
    device: torch.device,
    uses_line: bool,
) -> dict[str, int]:
    """Return what decoding needs at most: the cache and logits of a step's batch, or of an evaluation's, which teachers answer too.

    A decode line stays for the run; what a step's batch needs besides is the cache of its prompts.
    """
    sampling, evaluated = config.sampling, config.eval
    longest = max(len(prompt.ids) for prompt in (*train, *evaluation))
    width = BFLOAT16 if samples_with_copy(config, device) else width_of(config.model.dtype, device)
    of_student = measure("the cache", cache_bytes, student, width)
    of_teachers = [measure("the cache", cache_bytes, model, width_of(part.teacher.dtype, device)) for part, model in teachers]
    rows = min(sampling.batch_size, config.train.batch_size * sampling.n)
    batches = [(rows, 0 if uses_line else sampling.max_new_tokens, [of_student])]
    if evaluated.reward is not None:
        rows = min(evaluated.batch_size, len(first_of_each(evaluation, evaluated.limit)))
        batches.append((rows, evaluated.max_new_tokens, [of_student, *of_teachers]))
    if evaluated.kl_prompts:
        rows = min(evaluated.batch_size, len(first_of_each(evaluation, evaluated.kl_prompts)))
        batches.append((rows, evaluated.kl_max_new_tokens, [of_student]))
    vocabulary = student.config.get_text_config().vocab_size
    needed = {}
    if uses_line:
        length = line_length(longest + max(sampling.max_new_tokens, evaluated.max_new_tokens, evaluated.kl_max_new_tokens))
        needed["decode line"] = round(sampling.batch_size * (length * of_student[0] + FLOAT32 * vocabulary))
    sizes = [rows * ((longest + new) * per_token + constant) for rows, new, caches in batches for per_token, constant in caches]
    logits = LOGITS_COPIES * FLOAT32 * max(rows for rows, _, _ in batches) * vocabulary
    return needed | {"KV cache": round(max(sizes)), "logits": logits}


def line_length(tokens: int) -> int:
    """Return the positions of a decode line's cache for so many tokens: a multiple of 64, which saves padding of the mask in attention."""
    return -(-tokens // 64) * 64


def update_bytes(config: Config, student: PreTrainedModel, prompts: Sequence[Prompt], device: torch.device, free: int) -> dict[str, int]:
    """Return what the forward and backward pass of the largest micro-batch needs, apart from the gradients of the weights."""
    text = student.config.get_text_config()
    rows, width = largest_micro_batch(config, prompts, device)
    bf16 = computes_in_bf16(config.model.dtype, device)
    per_token, constant = measure("activations", activations_of_layer, student.config, width, bf16, lora_options(config))
    layer = rows * width * per_token + constant
    activations = text.num_hidden_layers * layer
    recomputes = recomputes_activations(config.train, device)
    frees_some = recomputes or config.lora.rank > 0
    slack = HEAP_SLACK * activations if frees_some and device.type == "cpu" else 0
    if recomputes:
        activations = text.num_hidden_layers * rows * width * text.hidden_size * (BFLOAT16 if bf16 else FLOAT32) + layer
    copies = 1 if config.ppo.estimator is Estimator.sampled else 3
    chunk = min(head_rows(text.vocab_size, device, free), rows * config.sampling.max_new_tokens)
    # The chunked head computes a gradient of its weight in addition to the accumulated one; a tied embedding computes another.
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    head = 0 if config.lora.rank else (2 if tied else 1) * FLOAT32 * text.vocab_size * text.hidden_size
    logits = (copies + 1) * FLOAT32 * chunk * text.vocab_size
    if device.type == "cpu":
        logits = (BFLOAT16 if bf16 else FLOAT32) * chunk * text.vocab_size + min(logits, (copies + 1) * PIECE_BYTES)
    return {"activations": round(activations + slack), "head chunks": logits + head}


def head_rows(vocabulary: int, device: torch.device, free: int) -> int:
    """Return how many tokens' logits exist at a time: in a twentieth of the free memory, at most 304 MiB (2 GiB on a GPU).

    A CPU gains nothing from more than 256 of them, or 16 MiB of logits.
    """
    on_gpu = device.type == "cuda"
    rows = chunk_rows(vocabulary, min(free // 20, 2**31 if on_gpu else 304 * 2**20))
    return rows if on_gpu else min(rows, max(256, 2**24 // (4 * vocabulary)))


def largest_micro_batch(config: Config, prompts: Sequence[Prompt], device: torch.device) -> tuple[int, int]:
    """Return rows and width in tokens of the largest micro-batch of the first steps if all completions reach their limit."""
    size, largest, order = config.train.batch_size, (0, 0), prompt_order(config, prompts)
    for step in range(STEPS):
        drawn = [prompts[order.at(position)[1]] for position in range(step * size, (step + 1) * size)]
        lengths = [prompt.longest + config.sampling.max_new_tokens for prompt in drawn]
        lengths = [length for length in lengths for _ in range(config.sampling.n)]
        groups = split_by_tokens(lengths, config.train.max_tokens_per_micro_batch, max_padding=padding_limit(device))
        largest = max(largest, *((len(group), lengths[group[0]]) for group in groups), key=math.prod)
    return largest


def teacher_bytes(config: TeacherConfig, model: PreTrainedModel, processes: int, device: torch.device) -> int:
    """Return what the teacher's weights need on the student's device."""
    width, sizes = width_of(config.dtype, device), list(map(count, decoder_layers(model)))
    total = width * count(model) + quantized_bytes(model, config.quantization, width)
    match config.placement:
        case Placement.same:
            return total
        case Placement.device:
            return total if device.type == config.device else width * model.get_output_embeddings().weight.numel()
        case Placement.sharded:
            return total + round(width * sum(sizes) / processes)
        case Placement.offload:
            arriving = width * max(map(sum, pairwise([0, *sizes])))  # the next layer is copied while one computes
            return arriving + (total if device.type == "cpu" else total - width * sum(sizes))


def copy_bytes(kind: TeacherWeights, turns_off: bool, trained: int, weights: int, bf16: bool, sharded: bool) -> int:
    """Return what a student that is its own teacher needs besides its own weights; nothing for another teacher.

    Args:
        turns_off: Whether adapters need only be off for the weights of the start.
        trained, weights: The student's trained weights in float32, and all of its weights as they are sharded.
    """
    if kind in (TeacherWeights.own, TeacherWeights.current) or (kind is START and turns_off):
        return 0
    if sharded:  # whole in each process, and so are the frozen weights that it shared with the student before
        return weights
    copied = trained * BFLOAT16 // FLOAT32 if bf16 else trained
    return copied + (trained if bf16 and kind is TeacherWeights.ema else 0)  # bf16 to compute with, the average in float32


def quantized_bytes(model: PreTrainedModel, quantization: Quantization, width: int) -> int:
    """Return by how many bytes quantisation changes the size of weights of `width` bytes: less than 0, or 0 without it."""
    return round(((1 if quantization is Quantization.int8 else NF4) - width) * quantized_numbers(model, quantization))


def quantized_numbers(model: PreTrainedModel, quantization: Quantization) -> int:
    """Return how many numbers of the model are quantised: those of its layers' matrices, or none."""
    blocks = [] if quantization is Quantization.none else decoder_layers(model)
    return sum(module.weight.numel() for block in blocks for module in block.modules() if isinstance(module, nn.Linear))


def optimizer_bytes(model: nn.Module, name: OptimizerName) -> int:
    """Return what the optimizer keeps for the trained parameters."""
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    is_8bit = name is OptimizerName.adamw8bit
    return round(sum(MOMENTS * size * (MOMENT_8BIT if is_8bit and size >= UNQUANTIZED else FLOAT32) for size in sizes))


def empty_model(config: ModelConfig, role: str) -> PreTrainedModel:
    """Return the model without storage for its weights."""
    settings = load_config(config, role)
    # In bf16: grouped products of experts know no other dtype without storage. Bytes are counted for the dtypes that the run uses.
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                settings, dtype=torch.bfloat16, trust_remote_code=config.trust_remote_code
            )
    except MODEL_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{role}.path={config.path} cannot be built: {reason}; use another architecture") from error
    return model


def width_of(dtype: Dtype, device: torch.device) -> int:
    """Return the bytes of a number that a model of this dtype computes with."""
    return BFLOAT16 if computes_in_bf16(dtype, device) else FLOAT32


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trained_bytes(module: nn.Module) -> int:
    return FLOAT32 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def weight_bytes(module: nn.Module, bf16: bool) -> int:
    frozen = sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
    return trained_bytes(module) + (BFLOAT16 if bf16 else FLOAT32) * frozen
