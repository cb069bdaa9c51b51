"""The student's weights as another engine reads them: under the names of a plain checkpoint, adapters merged, nothing quantised.

Sharded weights are gathered one after the other, which all processes take part in.

Shapes: `V` vocabulary, `H` hidden.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from opd.models.distributed import full_tensor
from opd.models.policy import is_quantized


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel, vocabulary: int | None = None, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield each name and weight in full, detached, on the model's device.

    A head that is tied to the embedding comes under both names: an engine may store the two apart and would keep the old one.

    Args:
        vocabulary: Rows (V, H) of embedding and output head to yield; None for all.
        merged: Whether adapters are merged; otherwise they are left out.
    """
    stored = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
    vocabulary_layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or name not in stored:  # scales and codes of quantised weights are neither parameters nor buffers
            continue
        plain_name = name.replace(".base_layer.", ".")
        layer = model.get_submodule(plain_name.rpartition(".")[0])
        holder, _, attribute = name.rpartition(".")
        is_packed = attribute == "weight" and is_quantized(model) and not tensor.is_floating_point()
        value = dequantized(model.get_submodule(holder)) if is_packed else full_tensor(tensor)
        if merged and name != plain_name and plain_name.endswith(".weight"):
            adapted: Any = layer  # peft's layer around the plain one
            deltas = [full_tensor(adapted.get_delta_weight(adapter)).float() for adapter in adapted.active_adapters]
            value = torch.stack([value.float(), *deltas]).sum(0)
        yield plain_name, value[:vocabulary] if layer in vocabulary_layers else value


def dequantized(layer: Any) -> Tensor:
    """Return the weight of a layer of bitsandbytes in the dtype it was made from, or in float32."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    weight = layer.weight
    if isinstance(layer, Linear8bitLt):
        value: Tensor = int8_vectorwise_dequant(
            weight.data, layer.state.SCB if weight.SCB is None else weight.SCB
        )  # moved by a forward pass
    else:
        value = dequantize_4bit(weight.data, weight.quant_state)
    return value


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a copy of the model's config that says nothing of quantised weights."""
    config = copy.deepcopy(model.config)
    if is_quantized(model):
        del config.quantization_config
    return config


def merged_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a plain model on the CPU with the weights of a quantised one, its adapters merged and all rounded to `dtype` at the end."""
    weights = {name: value.to("cpu", dtype, copy=True) for name, value in checkpoint_weights(model)}
    merged = type(model).from_pretrained(None, config=plain_config(model), state_dict=weights, dtype=dtype)
    plain: PreTrainedModel = merged.eval()
    return plain


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
