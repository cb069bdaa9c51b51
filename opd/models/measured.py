"""Measure what a model keeps, on copies without storage or with one and two layers: the cache of a sequence, the activations of a layer."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from opd.config.options import LoraConfig
from opd.models.policy import MODEL_ERRORS, add_adapters, cache_argument

log = logging.getLogger(__name__)

MEASURED: dict[tuple[Any, ...], tuple[float, float]] = {}  # by `measure`, which takes a minute for the layers of a 7B model on a CPU
SHORT, LONG = 16, 1024  # tokens of the sequences on which a layer's activations are measured, at most


def measure(what: str, measurement: Callable[..., tuple[float, float]], model: Any, *args: Any) -> tuple[float, float]:
    """Return the measurement, made once, or zeros where the model cannot be run without its weights or with fewer layers.

    Args:
        model: A model or its config.
    """
    known = (measurement, getattr(model, "config", model).to_json_string(use_diff=False), repr(args))
    try:
        return MEASURED.get(known) or MEASURED.setdefault(known, measurement(model, *args))
    except MODEL_ERRORS as error:
        log.warning("memory: %s cannot be measured for %s and is left out: %s", what, type(model).__name__, str(error).partition("\n")[0])
        return 0.0, 0.0


def cache_bytes(model: PreTrainedModel, width: int) -> tuple[float, float]:
    """Measure the cache of a sequence on a model without storage: keys, values and recurrent states, of `width` bytes each number.

    Returns:
        Bytes for each token, and bytes whatever their number.
    """
    layers = model.base_model
    vars(model.config).update(pad_token_id=None)  # GPT-2 would look for it in the ids
    sizes = []
    for tokens in (SHORT, 2 * SHORT):
        cache = DynamicCache(config=model.config)
        ids_BT = torch.ones(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad():
            layers(input_ids=ids_BT, use_cache=True, **{cache_argument(layers): cache})
        values = [value for layer in cache.layers for value in vars(layer).values()]
        states = [state for value in values for state in (value.values() if isinstance(value, dict) else [value])]
        sizes.append(width * sum(state.numel() for state in states if isinstance(state, Tensor)))
    return per_token_and_constant(sizes[0], sizes[1], 2 * SHORT)


def activations_of_layer(settings: Any, tokens: int, bf16: bool, lora: LoraConfig) -> tuple[float, float]:
    """Measure what one layer saves for the backward pass, in sequences of `tokens` tokens.

    Returns:
        Bytes for each token, and bytes whatever their number.
    """
    long = max(2 * SHORT, min(tokens, LONG))
    measured = []
    for number in (1, 2):
        small = copy.deepcopy(settings)
        text = small.get_text_config()
        for name, value in vars(text).items():
            if isinstance(value, list) and isinstance(value[0] if value else None, str) and len(value) == text.num_hidden_layers:
                setattr(text, name, value[:number])  # layer_types, or the kinds of layers under another name
        text.num_hidden_layers, text.vocab_size = number, 8
        if hasattr(text, "vocab_size_per_layer_input"):  # Gemma 4's second embedding, the larger one
            text.vocab_size_per_layer_input = 8
        text.pad_token_id, text.bos_token_id, text.eos_token_id = 0, 0, 0
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        if lora.rank:
            add_adapters(model.requires_grad_(False), lora)
        model.to(torch.bfloat16 if bf16 else torch.float32)
        measured.append([saved_bytes(model, length) for length in (SHORT, long)])
    of_short, of_long = (two - one for one, two in zip(*measured, strict=True))
    return per_token_and_constant(of_short, of_long, long)


def saved_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes that the model saves for the backward pass of one sequence, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    del output
    return sum(saved.values())


def per_token_and_constant(of_short: int, of_long: int, long: int) -> tuple[float, float]:
    """Return the bytes for each token, and the rest, from those of sequences of `SHORT` and of `long` tokens."""
    per_token = (of_long - of_short) / (long - SHORT)
    return per_token, max(0.0, of_short - SHORT * per_token)
