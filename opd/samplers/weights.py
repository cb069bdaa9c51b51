"""The student's weights as another engine takes them: under the names of a plain checkpoint, adapters merged.

Where they are sharded over processes they are put together one by one, which all processes have to do.

Shapes: `V` vocabulary, `H` hidden.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.sharding import Held, full, together, weight, write_full


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, vocabulary: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each name with its weight, detached, on the model's device; of the embedding and the output head the first `vocabulary` rows (V, H).

    From `state_dict`, which names a head that is tied to the embedding too: an engine may hold the two apart and would keep the old one.
    It shards what is gathered: not for use within `sharding.whole`.
    """
    for name, tensor in held_weights(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        value = full(tensor)
        if hasattr(module, "base_layer") and name.endswith(".weight"):
            value = merged(module, value)
        yield name, value[:vocabulary] if module in vocabulary_layers(model) else value


def held_weights(model: PreTrainedModel) -> dict[str, Held]:
    """Those names with the tensors that the model holds: sharded where they are, without adapters."""
    return {plain(name): weight(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if ".lora_" not in name}


def plain(name: str) -> str:
    """A weight's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def write_weights(model: PreTrainedModel, file: Path | None, dtype: torch.dtype) -> OSError | None:
    """Write `checkpoint_weights` as safetensors of one dtype, holding one tensor at a time.

    A process without a file puts together what is sharded, for the others' sake. Returns what kept the file from being written.
    """
    return write_full(held_weights(model), file, (value for _, value in checkpoint_weights(model)), dtype)


def vocabulary_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def merged(layer: Any, weight: Tensor) -> Tensor:
    """A layer's weight, whole, with its adapters' part added, in float32."""
    with together([parameter for name, parameter in layer.named_parameters() if ".lora_" in f".{name}"]):
        deltas = [full(layer.get_delta_weight(adapter)).float() for adapter in layer.active_adapters]
    return torch.stack([weight.float(), *deltas]).sum(0)
