"""`summary.json`: what a run achieved, computed from what it logged, so that an interrupted run ends with the same summary."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator

from opd import __version__, forward
from opd.config.schema import Config
from opd.run_folder import RunFolder


def summarise(config: Config, run_folder: RunFolder, steps: int, peak: int, grown: Mapping[str, int], device: str) -> dict[str, Any]:
    """Rewards (with 95 % intervals), exact KL and training KL before and after, and what it cost; null for what was not measured.

    steps: how many were done. peak: bytes of memory at the most. grown: as `Trainer.grown`. device: what it ran on, in words.
    """
    metrics, evaluations = run_folder.metrics(), run_folder.evaluations()
    student = [line for line in evaluations if line["model"] == "student"]
    lines = {"before": student[0], "after": student[-1], "teacher": next(line for line in evaluations if line["model"] == "teacher")}
    rewards = {when: line["rewards"] for when, line in lines.items()}
    mean = {when: None if found is None else found["mean"] for when, found in rewards.items()}
    tenth = max(1, len(metrics) // 10)
    kl = [line["reverse_kl"] for line in metrics if line["reverse_kl"] is not None]
    seconds, tokens = sum(line["time/step"] for line in metrics), sum(line["tokens"] for line in metrics)
    return {
        **{f"reward_{when}": value for when, value in mean.items()},
        **{f"reward_{when}_interval": None if found is None else [found["low"], found["high"]] for when, found in rewards.items()},
        "gap_closed": gap_closed(mean["before"], mean["after"], mean["teacher"]),
        "eval_kl_before": lines["before"]["kl"],
        "eval_kl_after": lines["after"]["kl"],
        "reverse_kl_first": fmean(kl[:tenth]) if kl else None,
        "reverse_kl_last": fmean(kl[-tenth:]) if kl else None,
        "steps": steps,
        "graded_tokens": int(tokens),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
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


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """The share of the student's distance to the teacher that is gone; None when the teacher was not better."""
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def peak_memory(accelerator: Accelerator) -> int:
    """Bytes: the most that any process held on its GPU, or of main memory on a CPU."""
    own = forward.peak_memory(accelerator.device)
    found: Sequence[int] = accelerator.gather(torch.tensor([own], device=accelerator.device)).tolist()
    return max(found)
