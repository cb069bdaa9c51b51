"""The student's weights as another engine takes them: under the names of a plain checkpoint, adapters merged.

Shapes: `V` vocabulary, `H` hidden.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, vocabulary: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each name with its weight, detached, on the model's device; of the embedding and the output head the first `vocabulary` rows (V, H).

    From `state_dict`, which names a head that is tied to the embedding too: an engine may hold the two apart and would keep the old one.
    """
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        module_name, _, kind = name.rpartition(".")
        if module_name.endswith(".base_layer"):
            module_name = module_name.removesuffix(".base_layer")
            if kind == "weight":
                tensor = merged(model.get_submodule(module_name), tensor)
        whole = f"{module_name}.{kind}"
        yield whole, tensor[:vocabulary] if model.get_submodule(module_name) in vocabulary_layers(model) else tensor


def vocabulary_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def merged(layer: Any, weight: Tensor) -> Tensor:
    """A layer's weight with its adapters' part added, in float32."""
    deltas = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
    return torch.stack([weight.float(), *deltas]).sum(0)
