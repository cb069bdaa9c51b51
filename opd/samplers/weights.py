"""The student's weights as another engine reads them: under the names of a plain checkpoint, adapters merged.

Sharded weights are gathered one after the other, which all processes take part in.

Shapes: `V` vocabulary, `H` hidden.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from opd.models.distributed import full_tensor


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, vocabulary: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield each name and weight in full, detached, on the model's device.

    A head that is tied to the embedding comes under both names: an engine may store the two apart and would keep the old one.

    Args:
        vocabulary: Rows (V, H) of embedding and output head to yield; None for all.
    """
    vocabulary_layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain_name = name.replace(".base_layer.", ".")
        layer = model.get_submodule(plain_name.rpartition(".")[0])
        value = full_tensor(tensor)
        if name != plain_name and plain_name.endswith(".weight"):
            adapted: Any = layer  # peft's layer around the plain one
            deltas = [full_tensor(adapted.get_delta_weight(adapter)).float() for adapter in adapted.active_adapters]
            value = torch.stack([value.float(), *deltas]).sum(0)
        yield plain_name, value[:vocabulary] if layer in vocabulary_layers else value


def write_weights(model: PreTrainedModel, file: Path | None, dtype: torch.dtype) -> OSError | None:
    """Write all weights as safetensors of one dtype. Returns the error that prevented it.

    Args:
        file: None in processes that only take part in gathering sharded weights.
    """
    tensors = {}
    for name, value in checkpoint_weights(model):
        if file is not None:
            tensors[name] = value.to("cpu", dtype, copy=True).contiguous()
    try:
        if file is not None:
            save_file(tensors, file)
    except OSError as error:
        return error
    return None
