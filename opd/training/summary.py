"""`summary.json`: what a run achieved, computed from what it logged, so that an interrupted run ends with the same, and what it took."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from opd import __version__
from opd.config.schema import Config
from opd.models import device as memory
from opd.runs.folder import RunFolder
from opd.runs.outcome import achieved


def summarise(config: Config, run_folder: RunFolder, steps: int, peak: int, grown: Mapping[str, int], device: str) -> dict[str, Any]:
    """Rewards (with 95 % intervals), exact KL and training KL before and after, and what it cost; null for what was not measured.

    steps: how many were done. peak: bytes of memory at the most. grown: as `Trainer.grown`. device: what it ran on, in words.
    """
    return {
        **achieved(run_folder.metrics(), run_folder.evaluations()),
        "steps": steps,
        "peak_memory_bytes": peak,
        "peak_memory_grown_bytes": dict(grown),
        "seed": config.seed,
        "device": device,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    named = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"opd": __version__, **named, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes: the most that any process held on its GPU, or of main memory on a CPU."""
    own = memory.peak_memory(accelerator.device)
    found: Sequence[int] = accelerator.gather(torch.tensor([own], device=accelerator.device)).tolist()
    return max(found)
