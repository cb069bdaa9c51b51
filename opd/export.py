"""`final/`: the student as a plain Hugging Face model folder."""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.config.schema import Config
from opd.errors import OutputError


def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: tuple[int, ...],
    config: Config,
    summary: Mapping[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (float32: those evaluated), tokenizer with chat template, generation config and model card; replaces `folder`.

    weights: the model's, by name, where it holds a part of them only.
    """
    work = folder.with_name(f"tmp_{folder.name}")
    try:
        shutil.rmtree(work, ignore_errors=True)
        model.generation_config = generation_config(config, eos, tokenizer)
        model.save_pretrained(work, state_dict=weights)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(model_card(config, summary), encoding="utf-8")
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
        max_new_tokens=config.eval.max_new_tokens,
        eos_token_id=list(eos),
        pad_token_id=tokenizer.pad_token_id,
    )


def model_card(config: Config, summary: Mapping[str, Any]) -> str:
    rows = [("reward", *(number(summary[f"reward_{when}"]) for when in ("before", "after", "teacher")))]
    rows.append(("KL(student‖teacher), nats per token", number(summary["eval_kl_before"]), number(summary["eval_kl_after"]), "0"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    base = "" if config.model.path.startswith(("bundled:", "/", ".", "~")) else f"base_model: {config.model.path}\n"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- on-policy-distillation
---

# {config.name}

`{config.model.path}` distilled on-policy from `{config.teacher.path}` (revision {config.teacher.revision or "default"})
on `{config.data.path or config.data.source.value}`.

|  | before | after | teacher |
|---|---|---|---|
{table}

Method: {config.ppo.estimator.value} estimator, {config.ppo.steps} inner step(s), {summary["steps"]} steps,
{summary["graded_tokens"]:,} graded tokens; learning rate {config.optim.lr:g}, temperature {config.sampling.temperature:g},
{config.sampling.n} completions a prompt of at most {config.sampling.max_new_tokens} tokens, seed {config.seed}.
Made with {versions}. The licence is that of the base model.
"""


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
