"""Summary statistics of a run, finished or not, computed from its logs."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opd.config.options import AUTO, METRICS, Direction, SweepConfig
from opd.runs.intervals import are_shares, paired_interval
from opd.runs.reader import Run
from opd.runs.text import format_amount, format_number, one_line, visible

Lines = Sequence[Mapping[str, Any]]

MAXIMIZE = Direction.maximize.value
# What runs are ranked by, each with its better direction.
RANKS: dict[str, str] = {name: better.value for name, better in METRICS.items() if better is not None} | {"reward_best": MAXIMIZE}
DETAILED_STEPS = 50  # per run, about
SHOWN = 60  # characters of an answer in a warning
WORSE = "worse than before training"
KL_RISE = 1.1  # a KL that rose by less may have been measured on luckier samples


def is_detailed_step(step: int, total: int) -> bool:
    """Return whether to ask the teacher for its alternatives after this step (1-based): the first, the last, and some in between."""
    return step in (1, total) or step % math.ceil(total / DETAILED_STEPS) == 0


def compared_evaluations(evaluations: Lines, step: int | None = None) -> dict[str, Mapping[str, Any] | None]:
    """Return the evaluations that make a run's result: the student's `before` and `after`, and the `teacher`'s.

    Args:
        evaluations: the lines of evaluations.jsonl.
        step: take the evaluation after this step as `after`; None takes the last one after a step of training.
    """
    student = [line for line in evaluations if line.get("model") == "student"]
    return {
        "before": next((line for line in student if line["step"] == 0), None),
        "after": next((line for line in reversed(student) if line["step"] == step or (step is None and line["step"] > 0)), None),
        "teacher": next((line for line in reversed(evaluations) if line.get("model") == "teacher"), None),
    }


def best_evaluation(evaluations: Lines) -> Mapping[str, Any] | None:
    """Return the student's best evaluation, also that before training, the first of equal ones: by reward, or by KL without rewards."""
    student = [line for line in evaluations if line.get("model") == "student"]
    judged = [line for line in student if line.get("rewards")]
    if judged:
        return max(judged, key=lambda line: float(line["rewards"]["mean"]))
    return min((line for line in student if line.get("kl") is not None), key=lambda line: float(line["kl"]), default=None)


def rewards_are_shares(evaluations: Lines) -> bool:
    """Return whether all rewards that a run measured are within 0 and 1."""
    measured = [line["rewards"] for line in evaluations if line.get("rewards")]
    return are_shares(reward for rewards in measured for reward in (rewards["mean"], *rewards.get("each", ())))


def find_warnings(evaluations: Lines, options: Mapping[str, Any], changes: Sequence[str] = ()) -> list[str]:
    """Return what to know of a run's result: options changed on the way, the student got worse or its KL rose, answers have no reward.

    Args:
        evaluations: the lines of evaluations.jsonl.
        options: the composed options of the run, nested.
        changes: options that `resume_force` changed.
    """
    other = [change for change in changes if not change.startswith(("train.max_steps ", "train.epochs "))]
    found = [f"options changed on the way (resume_force): {'; '.join(other)}"] if other else []
    compared = compared_evaluations(evaluations)
    before, after, best = compared["before"], compared["after"], best_evaluation(evaluations)
    if before is not None and after is not None and best is not None and (change := _worse(before, after)):
        where = "" if best["step"] == 0 else " (opd export RUN --best)"
        found.append(f"{change}: {WORSE}; the best was step {best['step']}{where}: lower optim.lr")
    elif before is not None and after is not None and (rise := _kl_rise(before, after)) and _reward_rose(before, after):
        meaning = "the student's own answers are less like the teacher's than at the start, as is common in a short run"
        found.append(f"{rise} although the reward rose: {meaning}; if the curve in report.html still rises, lower optim.lr")
    unjudged = next((line["unjudged"] for line in evaluations if line.get("model") == "student" and line.get("unjudged")), None)
    if unjudged is not None:
        found.append(describe_unjudged(unjudged, (options.get("eval") or {}).get("reward")))
    return found


def describe_unjudged(unjudged: Mapping[str, Any], reward: str | None) -> str:
    """Return the sentence about answers without a reward. unjudged: as in a line of evaluations.jsonl."""
    which = "none" if unjudged["count"] == unjudged["of"] else f"{unjudged['of'] - unjudged['count']}"
    judges = " and ".join(unjudged.get("judges", ()))
    judged = f"{judges or f'eval.reward={reward}'} judged {which} of {unjudged['of']} answers"
    if unjudged.get("missed"):
        return f"{judged}: it took too long or too much memory; raise eval.reward_seconds or eval.reward_memory"
    answer = unjudged.get("answer")
    reason = "has no single number" if reward == "number" else "was not judged"
    why = "" if answer is None else f": '{visible(one_line(answer), SHOWN)}' {reason}"
    remedy = "return a number instead of None, or set reward_funcs=None" if judges else "see data.answer and eval.reward, or set eval=kl"
    return f"{judged}{why}; {remedy}"


def _worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return how much worse the student is than before, beyond the interval; empty where it is not."""
    first, last = before.get("rewards"), after.get("rewards")
    if first and last:
        both = zip(last.get("each", ()), first.get("each", ()), strict=False)
        differences = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
        high = paired_interval([differences])[1] if differences else last["high"] - first["low"]
        shares = rewards_are_shares([before, after])
        return f"reward {format_amount(first['mean'], shares)} → {format_amount(last['mean'], shares)}" if high < 0 else ""
    return _kl_rise(before, after)


def _kl_rise(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return how far the student moved away from the teacher; empty where it did not."""
    first, last = before.get("kl"), after.get("kl")
    if first is None or last is None or last <= KL_RISE * first:
        return ""
    return f"KL to the teacher {format_number(first)} → {format_number(last)}"


def _reward_rose(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    first, last = before.get("rewards"), after.get("rewards")
    return bool(first and last and last["mean"] > first["mean"])


def achieved(metrics: Lines, evaluations: Lines, step: int | None = None) -> dict[str, Any]:
    """Return what a run achieved so far, by the keys of summary.json; None for what was not measured.

    Args:
        metrics: the lines of metrics.jsonl.
        evaluations: the lines of evaluations.jsonl.
        step: take the evaluation after this step as `after`; None takes the last one.
    """
    kl = [line["reverse_kl"] for line in metrics if line.get("reverse_kl") is not None]
    tenth = max(1, len(metrics) // 10)
    seconds = sum(line.get("time/step") or 0.0 for line in metrics) if metrics else None
    tokens = int(sum(line.get("tokens") or 0 for line in metrics)) if metrics else None
    return {
        **evaluated(evaluations, step),
        "reverse_kl_first": fmean(kl[:tenth]) if kl else None,
        "reverse_kl_last": fmean(kl[-tenth:]) if kl else None,
        "steps": metrics[-1]["step"] if metrics else None,
        "graded_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens is not None and seconds else None,
    }


def summarised(metrics: Lines, evaluations: Lines, step: int | None = None) -> dict[str, Any]:
    """Return what `achieved` returns and, with `data.mix`, `datasets`: what `by_dataset` returns."""
    datasets = by_dataset(metrics, evaluations, step)
    return achieved(metrics, evaluations, step) | ({"datasets": datasets} if datasets else {})


def by_dataset(metrics: Lines, evaluations: Lines, step: int | None = None) -> dict[str, dict[str, Any]]:
    """Return what a run with `data.mix` achieved so far on each dataset, by label: what `evaluated` returns, and `graded_tokens`."""
    labels = sorted({label for line in evaluations for label in line.get("datasets") or {}})
    unknown = {"rewards": None, "kl": None}
    achieved_on = {}
    for label in labels:
        own = [{**line, "kl_interval": None, **((line.get("datasets") or {}).get(label) or unknown)} for line in evaluations]
        tokens = int(sum(line.get(f"data/{label}/tokens") or 0 for line in metrics))
        achieved_on[label] = {**evaluated(own, step), "graded_tokens": tokens}
    return achieved_on


def evaluated(evaluations: Lines, step: int | None = None) -> dict[str, Any]:
    """Return the part of `achieved` that evaluations measured."""
    compared = compared_evaluations(evaluations, step)
    rewards = {when: (line or {}).get("rewards") or {} for when, line in compared.items()}
    means = {when: found.get("mean") for when, found in rewards.items()}
    best = best_evaluation(evaluations)
    return {
        "reward_is_share": rewards_are_shares(evaluations) if any(rewards.values()) else None,
        "best_step": None if best is None else best["step"],
        **{f"reward_{when}": mean for when, mean in means.items()},
        **{f"reward_{when}_interval": [found["low"], found["high"]] if found else None for when, found in rewards.items()},
        "gap_closed": gap_closed(**means),
        **{f"eval_kl_{when}": (compared[when] or {}).get("kl") for when in ("before", "after")},
        **{f"eval_kl_{when}_interval": (compared[when] or {}).get("kl_interval") for when in ("before", "after")},
    }


def run_outcome(run: Run) -> dict[str, Any]:
    """Return what a run achieved so far, from its logs and, once it is done, from its summary; None for what is unknown.

    Returns:
        The numbers of summary.json (`METRICS`), the intervals of its rewards, and `reward_best` with its interval and step.
    """
    intervals = [f"reward_{when}_interval" for when in ("before", "after", "teacher", "best")]
    values: dict[str, Any] = dict.fromkeys((*METRICS, "reward_best", *intervals, "reward_best_step"))
    values |= achieved(run.metrics, run.evaluations) | {"seed": run.config.get("seed")}
    best = best_evaluation(run.evaluations)
    if best is not None and best.get("rewards"):
        mean, low, high = (best["rewards"][name] for name in ("mean", "low", "high"))
        values |= {"reward_best": mean, "reward_best_interval": [low, high], "reward_best_step": best["step"]}
    return values | {name: value for name, value in (run.summary or {}).items() if name in values and value is not None}


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Return the share of the student's distance to the teacher that is gone; None where the teacher was not better."""
    if before is None or after is None or teacher is None or teacher <= before:
        return None
    return (after - before) / (teacher - before)


def objective(config: SweepConfig, summary: Mapping[str, Any]) -> float | None:
    """Return the number that a sweep optimizes; None where it was not measured.

    `sweep.metric=auto` is the last reward, or the negative KL where there are no rewards.
    """
    if config.metric != AUTO:
        value = summary[config.metric]
    elif summary["reward_after"] is not None:
        value = summary["reward_after"]
    else:
        value = None if summary["eval_kl_after"] is None else -summary["eval_kl_after"]
    return None if value is None else float(value)
