"""Where the teacher's weights are while the student trains. It computes the same wherever they are."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.config.schema import Placement, TeacherConfig
from opd.errors import ConfigError
from opd.models import fsdp2
from opd.models.policy import layers
from opd.objective import Head
from opd.teachers.offload import Offload


def home(config: TeacherConfig, device: torch.device, processes: int, sharded: bool) -> torch.device:
    """Where the weights are loaded to. device: the student's. sharded: whether its weights are.

    Raises `ConfigError` for a placement that cannot be had here.
    """
    if config.placement is Placement.same:
        return device
    if config.placement is Placement.sharded:
        if not sharded:
            raise ConfigError(
                "teacher.placement=sharded: shards the teacher as the student is; start with an FSDP2 or ZeRO-3 config "
                "(launch.config_file=scripts/accelerate/fsdp2_gpu8.yaml), or take teacher.placement=same"
            )
        return torch.device("cpu")
    if config.placement is Placement.offload:
        return torch.device("cpu")
    assert config.device is not None
    chosen = torch.device(config.device)
    if chosen.type == "cuda" and processes > 1:
        raise ConfigError(f"teacher.device={chosen}: all {processes} processes would use it; take teacher.placement=sharded or offload")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"teacher.device={chosen}: torch sees {torch.cuda.device_count()} GPUs here")
    return chosen


def place(model: PreTrainedModel, placement: Placement, device: torch.device) -> None:
    """Shard or offload the layers of a model on the CPU; the rest of it goes to `device`, where all of it computes.

    Raises `ConfigError` for a model that this cannot be done with.
    """
    if placement not in (Placement.sharded, Placement.offload):
        return
    found = layers(model)
    if not found:
        raise ConfigError(f"teacher.placement={placement.value}: {type(model).__name__} does not say what its layers are; take same")
    inside = {id(part) for layer in found for part in layer.modules()}
    for module in model.modules():
        if inside.isdisjoint(map(id, module.modules())):
            nn.Module.to(module, device)
    if placement is Placement.sharded:
        fsdp2.shard(found)
    else:
        check_offload(model, found)
        Offload(found, device)


def check_offload(model: PreTrainedModel, found: list[nn.Module]) -> None:
    """Refuse layers that are not plain weights of their own: a caller may bring any model."""
    own = {id(parameter): parameter for layer in found for parameter in layer.parameters()}
    inside = {id(part) for layer in found for part in layer.modules()}
    outside = (parameter for part in model.modules() if id(part) not in inside for parameter in part.parameters(recurse=False))
    if not own.keys().isdisjoint(map(id, outside)):
        raise ConfigError(f"teacher.placement=offload: layers of {type(model).__name__} share weights with its other parts; take same")
    if any(type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor for parameter in own.values()):
        raise ConfigError("teacher.placement=offload: the weights of a quantised teacher stay where they are; take same")


def head_on(head: Head, device: torch.device) -> Head:
    """The output layer where the student's is: the objective compares the two."""
    bias_V = None if head.bias_V is None else head.bias_V.to(device)
    return replace(head, weight_VH=head.weight_VH.to(device), bias_V=bias_V)
