"""Whether the run fits the machine: memory, time, packages."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from opd.config.schema import Config
from opd.doctor.findings import Finding, fail, ok, warn
from opd.doctor.footprint import Footprint
from opd.training.logs import check_tracker

TIGHT = 0.85  # share of the free memory: estimates were seen to be up to 15 % too low
GIB = 2**30
REMEDIES = {
    "activations": "lower train.max_tokens_per_micro_batch, or set train.activation_checkpointing=true",
    "KV cache": "lower sampling.batch_size and eval.batch_size",
    "logits": "lower sampling.batch_size and eval.batch_size",
    "head chunks": "take lora=default, which leaves the output layer as it is",
    "optimizer": "take lora=default, or a smaller student",
    "gradients": "take lora=default, or a smaller student",
    "student": "take a smaller student",
    "teacher": "take teacher.dtype=bfloat16, or a smaller teacher",
}


def check_memory(footprint: Footprint, free: int, device: torch.device) -> list[Finding]:
    """footprint: with what the process holds already. free: bytes that can still be had, without what it holds."""
    held = footprint.resident["the process"]
    need, phase = footprint.peak - held, largest_phase(footprint)
    parts = {**footprint.resident, **phase}
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= 0.005 * GIB)
    what = f"about {footprint.peak / GIB:.2f} GiB a process on {device.type} ({told}), of {(free + held) / GIB:.2f} GiB"
    heaviest = max((name for name in parts if name in REMEDIES), key=lambda name: parts[name])
    if need > free:
        return [fail("memory", what, f"{heaviest} are the most of it: {REMEDIES[heaviest]}")]
    if need > TIGHT * free:
        return [warn("memory", what, f"that is tight, and the estimate may be 15 % off: {REMEDIES[heaviest]}")]
    return [ok("memory", what)]


def largest_phase(footprint: Footprint) -> dict[str, int]:
    return max(footprint.sampling, footprint.update, key=lambda parts: sum(parts.values()))


def check_time(seconds: Mapping[str, float], config: Config, steps: int) -> list[Finding]:
    """Extrapolated from a single step; evaluations and checkpoints come on top."""
    a_step = seconds["sample"] + seconds["score"] + config.ppo.steps * seconds["update"]
    shares = ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items())
    return [ok("time", f"about {a_step:.2g} s a step ({shares}), {spoken(a_step * steps)} for {steps:,} steps, evaluations not counted")]


def spoken(seconds: float) -> str:
    """A duration in words."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def check_packages(config: Config) -> list[Finding]:
    """What the configured extras need. Raises `ConfigError` where the tracker's is missing."""
    check_tracker(config.track.tool)
    found: list[Finding] = [ok("tracker", f"track.tool={config.track.tool.value}; metrics.jsonl is always written")]
    wanted: dict[str, tuple[Any, str]] = {
        "peft": (config.lora.rank > 0, f"lora.rank={config.lora.rank} needs it: pip install 'opd[lora]'"),
        "gguf": (config.model.gguf_file or config.teacher.gguf_file, "model.gguf_file needs it: pip install 'opd[gguf]'"),
        "math_verify": (config.eval.reward == "math", "eval.reward=math needs it: pip install 'opd[math]'"),
    }
    for package, (needed, remedy) in wanted.items():
        if needed and find_spec(package) is None:
            found.append(fail("packages", f"{package} is not installed", remedy))
    return found
