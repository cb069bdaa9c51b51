"""Models as plain Hugging Face folders: `final/` of a run, and `opd export` of a run or checkpoint. Each has a model card."""

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opd.config.compose import restore_config, to_config, to_dict
from opd.config.options import Control, DataConfig, ModelConfig, Source
from opd.config.schema import Config
from opd.data import hub
from opd.data.prompts import Prompt
from opd.errors import ConfigError, DataError, OpdError, OutputError
from opd.models import load as models
from opd.models.adapters import trained_adapters
from opd.models.masters import MasterWeights
from opd.models.policy import is_quantized
from opd.runs.folder import FINAL
from opd.runs.outcome import summarised
from opd.runs.reader import Run, is_run, open_run
from opd.runs.text import format_number, format_percent, format_reward, one_line
from opd.samplers.weights import merged_copy
from opd.training.build import Given, load_prompts
from opd.training.checkpoint import model_tensors, read, restore_weights, verify

log = logging.getLogger(__name__)

MERGE_PROMPTS = 8  # prompts on which a merged model is compared with the quantised one
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NEW_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHOD = (
    ("estimator, divergence", "{ppo[estimator]}, {ppo[divergence]}"),
    ("inner steps, clip", "{ppo[steps]}, {ppo[clip_eps]:g}"),
    ("advantage clip", "{ppo[advantage_clip]}"),
    ("learning rate, schedule, warm-up", "{optim[lr]:g}, {optim[schedule]}, {optim[warmup_steps]} steps"),
    ("weight decay, maximum gradient norm", "{optim[weight_decay]:g}, {optim[max_grad_norm]:g}"),
    ("prompts per process and step × completions", "{train[batch_size]} × {sampling[n]}"),
    ("sampling temperature, top-p, top-k", "{sampling[temperature]:g}, {sampling[top_p]:g}, {sampling[top_k]}"),
    ("maximum new tokens", "{sampling[max_new_tokens]}"),
    ("low-rank adapters, quantised base", "{lora[rank]}, {model[quantization]}"),
    ("share of given completions, coefficient of the KL to the start", "{train[given_share]}, {ppo[reference_coef]:g}"),
    ("seed", "{seed}"),
)


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
        folder: the new model folder.
        model: without adapters.
        tokenizer: the student's.
        eos: the ids that end a completion.
        config: of the run.
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
        source: a run folder or a checkpoint.
        out: a new or empty folder.
        dtype: of the weights, one of `DTYPES`.
        repository: OWNER/NAME on the hub.

    Returns:
        The address of the upload.

    Raises:
        ConfigError: the repository's name is not one.
        OutputError: `out` is not empty, or the upload failed.
        DataError: `source` is neither a finished run nor an intact checkpoint.
    """
    if repository is not None and NEW_REPOSITORY.fullmatch(repository) is None:
        raise ConfigError(f"--push {repository}: must be OWNER/NAME")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: exists and is not empty; name a new folder")
    config, model, tokenizer, summary = _load_run(source) if is_run(source) else _load_checkpoint(source, DTYPES[dtype])
    save_model(out, model.to(DTYPES[dtype]), tokenizer, models.eos_ids(model, tokenizer), config, summary)
    return None if repository is None else hub.push(out, repository)


def _load_run(folder: Path) -> tuple[Config, Any, PreTrainedTokenizerBase, dict[str, Any]]:
    run, final = open_run(folder), folder / FINAL
    if run.summary is None or not (final / "config.json").is_file():
        raise DataError(f"{folder}: the run is {run.status}, not done, or {FINAL}/ is missing; name one of its checkpoints instead")
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    return to_config(restore_config(run.config)), model, AutoTokenizer.from_pretrained(final), run.summary


def _load_checkpoint(folder: Path, dtype: torch.dtype) -> tuple[Config, Any, PreTrainedTokenizerBase, dict[str, Any]]:
    if not folder.is_dir():
        others = ", ".join(sorted(path.name for path in folder.parent.glob("step_*")))
        raise DataError(f"{folder}: there is no such folder" + (f"; there are {others}" if others else ""))
    problem = verify(folder)
    if problem is not None:
        raise DataError(
            f"{folder}: not a run folder, nor an intact checkpoint ({problem}); name runs/NAME or runs/NAME/checkpoints/step_NUMBER"
        )
    checkpoint = read(folder)
    config = to_config(restore_config(checkpoint.state["config"]))
    base = replace(config.model, adapter=None) if config.lora.rank else config.model
    model = models.load_model(base, "model", torch.device("cpu"))
    adapters = trained_adapters(model.requires_grad_(not config.lora.rank), config) if config.lora.rank else None
    restore_weights(checkpoint, model_tensors(model))
    tokenizer = models.load_tokenizer(config.model, "model")
    run = Run(checkpoint.path.parent.parent)
    metrics = [line for line in run.metrics if line["step"] <= checkpoint.step]
    summary = summarised(metrics, run.evaluations, checkpoint.step) | {"steps": checkpoint.step, "checkpoint": checkpoint.path.name}
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


def _labelled(name: str, label: str) -> str:
    return f"{name} ({label})" if label else name


def _data_name(data: DataConfig) -> str:
    return f"`{data.path or data.train_path or data.source.value}`"


def model_card(config: Config, summary: Mapping[str, Any], dtype: str = "float32") -> str:
    """Return the model card: Markdown after the YAML that the hub reads.

    Args:
        config: of the run.
        summary: as in summary.json, as far as known; `checkpoint` names the one that the weights are from, if any.
        dtype: of the weights.
    """
    licence = base_licence(config.model)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **licence}
    if _on_hub(config.model.path):
        front |= {"base_model": config.model.path, "base_model_relation": "finetune"}
    parts, teachers = config.parts, config.parts_by_teacher
    on_hub = sorted({part.data.path or "" for part in parts.values() if part.data.source is Source.hub})
    if on_hub and all(map(_on_hub, on_hub)):
        front["datasets"] = on_hub
    front["tags"] = ["on-policy-distillation", "opd"]

    facts = {
        "student": _model_name(config.model),
        **{
            _labelled("teacher", label): f"the student {part.teacher_name}" if part.teaches_itself else _model_name(part.teacher)
            for label, part in teachers.items()
        },
        **{_labelled("data", label): _data_name(part.data) for label, part in parts.items()},
    }
    if config.control is not Control.none:
        facts["control"] = f"`{config.control.value}`: trained without what the teacher knows"
    for label, part in teachers.items():
        views = {"system prompt": part.teacher.system, "prompt": part.teacher.prompt, "contrast": part.teacher.contrast}
        for name, text in views.items():
            if text is not None:
                facts[_labelled(f"{name} of the teacher", label)] = "`" + one_line(text.replace("`", "'")) + "`"
    student_and_data = "\n".join(f"- {label}: {value}" for label, value in facts.items())
    whens = ("before", "after", "teacher")
    rewards = [format_reward(summary.get(f"reward_{when}"), summary.get(f"reward_{when}_interval")) for when in whens]
    kl = [format_number(summary.get(f"eval_kl_{when}"), ".3f") for when in ("before", "after")]
    gap = "" if summary.get("gap_closed") is None else f"{format_percent(summary['gap_closed'])} of the gap to the teacher closed. "
    judged = "Evaluated" if config.eval.reward is None else f"Reward `{config.eval.reward}` with 95% intervals, evaluated"
    decoding = "greedy decoding" if config.eval.temperature == 0 else f"sampling at temperature {config.eval.temperature:g}"
    steps, tokens = (format_number(summary.get(name), ",") for name in ("steps", "graded_tokens"))
    merged = summary.get("merge_gap")
    merge = f" Adapters merged: {merged:.1e} nats/token from the quantised model that was trained." if merged is not None else ""
    checkpoint = f" The weights are those of the checkpoint `{summary['checkpoint']}`." if "checkpoint" in summary else ""
    options = to_dict(config)
    options["train"]["given_share"] = str(options["train"]["given_share"]).replace("'", "")  # JSON has texts as keys
    method = "\n".join(f"| {label} | {template.format(**options)} |" for label, template in METHOD)
    versions = summary.get("versions") or {name: version(name) for name in ("torch", "transformers", "accelerate")}
    made_with = ", ".join(f"{name} {number}" for name, number in versions.items())
    licence_of = f"That of the base model: {licence['license']}." if licence else "Unknown here: look it up at the base model."
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()}
---

# {config.name}

Trained by on-policy distillation: the student generates, the teacher scores every token, the student is trained towards the teacher.

{student_and_data}

## Result

| | before | after | teacher |
|---|---|---|---|
| reward | {" | ".join(rewards)} |
| KL(student‖teacher), nats/token | {" | ".join(kl)} | 0 |

{gap}{judged} with {decoding}, at most {config.eval.max_new_tokens} new tokens.
generation_config.json sets this decoding, but not the limit: choose `max_new_tokens` for your use.

## Method

{steps} steps, {tokens} trained tokens.{checkpoint}{merge}

| | |
|---|---|
{method}

Made with {made_with}; weights in {dtype}.

## Licence

{licence_of}
"""


def _model_name(model: ModelConfig) -> str:
    revision = f" at revision `{model.revision or 'main'}`" if _on_hub(model.path) else ""
    file = f", file `{model.gguf_file}`" if model.gguf_file is not None else ""
    adapter = f" with the adapter `{model.adapter}`" if model.adapter is not None else ""
    return f"`{model.path}`{revision}{file}{adapter}"


def _on_hub(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.startswith(".") and not Path(path).is_dir()


def base_licence(model: ModelConfig) -> dict[str, str]:
    """Return the licence fields of a model's own card; none where it has none, or cannot be reached."""
    if model.path.startswith(models.BUNDLED):
        return {"license": "apache-2.0"}
    file = Path(model.path).expanduser() / "README.md"
    if file.is_file():
        card = file.read_text(encoding="utf-8", errors="replace")
    else:
        card = hub.model_card(model.path, model.revision) if _on_hub(model.path) else ""
    front = front_matter(card)
    fields = {name: front[name] for name in ("license", "license_name", "license_link") if isinstance(front.get(name), str)}
    return fields if "license" in fields else {}


def front_matter(card: str) -> dict[str, Any]:
    """Return the YAML at the head of a model card; empty where there is none, or it is damaged."""
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    try:
        front = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
