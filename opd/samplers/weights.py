"""The student's weights as another engine takes them: under the names of a plain checkpoint, adapters merged.

Where they are sharded over processes they are put together one by one, which all processes have to do.

Shapes: `V` vocabulary, `H` hidden.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.models.sharding import Held, Part, full, together, weight, write_full


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, vocabulary: int) -> Iterator[tuple[str, Tensor]]:
    """Each name with its weight, detached, on the model's device; of embedding and output head the first `vocabulary` rows (V, H)."""
    for name, held in held_weights(model).items():
        value, module = full(held), model.get_submodule(name.rpartition(".")[0])
        yield name, value[:vocabulary] if module in vocabulary_layers(model) else value


@torch.no_grad()
def write_weights(model: PreTrainedModel, file: Path | None, dtype: torch.dtype) -> OSError | None:
    """Write all of them as safetensors of one dtype, holding one tensor at a time.

    A process without a file puts together what is sharded, for the others' sake. Returns what kept the file from being written.
    """

    def converted(held: Held) -> Tensor:
        return full(held).to(dtype)

    return write_full({name: Part(held.shape, dtype, partial(converted, held), never) for name, held in held_weights(model).items()}, file)


def held_weights(model: PreTrainedModel) -> dict[str, Held]:
    """Each weight under its plain name, as the model holds it.

    Two names of a head that is tied to the embedding: an engine may hold the two apart and would keep the old one.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Held] = {}
    for name in model.state_dict():
        if ".lora_" in name:
            continue
        module_name, _, kind = plain(name).rpartition(".")
        held = weight(tensors[name])
        if name != plain(name) and kind == "weight":
            held = Part(held.shape, torch.float32, partial(merged, model.get_submodule(module_name), held), never)
        found[plain(name)] = held
    return found


def plain(name: str) -> str:
    """A weight's name in the model without adapters."""
    return name.replace(".base_layer.", ".")


def vocabulary_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def merged(layer: Any, base: Held) -> Tensor:
    """A layer's weight in full with its adapters' part added, in float32."""
    whole = full(base)
    with together([parameter for name, parameter in layer.named_parameters() if "lora_" in name]):
        deltas = [full(layer.get_delta_weight(adapter)).float() for adapter in layer.active_adapters]
    return torch.stack([whole.float(), *deltas]).sum(0)


def never(value: Tensor) -> None:
    raise AssertionError("weights are handed over, not taken back")
