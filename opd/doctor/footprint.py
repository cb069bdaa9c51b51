"""How much memory a run will need, from its config and the models' configs alone: no weights are loaded.

Parameters are counted on models without storage. What a layer keeps for the backward pass is measured on two small copies of the student,
of one and of two layers, with random weights. Everything else is arithmetic, in bytes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.config.schema import Config, Engine, Estimator, LoraConfig, ModelConfig, SamplingDtype
from opd.data.order import take
from opd.data.prompts import Prompt
from opd.data.rollouts import split_by_tokens
from opd.models import load as models
from opd.models.device import autocast
from opd.models.memory import estimate
from opd.models.policy import add_adapters, padding_limit
from opd.objective import chunk_rows

FLOAT, HALF = 4, 2
STEPS_LOOKED_AT = 20  # whose prompts say how long micro-batches get
LONGEST_MEASURED = 1024  # tokens of the small copies' input
FEW = 16
# On a CPU glibc's heap keeps holes between what stays and what goes; fitted to measured peaks. With recomputed activations so many layers'
# worth, with adapters this share of the activations.
HOLES = 5.5
HOLES_OF_ADAPTERS = 0.35
DRAWING = 4  # float32 copies of a decoding batch's logits that exist while its next tokens are drawn


@dataclass(frozen=True, slots=True)
class Shape:
    """A model. parameters: their number. kv: bytes of cache a token at float32."""

    parameters: int
    hidden: int
    vocabulary: int
    layers: int
    kv: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes, by what they are for. sampling and update do not exist at the same time; the rest stays."""

    resident: dict[str, int]
    sampling: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(sum(self.sampling.values()), sum(self.update.values()))

    def to_dict(self) -> dict[str, Any]:
        return {"resident": self.resident, "sampling": self.sampling, "update": self.update, "peak": self.peak}


def shape_of(config: ModelConfig, role: str) -> tuple[Shape, Any]:
    """The model's shape and its transformers config. Raises `ConfigError` where it cannot be had."""
    stored = models.load_with(AutoConfig.from_pretrained, config, role)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stored, trust_remote_code=config.trust_remote_code)
    text = stored.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        kv=2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * head_size * FLOAT,
    ), stored


def kept_by_a_layer(stored: Any, tokens: int, bf16: bool, lora: LoraConfig) -> tuple[float, float]:
    """Bytes that one layer keeps for the backward pass: for each token of sequences of so many, and whatever their length.

    The second are copies of weights that autocast makes.
    """
    few, many = FEW, max(2 * FEW, min(tokens, LONGEST_MEASURED))
    one, two = small_copy(stored, 1, lora), small_copy(stored, 2, lora)
    of_few, of_many = (kept_by(two, length, bf16) - kept_by(one, length, bf16) for length in (few, many))
    a_token = (of_many - of_few) / (many - few)
    return a_token, max(0.0, of_few - few * a_token)


def small_copy(stored: Any, layers: int, lora: LoraConfig) -> PreTrainedModel:
    """The model with so many layers, a vocabulary of eight, random weights, and adapters as configured."""
    config = copy.deepcopy(stored)
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = 8, 0, 0, 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.num_hidden_layers = layers
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    if lora.rank:
        model.requires_grad_(False)
        add_adapters(model, lora)
    return model


def kept_by(model: PreTrainedModel, tokens: int, bf16: bool) -> int:
    """Bytes that the model's layers keep for the backward pass of one sequence, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(model.device, bf16):
        output = model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    del output
    return sum(kept.values())


def micro_batch(config: Config, prompts: Sequence[Prompt], device: torch.device, packed: bool = False) -> tuple[int, int, bool]:
    """Of the largest micro-batch in the first steps: rows and their width in tokens; and whether a step has several."""
    size, n = config.train.batch_size, config.sampling.n
    largest, several = (0, 0), False
    for step in range(STEPS_LOOKED_AT):
        drawn = [index for position in range(step * size, step * size + size) for _, index in take(config.seed, len(prompts), position, 1)]
        asked = [len(prompts[index].seen_by_teacher) for index in drawn for _ in range(n)]
        lengths = [max(len(prompts[index].ids), other) for index, other in zip((i for i in drawn for _ in range(n)), asked, strict=True)]
        lengths = [length + config.sampling.max_new_tokens for length in lengths]
        groups = split_by_tokens(lengths, config.train.max_tokens_per_micro_batch, packed, padding_limit(device))
        several = several or len(groups) > 1
        largest = max(largest, *((len(group), lengths[group[0]]) for group in groups), key=lambda shape: shape[0] * shape[1])
    return (*largest, several)


def footprint(
    config: Config,
    student: Shape,
    teacher: Shape,
    stored: Any,
    prompts: Sequence[Prompt],
    evaluated: int,
    device: torch.device,
    base: int,
    free: int,
) -> Footprint:
    """evaluated: how many of the prompts an evaluation has at most. base: what the process holds before it loads weights (0 on a GPU).

    free: bytes that can be had, which decides the head's chunks.
    """
    held = estimate(config, 1, device)
    resident = {"the process": base, "student": held.weights, "teacher": held.teacher, "optimizer": held.optimizer}
    update = {"gradients": held.gradients, **update_bytes(config, student, stored, prompts, device, free)}
    return Footprint(resident, sampling_bytes(config, student, teacher, prompts, evaluated), update)


def sampling_bytes(config: Config, student: Shape, teacher: Shape, prompts: Sequence[Prompt], evaluated: int) -> dict[str, int]:
    """The most that decoding takes: a step's batch, or an evaluation's, whose cache is the teacher's too."""
    longest = max(len(prompt.ids) for prompt in prompts)
    rows = min(config.sampling.batch_size, config.train.batch_size * config.sampling.n)
    batches = [(rows, config.sampling.max_new_tokens, student.kv)]
    if config.eval.reward is not None:
        answered = min(config.eval.batch_size, config.eval.limit or evaluated, evaluated)
        batches.append((answered, config.eval.max_new_tokens, max(student.kv, teacher.kv)))
    if config.eval.kl_prompts:
        batches.append((min(config.eval.kl_prompts, config.eval.batch_size, evaluated), config.eval.kl_max_new_tokens, student.kv))
    cache = [rows * (longest + new) * kv for rows, new, kv in batches]
    most = max(rows for rows, _, _ in batches)
    twin = config.sampling.dtype is SamplingDtype.bfloat16 or config.sampling.engine is Engine.vllm
    return {
        "KV cache": max(cache),
        "logits": DRAWING * FLOAT * most * student.vocabulary,
        "bf16 copy": HALF * student.parameters if twin else 0,
    }


def update_bytes(config: Config, student: Shape, stored: Any, prompts: Sequence[Prompt], device: torch.device, free: int) -> dict[str, int]:
    """The largest micro-batch's backward pass, gradients of weights left out."""
    bf16 = models.computes_in_bf16(config.model.dtype, device)
    rows, width, _ = micro_batch(config, prompts, device)
    a_token, always = kept_by_a_layer(stored, width, bf16, config.lora)
    tokens = rows * width
    a_layer, boundary = tokens * a_token + always, tokens * student.hidden * FLOAT
    kept = student.layers * a_layer
    on_cpu = device.type == "cpu"
    if config.lora.rank:
        kept *= 1 + HOLES_OF_ADAPTERS * on_cpu
    if config.train.activation_checkpointing:
        kept = student.layers * boundary + a_layer * (1 + HOLES * on_cpu)
    copies = 1 if config.ppo.estimator is Estimator.sampled else 3
    chunk = min(head_rows(student.vocabulary, device, free), rows * config.sampling.max_new_tokens)
    frozen = config.lora.rank > 0
    matrices = 1 if on_cpu and not config.train.compile else 2  # the head's, and the embedding's when they are tied: see `Policy`
    head_gradient = 0 if frozen else matrices * FLOAT * student.vocabulary * student.hidden
    return {
        "activations": int(kept),
        "head chunks": (copies + 1) * FLOAT * chunk * student.vocabulary + head_gradient,
    }


def head_rows(vocabulary: int, device: torch.device, free: int) -> int:
    """As `build.measured_choices` takes them."""
    on_gpu = device.type == "cuda"
    most = chunk_rows(vocabulary, min(free // 20, 2**31 if on_gpu else 304 * 2**20))
    return most if on_gpu else min(most, max(256, 2**24 // (4 * vocabulary)))
