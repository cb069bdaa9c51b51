"""The memory that weights take, told before any is loaded: from `config.json` alone."""

from dataclasses import astuple, dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.config.schema import Config, ModelConfig, Placement, Quantization, TeacherConfig
from opd.forward import add_adapters
from opd.models import computes_in_bf16, load_with
from opd.teachers.placement import layers

MOMENTS = 2  # AdamW's, of each parameter that is trained
NF4_BYTES = 0.5 + 4 / 64  # and a float32 scale for every 64 numbers


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one process holds on its device at most, besides activations, samples and the CUDA context.

    weights, gradients, optimizer: the student's. Sharded weights count twice where they are whole for a while: as the share at rest and
    as what is gathered. teacher: its weights on the student's device.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        student = self.total - self.teacher
        return (
            f"memory of each process: student {size(student)} (weights {size(self.weights)}, gradients {size(self.gradients)}, optimizer "
            f"{size(self.optimizer)}), teacher {size(self.teacher)}; activations and samples come on top"
        )


def estimate(config: Config, processes: int, device: torch.device, sharded: bool = False) -> Memory:
    """What `config` takes in each of so many processes. device: that of the student. sharded: its weights are, over all of them.

    Raises `ConfigError` where a model's config cannot be read.
    """
    student = empty(config.model, "model")
    bf16 = computes_in_bf16(config.model.dtype, device)
    if config.lora.rank:
        student.requires_grad_(False)
        add_adapters(student, config.lora)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in student.parameters() if not parameter.requires_grad)
    weights = 4 * trained + (2 if bf16 else 4) * frozen
    share = 1 / processes if sharded else 0.0
    teacher = 0 if config.shares_base else teacher_bytes(config.teacher, processes, device)
    return Memory(
        weights=weights + round(share * weights),
        gradients=4 * trained + round(share * 4 * trained),
        optimizer=round(4 * MOMENTS * trained * (share or 1.0)),
        teacher=teacher,
    )


def teacher_bytes(config: TeacherConfig, processes: int, device: torch.device) -> int:
    """Of the teacher's weights, on the student's device."""
    model = empty(config, "teacher")
    width = 2 if computes_in_bf16(config.dtype, device) else 4
    inside = sum(parameter.numel() for layer in layers(model) for parameter in layer.parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - inside
    if config.quantization is not Quantization.none:
        matrices = sum(module.weight.numel() for layer in layers(model) for module in layer.modules() if isinstance(module, nn.Linear))
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
            largest = max(module.weight.numel() for layer in layers(model) for module in layer.modules() if isinstance(module, nn.Linear))
            return width * (outside + largest) if device.type != "cpu" else whole


def empty(config: ModelConfig, role: str) -> PreTrainedModel:
    """The model without its numbers."""
    settings = load_with(AutoConfig.from_pretrained, config, role)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    return model


def size(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
