"""`final/`: the student as a plain Hugging Face model folder."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.config.schema import Config
from opd.errors import OutputError
from opd.training.card import model_card


def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: tuple[int, ...],
    config: Config,
    summary: Mapping[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, tokenizer with chat template, generation config and model card; replaces `folder`. Raises `OutputError`.

    weights: the model's, by name, where it holds a part of them only.
    """
    work = folder.with_name(f"tmp_{folder.name}")
    if model.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, if it is there, which complains of no GPU
    try:
        shutil.rmtree(work, ignore_errors=True)
        model.generation_config = generation_config(config, eos, tokenizer)
        model.save_pretrained(work, state_dict=weights)
        for file in work.glob("*.safetensors"):
            file.chmod((work / "config.json").stat().st_mode)  # safetensors makes files that nobody else may read
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(model_card(config, summary, dtype_name(model)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder}: the model could not be written ({error}); make room and run the same command again") from error


def generation_config(config: Config, eos: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Decoding as it was evaluated."""
    greedy = config.eval.temperature == 0
    return GenerationConfig(
        do_sample=not greedy,
        temperature=None if greedy else config.eval.temperature,
        top_k=None if greedy else 0,  # generate would take 50
        top_p=None if greedy else 1.0,
        max_new_tokens=config.eval.max_new_tokens,
        eos_token_id=list(eos),
        pad_token_id=tokenizer.pad_token_id,
    )


def dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
