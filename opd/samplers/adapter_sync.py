"""Adapters alone for vLLM, where the student trains nothing else: about a hundredth of the bytes of the merged weights.

vLLM reads them from a folder as peft writes it. It has the base model from its start and multiplies the adapters' matrices next to it. The
merged weights stay for a student that vLLM's adapters cannot express, and for a server that was started without them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from opd.models.policy import decoder_layers

NAME = "opd"  # of the adapter in the engine
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has room


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and layer of peft around each plain layer with an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            yield name, module


def room_for_adapters(model: PreTrainedModel) -> int | None:
    """Return the rank that vLLM needs room for; None where the student has no adapters, or others than on linear layers of its blocks."""
    inside = {id(module) for block in decoder_layers(model) for module in block.modules()}
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers or not all(id(layer) in inside and isinstance(layer.base_layer, nn.Linear) for layer in layers):
        return None
    rank = max(matrix.weight.shape[0] for layer in layers for matrix in layer.lora_A.values())
    return next((room for room in RANKS if room >= rank), None)


@torch.no_grad()
def write_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapters' current weights to a folder, with the scale of each in its second matrix. Raises `OSError`."""
    tensors, rank = {}, 1
    for name, layer in adapted_layers(model):
        (adapter,) = layer.active_adapters
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        tensors[f"base_model.model.{name}.lora_A.weight"] = first.float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (second.float() * layer.scaling[adapter]).cpu().contiguous()
        rank = max(rank, first.shape[0])
    targets = sorted({name.rpartition(".")[2] for name, _ in adapted_layers(model)})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    work = folder / "tmp_adapter_model.safetensors"
    save_file(tensors, work)
    work.replace(folder / "adapter_model.safetensors")
