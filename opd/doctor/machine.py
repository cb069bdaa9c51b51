"""Checks of the machine: memory, time and installed packages."""

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from opd.config.options import ModelConfig, OptimizerName, Quantization, naming_teacher
from opd.config.schema import Config
from opd.doctor.findings import Finding, fail, ok, warn
from opd.models.memory import Memory
from opd.runs.text import format_bytes, format_duration
from opd.training.disk import REMEDY, Disk
from opd.training.logs import check_tracker

MIN_EVALUATION = 60.0  # seconds; evaluations that take less in all are no reason to warn
TIGHT = 0.85  # share of the free memory: measured peaks were up to 15 % above the estimate
EXTRAS = {"peft": "lora", "bitsandbytes": "quantized", "gguf": "gguf", "math_verify": "math"}  # by package
REMEDIES = {
    "activations": "lower train.max_tokens_per_micro_batch, or set train.activation_checkpointing=true",
    "decode line": "lower sampling.batch_size or sampling.max_new_tokens",
    "KV cache": "lower sampling.batch_size and eval.batch_size",
    "logits": "lower sampling.batch_size and eval.batch_size",
    "bf16 copy": "set sampling.dtype=trainer",
    "head chunks": "set lora=default, which does not train the output layer",
    "optimizer": "set lora=default, or take a smaller student",
    "gradients": "set lora=default, or take a smaller student",
    "student": "take a smaller student",
    "teacher": "set teacher.dtype=bfloat16, or take a smaller teacher; for a student that is its own teacher, set lora=default",
    "reference": "set lora=default, whose start takes no memory, or ppo.reference_coef=0",
}


def check_memory(memory: Memory, free: int, device: torch.device) -> list[Finding]:
    """Compare the estimate, less what the process uses already, with the `free` bytes of the device."""
    needed, total = memory.needed, free + memory.resident["the process"]
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.parts.items() if size >= 0.005 * 2**30)
    what = f"about {format_bytes(memory.peak)} a process on {device.type} ({parts}), of {format_bytes(total)}"
    largest = max(memory.parts.keys() & REMEDIES.keys(), key=lambda name: memory.parts[name])
    if needed > free:
        return [fail("memory", what, f"the largest part is {largest}: {REMEDIES[largest]}")]
    if needed > TIGHT * free:
        return [warn("memory", what, f"this is tight, and the estimate may be 15 % off: {REMEDIES[largest]}")]
    return [ok("memory", what)]


def check_time(training: float, evaluations: float, counted: str, parts: str, members: int = 1) -> list[Finding]:
    """Sum up the time of a run, without its checkpoints.

    Args:
        training, evaluations: Seconds of all steps, and of all evaluations.
        counted: How many steps and evaluations these are, in words.
        parts: What a step's time is made of, in words.
        members: Of the sweep.
    """
    whole = members * (training + evaluations)
    several = f" for {members} members" if members > 1 else ""
    what = f"about {format_duration(whole)}{several}: {format_duration(training)} of training and "
    what += f"{format_duration(evaluations)} of evaluations ({counted}); {parts}"
    if evaluations > training and evaluations > MIN_EVALUATION:
        remedy = "evaluations take longer than training: lower eval.limit, eval.max_new_tokens or eval.kl_prompts, or raise eval.steps"
        return [warn("time", what, remedy)]
    return [ok("time", what)]


def check_disk(disk: Disk, free: int, members: int = 1) -> list[Finding]:
    """Compare what the run's files take with the `free` bytes of the disk."""
    what = disk.describe(free, members)
    if disk.total(members) > free:
        return [fail("disk", what, REMEDY)]
    return [warn("disk", what, f"this is tight: {REMEDY}") if disk.total(members) > TIGHT * free else ok("disk", what)]


def step_seconds(seconds: Mapping[str, float], config: Config) -> float:
    """Return what a step takes, from the seconds of a trial step, which updates once."""
    return seconds["sample"] + seconds["score"] + config.ppo.steps * seconds["update"]


def check_packages(config: Config) -> list[Finding]:
    """Look for the packages that the options need. Raises `ConfigError` if the tracker's is missing."""
    check_tracker(config.track.tool)
    uses = [
        ("peft", f"lora.rank={config.lora.rank}", config.lora.rank > 0),
        ("bitsandbytes", "optim.name=adamw8bit", config.optim.name is OptimizerName.adamw8bit),
        ("math_verify", "eval.reward=math", config.eval.reward == "math"),
    ]
    loaded: dict[str, ModelConfig] = {"model.": config.model}
    loaded |= {naming_teacher(label)("teacher."): part.teacher for label, part in config.parts_by_teacher.items()}
    for prefix, model in loaded.items():
        uses.append(("peft", f"{prefix}adapter", bool(model.adapter)))
        uses.append(("bitsandbytes", f"{prefix}quantization", model.quantization is not Quantization.none))
        uses.append(("gguf", f"{prefix}gguf_file", bool(model.gguf_file)))
    needed_by = {package: option for package, option, is_used in reversed(uses) if is_used}  # the first option of each
    missing = [
        fail("packages", f"{package} is not installed", f"{needed_by[package]} needs it: pip install 'opd[{extra}]'")
        for package, extra in EXTRAS.items()
        if package in needed_by and find_spec(package) is None
    ]
    return [ok("tracker", f"track.tool={config.track.tool.value}; all metrics are in metrics.jsonl too"), *missing]
