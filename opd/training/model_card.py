"""The model card of a trained model: what it was made from, with which options, and what it achieved."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from opd.config.compose import to_dict
from opd.config.options import Control, ModelConfig, Source
from opd.config.schema import Config
from opd.data import hub
from opd.models.locate import BUNDLED
from opd.runs.text import describe_gap, format_number, format_reward, one_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
METHOD = (
    ("estimator, divergence", "{ppo[estimator]}, {ppo[divergence]}"),
    ("inner steps, clip", "{ppo[steps]}, {ppo[clip_eps]:g}"),
    ("advantage clip", "{ppo[advantage_clip]}"),
    ("learning rate, schedule, warm-up", "{optim[lr]}, {optim[schedule]}, {optim[warmup_steps]} steps"),
    ("weight decay, maximum gradient norm", "{optim[weight_decay]:g}, {optim[max_grad_norm]:g}"),
    ("prompts per process and step × completions", "{train[batch_size]} × {sampling[n]}"),
    ("sampling temperature, top-p, top-k", "{sampling[temperature]:g}, {sampling[top_p]:g}, {sampling[top_k]}"),
    ("maximum new tokens", "{sampling[max_new_tokens]}"),
    ("low-rank adapters, quantised base", "{lora[rank]}, {model[quantization]}"),
    ("share of given completions, coefficient of the KL to the start", "{train[given_share]}, {ppo[reference_coef]:g}"),
    ("seed", "{seed}"),
)


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

    facts = [("student", "", _model_name(config.model))]
    for label, part in teachers.items():
        facts.append(("teacher", label, f"the student {part.teacher_name}" if part.teaches_itself else _model_name(part.teacher)))
    for label, part in parts.items():
        facts.append(("data", label, f"`{part.data.path or part.data.train_path or part.data.source.value}`"))
    if config.control is not Control.none:
        facts.append(("control", "", f"`{config.control.value}`: trained without what the teacher knows"))
    for label, part in teachers.items():
        views = {"system prompt": part.teacher.system, "prompt": part.teacher.prompt, "contrast": part.teacher.contrast}
        texts = {name: one_line(text.replace("`", "'")) for name, text in views.items() if text is not None}
        facts += [(f"{name} of the teacher", label, f"`{text}`") for name, text in texts.items()]
    student_and_data = "\n".join(f"- {name}{f' ({label})' if label else ''}: {value}" for name, label, value in facts)
    whens = ("before", "after", "teacher")
    shares = summary.get("reward_is_share", True)
    rewards = [format_reward(summary.get(f"reward_{when}"), summary.get(f"reward_{when}_interval"), shares=shares) for when in whens]
    kl = [format_number(summary.get(f"eval_kl_{when}"), ".3f") for when in ("before", "after")]
    gap = "" if summary.get("gap_closed") is None else f"{describe_gap(summary['gap_closed']).capitalize()}. "
    judged = "Evaluated" if config.eval.reward is None else f"Reward `{config.eval.reward}` with 95% intervals, evaluated"
    decoding = "greedy decoding" if config.eval.temperature == 0 else f"sampling at temperature {config.eval.temperature:g}"
    steps, tokens = (format_number(summary.get(name), ",") for name in ("steps", "graded_tokens"))
    merged = summary.get("merge_gap")
    merge = f" Adapters merged: {merged:.1e} nats/token from the quantised model that was trained." if merged is not None else ""
    checkpoint = f" The weights are those of the checkpoint `{summary['checkpoint']}`." if "checkpoint" in summary else ""
    options = to_dict(config)
    options["optim"]["lr"] = "by size" if config.optim.lr is None else f"{config.optim.lr:g}"
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
    if model.path.startswith(BUNDLED):
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
