"""What a run achieved, computed from the lines that it logged: at its end for its summary, and at any moment for those who look at it."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opd.config.schema import AUTO, SweepConfig

Lines = Sequence[Mapping[str, Any]]


def achieved(metrics: Lines, evaluations: Lines, step: int | None = None) -> dict[str, Any]:
    """By the names of summary.json; null for what was not measured.

    metrics, evaluations: the lines of the two logs, as far as they go. step: what stands behind `after` is the evaluation after this step;
    None for the last one.
    """
    student = [line for line in evaluations if line.get("model") == "student"]
    told = {
        "before": next((line for line in student if line["step"] == 0), None),
        "after": next((line for line in reversed(student) if step in (None, line["step"])), None),
        "teacher": next((line for line in evaluations if line.get("model") == "teacher"), None),
    }
    means = {when: mean(line) for when, line in told.items()}
    kl = [line["reverse_kl"] for line in metrics if line.get("reverse_kl") is not None]
    tenth = max(1, len(metrics) // 10)
    seconds = sum(line.get("time/step") or 0.0 for line in metrics) if metrics else None
    tokens = int(sum(line.get("tokens") or 0 for line in metrics)) if metrics else None
    return {
        **{f"reward_{when}": value for when, value in means.items()},
        **{f"reward_{when}_interval": interval(line) for when, line in told.items()},
        "gap_closed": gap_closed(**means),
        **{f"eval_kl_{when}": (told[when] or {}).get("kl") for when in ("before", "after")},
        "reverse_kl_first": fmean(kl[:tenth]) if kl else None,
        "reverse_kl_last": fmean(kl[-tenth:]) if kl else None,
        "steps": metrics[-1]["step"] if metrics else None,
        "graded_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens is not None and seconds else None,
    }


def mean(line: Mapping[str, Any] | None) -> float | None:
    """The mean reward of an evaluation; None where nothing was judged."""
    found = (line or {}).get("rewards")
    return None if found is None else found["mean"]


def interval(line: Mapping[str, Any] | None) -> list[float] | None:
    """Its 95 % interval."""
    found = (line or {}).get("rewards")
    return None if found is None else [found["low"], found["high"]]


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """The share of the student's distance to the teacher that is gone; None when the teacher was not better."""
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def objective(config: SweepConfig, summary: Mapping[str, Any]) -> float | None:
    """What a sweep makes large or small; None where it was not measured. auto: the last reward, or −KL where nothing is judged."""
    if config.metric != AUTO:
        value = summary[config.metric]
    elif summary["reward_after"] is not None:
        value = summary["reward_after"]
    else:
        value = None if summary["eval_kl_after"] is None else -summary["eval_kl_after"]
    return None if value is None else float(value)


DETAILED_STEPS = 50  # steps of a run, about


def is_detailed_step(step: int, total: int) -> bool:
    """Whether the teacher is asked, after this step (1-based), what else it would have written: the first, the last, and some between."""
    return step in (1, total) or step % math.ceil(total / DETAILED_STEPS) == 0
