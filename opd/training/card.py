"""The model card of what was trained: what from, how, how good it is, and under which licence, as far as the base tells."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from opd.config.compose import to_dict
from opd.config.schema import Config, Source
from opd.data import hub
from opd.models.load import BUNDLED

LICENCE = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHOWN = (
    ("estimator, divergence", "{ppo[estimator]}, {ppo[divergence]}"),
    ("inner steps, clip", "{ppo[steps]}, {ppo[clip_eps]:g}"),
    ("advantage clip", "{ppo[advantage_clip]}"),
    ("learning rate, schedule, warm-up", "{optim[lr]:g}, {optim[schedule]}, {optim[warmup_steps]} steps"),
    ("weight decay, gradient norm at most", "{optim[weight_decay]:g}, {optim[max_grad_norm]:g}"),
    ("prompts a process and step × completions", "{train[batch_size]} × {sampling[n]}"),
    ("sampling temperature, top-p, top-k", "{sampling[temperature]:g}, {sampling[top_p]:g}, {sampling[top_k]}"),
    ("new tokens at most", "{sampling[max_new_tokens]}"),
    ("low-rank adapters", "{lora[rank]}"),
    ("seed", "{seed}"),
)


def model_card(config: Config, summary: Mapping[str, Any], dtype: str = "float32") -> str:
    """Markdown behind YAML that the hub reads.

    summary: as in summary.json, with what is known; `checkpoint` names the one that the weights are of, if any. dtype: of the weights.
    """
    options = to_dict(config)
    licence = base_licence(config)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", **licence}
    if on_hub(config.model.path):
        front |= {"base_model": config.model.path, "base_model_relation": "finetune"}
    if config.data.source is Source.hub and on_hub(config.data.path or ""):
        front["datasets"] = [config.data.path]
    front["tags"] = ["on-policy-distillation", "opd"]
    data = config.data.path or config.data.train_path or config.data.source.value
    named = [("student", model_name(config.model)), ("teacher", model_name(config.teacher)), ("data", f"`{data}`")]
    if config.teacher.system is not None:
        named.append(("teacher's own prompt", f"`{one_line(config.teacher.system)}`"))
    made_with = summary.get("versions") or {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {config.name}",
            "",
            "Distilled on-policy: the student wrote, the teacher scored every token, the student was updated towards the teacher.",
            "",
            *(f"- {label}: {value}" for label, value in named),
            "",
            "## Result",
            "",
            *result(summary),
            "",
            decoding(config),
            "",
            "## Method",
            "",
            f"{counted(summary, 'steps')} steps, {counted(summary, 'graded_tokens')} graded tokens{state(summary)}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {label} | {template.format(**options)} |" for label, template in SHOWN),
            "",
            f"Made with {', '.join(f'{name} {number}' for name, number in made_with.items())}; weights in {dtype}.",
            "",
            "## Licence",
            "",
            f"That of the base model: {licence['license']}."
            if licence
            else "The base model's licence is not known here: look it up there.",
            "",
        ]
    )


def result(summary: Mapping[str, Any]) -> list[str]:
    """Before, after and teacher, as a table."""
    rewards = [reward(summary, when) for when in ("before", "after", "teacher")]
    kl = [figure(summary.get(f"eval_kl_{when}")) for when in ("before", "after")]
    lines = ["| | before | after | teacher |", "|---|---|---|---|"]
    lines.append(f"| reward | {' | '.join(rewards)} |")
    lines.append(f"| KL(student‖teacher), nats a token | {' | '.join(kl)} | 0 |")
    gap = summary.get("gap_closed")
    return lines if gap is None else [*lines, "", f"{gap:.1%} of the gap to the teacher closed."]


def reward(summary: Mapping[str, Any], when: str) -> str:
    value, bounds = summary.get(f"reward_{when}"), summary.get(f"reward_{when}_interval")
    return figure(value) + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if value is not None and bounds else "")


def decoding(config: Config) -> str:
    how = "greedy decoding" if config.eval.temperature == 0 else f"sampling at temperature {config.eval.temperature:g}"
    judged = f"Reward `{config.eval.reward}` with 95 % intervals" if config.eval.reward is not None else "Evaluated"
    return f"{judged}, {how}, at most {config.eval.max_new_tokens} new tokens; the generation config beside this file decodes the same way."


def counted(summary: Mapping[str, Any], name: str) -> str:
    return f"{summary[name]:,}" if summary.get(name) is not None else "an unknown number of"


def state(summary: Mapping[str, Any]) -> str:
    return f"; the weights are those of the checkpoint `{summary['checkpoint']}`" if "checkpoint" in summary else ""


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def model_name(model: Any) -> str:
    """The path and, of a hub model, the revision."""
    revision = f" at revision `{model.revision or 'main'}`" if on_hub(model.path) else ""
    file = f", file `{model.gguf_file}`" if model.gguf_file is not None else ""
    return f"`{model.path}`{revision}{file}"


def on_hub(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.startswith(".") and not Path(path).is_dir()


def base_licence(config: Config) -> dict[str, str]:
    """What the student's own model card says of its licence; empty where it says nothing, or cannot be had."""
    if config.model.path.startswith(BUNDLED):
        return {"license": "apache-2.0"}
    local = Path(config.model.path).expanduser() / "README.md"
    if local.is_file():
        card = local.read_text(encoding="utf-8", errors="replace")
    else:
        card = hub.model_card(config.model.path, config.model.revision) if on_hub(config.model.path) else ""
    told = front_matter(card)
    return {name: str(told[name]) for name in LICENCE if isinstance(told.get(name), str)} if isinstance(told.get("license"), str) else {}


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    try:
        told = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return told if isinstance(told, dict) else {}
