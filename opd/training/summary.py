"""What a run took, for summary.json. What it achieved is computed in `opd.runs.outcome`."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from opd import __version__
from opd.models.device import peak_memory


def run_costs(accelerator: Accelerator, steps: int, grown: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Return the part of summary.json that is not in the logs. All ranks must call it: it gathers their peaks of memory."""
    device = accelerator.device
    peaks = accelerator.gather(torch.tensor([peak_memory(device)], device=device)).tolist()
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "steps": steps,
        "peak_memory_bytes": max(peaks),
        "peak_memory_grown_bytes": dict(grown),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads",
        "versions": {"opd": __version__, **packages, "python": platform.python_version()},
    }
