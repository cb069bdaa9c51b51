"""Where the teacher's weights are while the student trains. It computes the same wherever they are."""

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.config.options import Placement, TeacherConfig
from opd.errors import ConfigError
from opd.models.distributed import FSDP_FILE, shard
from opd.models.policy import decoder_layers
from opd.teachers.offload import Offload


def loading_device(config: TeacherConfig, device: torch.device, processes: int, sharded: bool) -> torch.device:
    """Return the device that the teacher's weights are loaded to. Raises `ConfigError` for a placement that is impossible here.

    Args:
        device: The student's device.
        sharded: Whether the student's weights are sharded.
    """
    if config.placement is Placement.same:
        return device
    if config.placement is Placement.sharded and not sharded:
        raise ConfigError(
            f"teacher.placement=sharded: shards the teacher as the student is sharded; set launch.config_file={FSDP_FILE}, or "
            "teacher.placement=same"
        )
    if config.placement in (Placement.sharded, Placement.offload):
        return torch.device("cpu")
    assert config.device is not None
    chosen = torch.device(config.device)
    if chosen.type == "cuda" and processes > 1:
        raise ConfigError(
            f"teacher.device={chosen}: all {processes} processes would use it; set teacher.placement=sharded or teacher.placement=offload"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"teacher.device={chosen}: torch sees {torch.cuda.device_count()} GPUs here")
    return chosen


def place(model: PreTrainedModel, placement: Placement, device: torch.device) -> None:
    """Shard or offload the decoder layers of a teacher on the CPU; the rest of it moves to `device`, where all of it computes.

    Raises `ConfigError` for a model that this cannot be done with.
    """
    if placement not in (Placement.sharded, Placement.offload):
        return
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"teacher.placement={placement.value}: {type(model).__name__} does not name its layers; set teacher.placement=same"
        )
    inside = {id(part) for layer in layers for part in layer.modules()}
    for module in model.modules():
        if inside.isdisjoint(map(id, module.modules())):
            nn.Module.to(module, device)
    if placement is Placement.sharded:
        shard(layers)
        return
    weights = {id(parameter): parameter for layer in layers for parameter in layer.parameters()}
    outside = (parameter for part in model.modules() if id(part) not in inside for parameter in part.parameters(recurse=False))
    if not weights.keys().isdisjoint(map(id, outside)):
        raise ConfigError(
            f"teacher.placement=offload: layers of {type(model).__name__} share weights with its other parts; set teacher.placement=same"
        )
    if any(type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor for parameter in weights.values()):
        raise ConfigError("teacher.placement=offload: the weights of a quantised teacher cannot be moved; set teacher.placement=same")
    Offload(layers, device)
