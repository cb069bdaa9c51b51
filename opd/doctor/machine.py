"""Checks of the machine: memory, time and installed packages."""

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from opd.config.options import ModelConfig, OptimizerName, Quantization, naming_teacher
from opd.config.schema import Config
from opd.doctor.findings import Finding, fail, ok, warn
from opd.models.memory import Memory
from opd.runs.text import format_bytes, format_duration
from opd.training.logs import check_tracker

TIGHT = 0.85  # share of the free memory: measured peaks were up to 15 % above the estimate
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
    in_use = memory.resident["the process"]
    needed = memory.peak - in_use
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.parts.items() if size >= 0.005 * 2**30)
    what = f"about {format_bytes(memory.peak)} a process on {device.type} ({parts}), of {format_bytes(free + in_use)}"
    largest = max(memory.parts.keys() & REMEDIES.keys(), key=lambda name: memory.parts[name])
    if needed > free:
        return [fail("memory", what, f"the largest part is {largest}: {REMEDIES[largest]}")]
    if needed > TIGHT * free:
        return [warn("memory", what, f"this is tight, and the estimate may be 15 % off: {REMEDIES[largest]}")]
    return [ok("memory", what)]


def check_time(seconds: Mapping[str, float], tokens_per_second: float, mfu: float, config: Config, steps: int) -> list[Finding]:
    """Extrapolate from one step to the run, without evaluations and checkpoints."""
    per_step = seconds["sample"] + seconds["score"] + config.ppo.steps * seconds["update"]
    parts = ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items() if value)
    run = f"{format_duration(per_step * steps)} for {steps:,} steps, without evaluations"
    return [ok("time", f"about {per_step:.2g} s a step ({parts}; {tokens_per_second:,.0f} trained tokens/s, {mfu:.1%} MFU), {run}")]


def check_packages(config: Config) -> list[Finding]:
    """Look for the packages that the options need. Raises `ConfigError` if the tracker's is missing."""
    check_tracker(config.track.tool)
    loaded: dict[str, ModelConfig] = {"model.": config.model}
    loaded |= {naming_teacher(label)("teacher."): part.teacher for label, part in config.parts_by_teacher.items()}
    gguf = next((f"{prefix}gguf_file" for prefix, model in loaded.items() if model.gguf_file), "")
    rank = [f"lora.rank={config.lora.rank}"] if config.lora.rank > 0 else []
    peft = next(iter([*rank, *(f"{prefix}adapter" for prefix, model in loaded.items() if model.adapter)]), "")
    states = ["optim.name=adamw8bit"] if config.optim.name is OptimizerName.adamw8bit else []
    packed = (f"{prefix}quantization" for prefix, model in loaded.items() if model.quantization is not Quantization.none)
    bits = next(iter([*states, *packed]), "")
    needed = {
        "peft": (peft, f"{peft} needs it: pip install 'opd[lora]'"),
        "bitsandbytes": (bits, f"{bits} needs it: pip install 'opd[quantized]'"),
        "gguf": (gguf, f"{gguf} needs it: pip install 'opd[gguf]'"),
        "math_verify": (config.eval.reward == "math", "eval.reward=math needs it: pip install 'opd[math]'"),
    }
    missing = [
        fail("packages", f"{package} is not installed", remedy)
        for package, (wanted, remedy) in needed.items()
        if wanted and find_spec(package) is None
    ]
    return [ok("tracker", f"track.tool={config.track.tool.value}; all metrics are in metrics.jsonl too"), *missing]
