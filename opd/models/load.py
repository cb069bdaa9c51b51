"""Load student and teacher, and check that they share their tokens."""

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from opd.config.options import Device, Dtype, ModelConfig, Quantization, SamplingDtype, TrainConfig
from opd.data import hub
from opd.data.prompts import Prompt
from opd.errors import ConfigError, DataError
from opd.models.adapters import load_adapter
from opd.models.locate import adapter_remedy, locate
from opd.models.overlap import Overlap, compare_tokenizers
from opd.models.policy import output_head

log = logging.getLogger(__name__)

OTHER_HEADS = ("Classification", "ForMaskedLM", "ForPreTraining", "QuestionAnswering", "MultipleChoice", "RewardModel")


def find_device(device: Device) -> torch.device:
    """Return the configured device, else the best available. Raises `ConfigError` when the configured one is missing."""
    present = {Device.cuda: torch.cuda.is_available(), Device.cpu: True}
    if device is Device.auto:
        device = next(candidate for candidate, there in present.items() if there)
    if not present[device]:
        raise ConfigError(f"device={device.value}: torch {torch.__version__} sees no such device here; set device=auto or device=cpu")
    return torch.device(device.value)


def is_fast_in_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 matrices with instructions of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not have it
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def recomputes_activations(config: TrainConfig, device: torch.device) -> bool:
    """Return whether activations are recomputed in the backward pass: as configured, else on a CPU, where it is faster too."""
    if config.activation_checkpointing is None:
        return device.type == "cpu" and not config.compile
    return config.activation_checkpointing


def uses_bf16_copy(dtype: SamplingDtype, device: torch.device, is_bf16: bool) -> bool:
    """Return whether `generate` samples with a bf16 copy: as configured, else where the device multiplies bf16 matrices natively.

    A GPU needs none where the trainer's weights are bf16 already (`is_bf16`); a CPU gains from the layout of the copy.
    """
    if dtype is SamplingDtype.auto:
        return is_fast_in_bf16(device) and not (is_bf16 and device.type == "cuda")
    return dtype is SamplingDtype.bfloat16


def computes_in_bf16(dtype: Dtype, device: torch.device) -> bool:
    """Return whether the student's matrix products run in bf16: as configured, else where the device computes bf16 natively."""
    return dtype is Dtype.bfloat16 or (dtype is Dtype.auto and is_fast_in_bf16(device))


def load_with(load: Callable[..., Any], config: ModelConfig, role: str, **kwargs: Any) -> Any:
    """Load the configured folder or hub id; errors of transformers become one line with a remedy."""
    source = locate(config, role)
    hub.expect(source)
    if config.gguf_file is not None:
        kwargs["gguf_file"] = config.gguf_file
    try:
        return load(source, revision=config.revision, trust_remote_code=config.trust_remote_code, **kwargs)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes transformers and its parsers raise errors of any class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300].rstrip(".:")
        remedy = (
            "check the folder"
            if Path(source).is_dir()
            else f"offline: {role}.path=FOLDER with a local copy (and HF_HUB_OFFLINE=1); experiment=tiny needs no download"
        )
        raise ConfigError(f"{role}.path={config.path} cannot be loaded: {reason}; {remedy}") from error


def load_tokenizer(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = load_with(AutoTokenizer.from_pretrained, config, role)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{role}.path={config.path}: the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is always masked: a sampled end-of-sequence token stays in the loss
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Return the text of the ids, with white space unchanged."""
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def load_config(config: ModelConfig, role: str) -> PreTrainedConfig:
    """Load config.json. Raises `ConfigError` unless it is of a causal language model."""
    settings: PreTrainedConfig = load_with(AutoConfig.from_pretrained, config, role)
    known = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in settings.to_dict().get("auto_map", {})
    other = next((name for name in settings.architectures or () if name.endswith(OTHER_HEADS)), None)
    if not known or settings.is_encoder_decoder or other is not None:
        what = other or (settings.architectures or [settings.model_type])[0]
        raise ConfigError(f"{role}.path={config.path}: {what} is not a causal language model; choose one that AutoModelForCausalLM loads")
    return settings


def check_weights(model: PreTrainedModel, loaded: dict[str, Any], config: ModelConfig, role: str) -> None:
    """Raise `ConfigError` where weights were missing and are random now, or where the folder has weights for which there is no layer.

    Args:
        loaded: What transformers returns for `output_loading_info`.
    """
    option = f"{role}.path={config.path}"
    parameters, layers = dict(model.named_parameters()), f"{model.base_model_prefix}."
    random = {name for name in loaded["missing_keys"] if name in parameters} | {name for name, *_ in loaded["mismatched_keys"]}
    # A second head or a tower for images may be left out; but no layer, and nothing that belongs to a matrix: its scales, or a bias.
    matrices = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    extra = [name for name in loaded["unexpected_keys"] if name.startswith(layers)]
    unused = {name for name in extra if name.endswith(".weight") or name.rpartition(".")[0] in matrices}
    for names, problem in ((random, "missing or have other shapes"), (unused, "left over")):
        if names:
            raise ConfigError(f"{option}: with its config.json {len(names)} weights are {problem}, such as {min(names)}; check the folder")
    if model._hf_peft_config_loaded:
        raise ConfigError(f"{option}: contains an adapter; {adapter_remedy(config, role)}")


def load_model(config: ModelConfig, role: str, device: torch.device, frozen: bool = False) -> PreTrainedModel:
    """Load a student whose weights are trained in float32 (the optimizer's master weights), others in the dtype that they compute in.

    An adapter is merged, or kept next to quantised weights, which would have to be rounded again.

    Args:
        frozen: Whether adapters are trained instead of a student's weights.

    Raises `ConfigError` for what is no causal language model, for weights that are damaged, missing or left over, and for quantised ones of
    the student.
    """
    settings, is_quantized = load_config(config, role), config.quantization is not Quantization.none
    is_trained = role == "model" and not is_quantized and not frozen
    dtype = torch.bfloat16 if not is_trained and computes_in_bf16(config.dtype, device) else torch.float32
    kwargs: dict[str, Any] = {"dtype": dtype}
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    quantized_already = f"{role}.path={config.path}: its weights are quantised and cannot be trained; name the model they were made from"
    if is_quantized:
        if role == "model" and "quantization_config" in settings.to_dict():
            raise ConfigError(quantized_already)
        kwargs |= {"quantization_config": quantized(config.quantization, dtype, role), "device_map": {"": device}}
    load = AutoModelForCausalLM.from_pretrained
    model: PreTrainedModel
    model, loaded = load_with(load, config, role, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    check_weights(model, loaded, config, role)
    if role == "model" and config.quantization is Quantization.nf4:
        keep_gradients(model)
    if config.gguf_file is not None:
        # The weights were expanded on loading; transformers saves the model only if it is marked as an ordinary one.
        vars(model).update(hf_quantizer=None, is_quantized=False)
        del model.config.quantization_config
    if role == "model" and not is_quantized and "quantization_config" in model.config.to_dict():
        raise ConfigError(quantized_already)
    if config.adapter is not None:
        handle = load_adapter(model, config, role)
        return model if is_quantized else handle.merge_and_unload()
    return model


def quantized(quantization: Quantization, dtype: torch.dtype, role: str) -> BitsAndBytesConfig:
    """Return the bitsandbytes config of a model that computes in `dtype`. Raises `ConfigError` where the package is missing."""
    require_bitsandbytes(f"{role}.quantization={quantization.value}")
    if quantization is Quantization.int8:
        # Columns with outliers, which bitsandbytes would compute in float16, are those of the whole batch: what a student draws from would
        # depend on its neighbours (0.11 nats per token with SmolLM2-135M). A teacher is compared with nothing and keeps them.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0 if role == "model" else 6.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_gradients(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, after which products with them have no gradients."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def require_bitsandbytes(option: str) -> None:
    """Raise `ConfigError` where bitsandbytes is missing; else keep it from logging how it rounds at every product, which is its method."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{option} needs the package bitsandbytes: pip install 'opd[quantized]'")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def eos_ids(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a completion: the tokenizer's, the model's and its generation config's."""
    if model is None:
        return (tokenizer.eos_token_id,)
    generation = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos: set[int] = set()
    for ids in (tokenizer.eos_token_id, model.config.eos_token_id, generation):
        eos.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(eos))


def check_same_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Overlap | None:
    """Return None where every token has the same id in both; where they differ in added tokens only, what they share.

    Raises `ConfigError`, naming the first difference, for any others.
    """
    return None if student.get_vocab() == teacher.get_vocab() else compare_tokenizers(student, teacher)


def shared_vocabulary(tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, teacher: PreTrainedModel | None) -> int:
    """Return how many ids both heads have: ids beyond the tokenizer's last are padding of the head.

    Added tokens may be without a row, such as one for images; `check_known` looks for them in prompts. Padding gets one that has a row. A
    served teacher (None) has as many as the tokenizer.

    Raises `ConfigError` when a head is too narrow for the tokenizer.
    """
    theirs = max(tokenizer.get_vocab().values()) + 1 if teacher is None else output_head(teacher).vocabulary
    size = min(output_head(student).vocabulary, theirs)
    last = max({*tokenizer.get_vocab().values()} - {*tokenizer.get_added_vocab().values()} | {tokenizer.eos_token_id or 0})
    if last >= size:
        raise ConfigError(
            f"the tokenizer has ids up to {last}, an output head only {size} rows: model or teacher does not belong to its tokenizer"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token
    return size


def check_known(prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, vocabulary: int, overlap: Overlap | None = None) -> None:
    """Raise `DataError` for a prompt with a token that the models have no row for, or that its reader does not know."""
    sides = [] if overlap is None else [("student", "model", overlap.teacher), ("teacher", "teacher", overlap.student)]
    if max(tokenizer.get_vocab().values()) < vocabulary and overlap is None:
        return
    for prompt in prompts:
        if (last := max(map(max, (prompt.ids, *prompt.scored_views, *prompt.given)))) >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(last)
            raise DataError(f"row {prompt.sample_id}: contains {token!r} ({last}), a token that the models have no row for; remove it")
        for (reader, option, unknown), view in zip(sides, (prompt.ids, prompt.seen_by_teacher), strict=False):
            if (alone := next((token for token in chain(view, *prompt.given) if token in unknown), None)) is not None:
                raise DataError(
                    f"row {prompt.sample_id}: contains {unknown[alone]!r} ({alone}), a token that the {reader} does not have; remove it "
                    f"from the text, or from the chat template with data.chat_template_kwargs, or set {option}.path to one that has it"
                )


def pair_differences(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    eos: tuple[tuple[int, ...], tuple[int, ...]],
    overlap: Overlap | None = None,
    ends: tuple[int, ...] = (),
) -> list[str]:
    """Return differences of student and teacher that may cost quality, one line each: tokens, chat template, end of sequence, padding.

    Args:
        eos: Ids with which student and teacher themselves end a completion.
        ends: Those that end it here, where the vocabularies overlap.
    """
    differences = [] if overlap is None else [overlap.describe()]
    if student.chat_template != teacher.chat_template:
        differences.append("the chat templates of student and teacher differ; both see the student's rendering")
    if set(eos[0]) != set(eos[1]):
        names = [[side.convert_ids_to_tokens(i) for i in ids] for side, ids in zip((student, teacher), eos, strict=True)]
        result = "the teacher may never ask the student to stop"
        if overlap is not None:
            result = f"a completion ends at {' or '.join(repr(student.convert_ids_to_tokens(i)) for i in ends)}"
        differences.append(f"end-of-sequence tokens differ: student {names[0]}, teacher {names[1]}; {result}")
    if student.pad_token_id != teacher.pad_token_id:
        differences.append(f"padding tokens differ: student {student.pad_token!r}, teacher {teacher.pad_token!r}; padding is never scored")
    return differences
