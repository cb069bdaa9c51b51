"""Models as plain Hugging Face folders, each with a model card: `final/` of a run, and `opd export` of a run or checkpoint."""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.config.compose import restore_config, to_unchecked_config
from opd.config.options import EXPORT_DTYPES
from opd.config.schema import Config
from opd.data import hub
from opd.data.prompts import Prompt
from opd.errors import OpdError, OutputError
from opd.models import load as models
from opd.models.adapters import trained_adapters
from opd.models.masters import MasterWeights
from opd.models.policy import is_quantized
from opd.runs.folder import FINAL
from opd.runs.outcome import Lines, summarised
from opd.runs.reader import Run, is_run, open_run
from opd.samplers.weights import merged_copy
from opd.training.checkpoint import NAME, read
from opd.training.export_source import checkpoint_config
from opd.training.inputs import Given, load_prompts
from opd.training.model_card import model_card
from opd.training.tensors import model_tensors, restore_weights

log = logging.getLogger(__name__)

MERGE_PROMPTS = 8  # prompts on which a merged model is compared with the quantised one
DTYPES = {name: getattr(torch, name) for name in EXPORT_DTYPES}


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: tuple[int, ...],
    config: Config,
    summary: Mapping[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, tokenizer with chat template, generation config and model card; replaces `folder`.

    Args:
        model: without adapters.
        eos: the ids that end a completion.
        summary: as in summary.json, as far as known.
        weights: the model's by name, where it is sharded.

    Raises:
        OutputError: the disk refuses it.
    """
    work = folder.with_name(f"tmp_{folder.name}")
    if model.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed where installed, which warns without a GPU
    try:
        shutil.rmtree(work, ignore_errors=True)
        model.generation_config = generation_config(config, eos, tokenizer)
        model.save_pretrained(work, state_dict=weights)
        for file in work.glob("*.safetensors"):
            file.chmod((work / "config.json").stat().st_mode)  # safetensors creates files that only their owner may read
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(model_card(config, summary, str(model.dtype).removeprefix("torch.")), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: the model could not be written to disk ({error}); free space and run the same command again"
        ) from error


def merge_quantized(
    model: PreTrainedModel,
    masters: MasterWeights | None,
    config: Config,
    prompts: Sequence[Prompt],
    summary: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return a plain model on the CPU: the dequantized base, which the adapters were trained on, with the adapters merged.

    Adds to the summary, as `merge_gap`, how far its log-probs are from those of the quantised model: the mean absolute difference over the
    tokens of the first prompts, in nats.

    Args:
        masters: Of the adapters, where they computed in bf16.
        dtype: Of the weights; None for that of the base model's folder.
    """
    before = prompt_logp(model, prompts[:MERGE_PROMPTS])
    if masters is not None:
        masters.restore_module()
    stored = models.load_config(config.model, "model").dtype
    merged = merged_copy(model, dtype or (stored if isinstance(stored, torch.dtype) else torch.float32))
    if len(before):
        summary["merge_gap"] = float((prompt_logp(merged, prompts[:MERGE_PROMPTS]) - before).abs().mean())
    return merged


@torch.no_grad()
def prompt_logp(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Tensor:
    """Return the log-probs of all tokens of the prompts but the first of each, on the CPU."""
    parts = [torch.zeros(0)]
    for prompt in prompts:
        ids_T = torch.tensor(prompt.ids, device=model.device)
        logp_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logp_TV.gather(-1, ids_T[1:, None])[:, 0].cpu())
    return torch.cat(parts)


def generation_config(config: Config, eos: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the decoding of the evaluation, without its limit of new tokens: a deployed model should not be cut off there."""
    greedy = config.eval.temperature == 0
    return GenerationConfig(
        do_sample=not greedy,
        temperature=None if greedy else config.eval.temperature,
        top_k=None if greedy else 0,  # the default is 50
        top_p=None if greedy else 1.0,
        eos_token_id=list(eos),
        pad_token_id=tokenizer.pad_token_id,
    )


def export_model(source: Path, out: Path, dtype: str = "float32", repository: str | None = None) -> str | None:
    """Write the model of a run or checkpoint to a folder, and upload it where a repository is named.

    Args:
        source: a run folder or a checkpoint, as `export_source.check_request` accepts them with the other arguments.
        out: a new or empty folder.
        dtype: of the weights, one of `DTYPES`.
        repository: OWNER/NAME on the hub.

    Returns:
        The address of the upload.

    Raises:
        OutputError: the disk refuses it, or the upload failed.
    """
    config, model, tokenizer, summary = _load_run(source) if is_run(source) else _load_checkpoint(source, DTYPES[dtype])
    save_model(out, model.to(DTYPES[dtype]), tokenizer, models.eos_ids(model, tokenizer), config, summary)
    return None if repository is None else hub.push(out, repository)


def checkpoint_summary(name: str, metrics: Lines, evaluations: Lines) -> dict[str, Any]:
    """Return what a run had achieved at a checkpoint, for its model card.

    Args:
        name: of the checkpoint's folder.
        metrics, evaluations: all lines of the run's logs.
    """
    found = NAME.fullmatch(name)
    assert found is not None
    step = int(found[1])
    before = [line for line in metrics if line["step"] <= step]
    return summarised(before, evaluations, step) | {"steps": step, "checkpoint": name}


def _load_run(folder: Path) -> tuple[Config, Any, PreTrainedTokenizerBase, dict[str, Any]]:
    run, final = open_run(folder), folder / FINAL
    assert run.summary is not None
    summary = dict(run.summary)
    if "checkpoint" in summary:  # that final/ was made from
        summary |= checkpoint_summary(summary["checkpoint"], run.metrics, run.evaluations)
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    return to_unchecked_config(restore_config(run.config)), model, AutoTokenizer.from_pretrained(final), summary


def _load_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[Config, Any, PreTrainedTokenizerBase, dict[str, Any]]:
    checkpoint = read(folder)
    config = checkpoint_config(checkpoint)
    base = replace(config.model, adapter=None) if config.lora.rank else config.model
    model = models.load_model(base, "model", torch.device("cpu"))
    adapters = trained_adapters(model.requires_grad_(not config.lora.rank), config) if config.lora.rank else None
    restore_weights(checkpoint, model_tensors(model))
    tokenizer = models.load_tokenizer(config.model, "model")
    run = Run(checkpoint.path.parent.parent)
    summary = checkpoint_summary(checkpoint.path.name, run.metrics, run.evaluations)
    if is_quantized(model):
        merged = merge_quantized(model, None, config, _prompts(config, tokenizer), summary, dtype)
        if "merge_gap" in summary:
            log.warning("adapters merged: %.1e nats per token from the quantised model", summary["merge_gap"])
        return config, merged, tokenizer, summary
    return config, model if adapters is None else adapters.merge_and_unload(), tokenizer, summary


def _prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the run's prompts to train on; none where its data cannot be loaded here."""
    try:
        return load_prompts(config, tokenizer, Given())[0]
    except OpdError as error:
        log.warning("how far the merged weights are from the quantised model is not measured without the run's data: %s", error)
        return []
