"""The memory that weights take, told before any is loaded: from `config.json` alone."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.config.schema import Config, ModelConfig, Placement, Quantization, TeacherConfig
from opd.models.load import computes_in_bf16, load_with
from opd.models.policy import add_adapters, decoder_layers

BUCKET, LIVE = 0, 0

MOMENTS = 2  # AdamW's, of each parameter that is trained
NF4_BYTES = 0.5 + 4 / 64  # and a float32 scale for every 64 numbers


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one process holds on its device at most, besides activations, samples and the CUDA context.

    weights, gradients, optimizer: the student's, at the moment when they take the most together. Sharded weights count twice where they are
    whole for a while: as the share at rest and as what is gathered. teacher: its weights on the student's device. when: that moment.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    when: str = ""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.teacher

    def __str__(self) -> str:
        student = self.total - self.teacher
        moment = f", at most {self.when}" if self.when else ""
        return (
            f"memory of each process{moment}: student {size(student)} (weights {size(self.weights)}, gradients {size(self.gradients)}, "
            f"optimizer {size(self.optimizer)}), teacher {size(self.teacher)}; activations and samples come on top"
        )


def estimate(
    config: Config, processes: int, device: torch.device, sharded: bool = False, layerwise: bool = False, zero: bool = False
) -> Memory:
    """What `config` takes in each of so many processes. device: that of the student. sharded: its weights are, over all of them.

    layerwise: and its gradients are computed with one layer's weights at a time. zero: by DeepSpeed, at its own settings.

    Raises `ConfigError` where a model's config cannot be read.
    """
    student = empty(config.model, "model")
    bf16 = computes_in_bf16(config.model.dtype, device)
    if config.lora.rank:
        student.requires_grad_(False)
        add_adapters(student, config.lora)
    trained, weights = trained_bytes(student), weight_bytes(student, bf16)
    share = 1 / processes if sharded else 0.0
    optimizer = round(MOMENTS * trained * (share or 1.0))
    teacher = 0 if config.shares_base else teacher_bytes(config.teacher, processes, device)
    if zero:
        held, optimizer = round(share * weights), round((1 + MOMENTS) * trained / processes)  # it updates a copy of its own
        sampling = Memory(held + weights, 0, optimizer, teacher, "while sampling")
        # Gradients are there until a bucket of them is full, which is copied to be reduced.
        gradients = round(trained / processes) + 2 * min(trained, 4 * BUCKET)
        update = Memory(held + min(weights, 4 * LIVE if sharded else weights), gradients, optimizer, teacher, "during the update")
        return max(sampling, update, key=lambda memory: memory.total)
    layerwise = sharded
    if not layerwise:
        return Memory(weights + round(share * weights), trained + round(share * trained), optimizer, teacher)
    sampling = Memory(weights + round(share * weights), 0, optimizer, teacher, "while sampling")
    # The next layer is gathered during a layer's backward pass; a gradient is copied once to be sent.
    outside = [
        weights - sum(weight_bytes(layer, bf16) for layer in decoder_layers(student)),
        trained - sum(map(trained_bytes, decoder_layers(student))),
    ]
    largest = [max(weight_bytes(layer, bf16) for layer in decoder_layers(student)), max(map(trained_bytes, decoder_layers(student)))]
    update = Memory(
        weights=round(share * weights) + outside[0] + 2 * largest[0],
        gradients=round(share * trained) + 2 * max(outside[1], largest[1]),
        optimizer=optimizer,
        teacher=teacher,
        when="during the update",
    )
    return max(sampling, update, key=lambda memory: memory.total)


def trained_bytes(module: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def weight_bytes(module: nn.Module, bf16: bool) -> int:
    frozen = sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
    return trained_bytes(module) + (2 if bf16 else 4) * frozen


def teacher_bytes(config: TeacherConfig, processes: int, device: torch.device) -> int:
    """Of the teacher's weights, on the student's device."""
    model = empty(config, "teacher")
    width = 2 if computes_in_bf16(config.dtype, device) else 4
    inside = sum(parameter.numel() for layer in decoder_layers(model) for parameter in layer.parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - inside
    if config.quantization is not Quantization.none:
        matrices = sum(
            module.weight.numel() for layer in decoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)
        )
        narrow = 1.0 if config.quantization is Quantization.int8 else NF4_BYTES
        whole = round(narrow * matrices) + width * (inside - matrices + outside)
    else:
        whole = width * (inside + outside)
    match config.placement:
        case Placement.same:
            return whole
        case Placement.device:
            head: int = model.get_output_embeddings().weight.numel()
            return whole if device.type == config.device else width * head
        case Placement.sharded:
            return whole + round(width * inside / processes)
        case Placement.offload:
            sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
            coming = width * max(map(sum, pairwise([0, *sizes])))  # a layer beside the one that computes
            return coming + (width * outside if device.type != "cpu" else whole)


def empty(config: ModelConfig, role: str) -> PreTrainedModel:
    """The model without its numbers."""
    settings = load_with(AutoConfig.from_pretrained, config, role)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    return model


def size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
