"""How much of a gain is the teacher's: runs against their control arms (`control`), paired by evaluation prompt and seed. No torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, variance
from typing import Any

from opd.runs.reader import Run, flatten
from opd.runs.text import format_percent

NONE = "none"
MIN_SEEDS = 3  # whose variation is counted: from two it would be known to a factor of thirty
# Runs are compared where all options are the same but these: they do not affect training, or tell arms and seeds apart.
OTHER_OPTIONS = ("control", "seed", "name", "resume", "resume_force", "sweep.", "track.", "checkpoint.", "launch.")
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of Student's t by degrees of freedom, from 1


@dataclass(frozen=True, slots=True)
class Effect:
    """What the teacher accounts for, in shares of reward.

    Attributes:
        control: the arm without the teacher.
        seeds: those of which there are both runs.
        step: of the last evaluation that all of these runs have.
        prompts: evaluation prompts.
        before: mean reward before training.
        after: mean reward with the teacher.
        without: mean reward of the arm.
        low, high: 95% interval of `after - without`.
        runs: folders of the compared runs.
    """

    control: str
    seeds: list[int]
    step: int
    prompts: int
    before: float
    after: float
    without: float
    low: float
    high: float
    runs: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.after - self.before, "of_the_teacher": self.after - self.without}

    def sentence(self) -> str:
        """Return "the teacher accounts for x of y points [low, high]", with what was compared; points are hundredths of reward."""
        part, gain, low, high = (
            f"{100 * value:.1f}" for value in (self.after - self.without, self.after - self.before, self.low, self.high)
        )
        count = len(self.seeds)
        seeds = f" and {count} seeds" if count >= MIN_SEEDS else f"; from {MIN_SEEDS} seeds on their variation counts too"
        return (
            f"the teacher accounts for {part} of {gain} points [{low}, {high}]: reward {format_percent(self.before)} before, "
            f"{format_percent(self.after)} after {self.step:,} steps, {format_percent(self.without)} with control={self.control}"
            f"{', which made it worse' * (self.without < self.before)} "
            f"(95% interval, paired over {self.prompts:,} prompts{seeds})"
        )


def effects(runs: Sequence[Run]) -> list[Effect]:
    """Return the effect against each control arm, for each set of options of which `runs` have both."""
    groups: dict[str, dict[str, dict[int, Run]]] = {}
    for run in runs:
        if run.config:
            arms = groups.setdefault(_compared(run), {})
            arms.setdefault(run.config.get("control", NONE), {}).setdefault(run.config.get("seed", 0), run)
    found = []
    for arms in groups.values():
        taught = arms.get(NONE, {})
        for control in sorted(set(arms) - {NONE}):
            seeds = sorted(set(taught) & set(arms[control]))
            found.append(_effect(control, seeds, [(taught[seed], arms[control][seed]) for seed in seeds]) if seeds else None)
    return [effect for effect in found if effect is not None]


def _compared(run: Run) -> str:
    """Return what has to be the same in runs that are compared."""
    options = {name: value for name, value in flatten(run.config).items() if not name.startswith(OTHER_OPTIONS)}
    return json.dumps([options, run.content.get("evaluation data")], sort_keys=True, default=str)


def _effect(control: str, seeds: list[int], pairs: Sequence[tuple[Run, Run]]) -> Effect | None:
    """Return the effect at the last evaluation of all runs; None where there is none yet, or it stores no reward of each prompt."""
    rewards = [tuple(map(_rewards, pair)) for pair in pairs]
    steps = set.intersection(*(set(one) for pair in rewards for one in pair))
    prompts = {len(one[step]) for pair in rewards for one in pair for step in steps}
    if 0 not in steps or len(steps) == 1 or len(prompts) != 1:
        return None
    step = max(steps)
    # The prompts that all of these runs judged, at the start and then.
    lists = [one[at] for pair in rewards for one in pair for at in (0, step)]
    common = [place for place in range(prompts.pop()) if all(each[place] is not None for each in lists)]
    if not common:
        return None
    rewards = [tuple({at: [one[at][place] for place in common] for at in (0, step)} for one in pair) for pair in rewards]
    differences = [[ours - other for ours, other in zip(taught[step], arm[step], strict=True)] for taught, arm in rewards]
    low, high = paired_interval(differences)
    if all(0 <= reward <= 1 for pair in rewards for one in pair for reward in one[step]):
        low, high = max(low, -1.0), min(high, 1.0)
    before, after, without = (
        fmean(fmean(one) for one in each)
        for each in ([taught[0] for taught, _ in rewards], [taught[step] for taught, _ in rewards], [arm[step] for _, arm in rewards])
    )
    return Effect(control, seeds, step, len(common), before, after, without, low, high, [str(run.path) for pair in pairs for run in pair])


def _rewards(run: Run) -> dict[int, list[Any]]:
    """Return the student's reward on each prompt, None where it judged none, by step."""
    student = [line for line in run.evaluations if line.get("model") == "student"]
    return {line["step"]: line["rewards"]["each"] for line in student if (line.get("rewards") or {}).get("each")}


def paired_interval(difference_SP: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95% interval of the mean difference between pairs of runs: for new prompts and, from `MIN_SEEDS` on, for new seeds too.

    The variance of the mean over `P` prompts plus that over `S` seeds, which counts the rest twice and so is rather too wide; with degrees
    of freedom by Satterthwaite. To the squared differences of prompts 1 is added (as Agresti and Min 2005 do), so that an interval from
    few prompts on which runs agree is not empty.
    """
    prompts = [fmean(column) for column in zip(*difference_SP, strict=True)]
    mean, count = fmean(prompts), len(prompts)
    squares = sum((value - mean) ** 2 for value in prompts) + 1
    parts = [(squares / max(count - 1, 1) / count, max(count - 1, 1))]
    if len(difference_SP) >= MIN_SEEDS:
        seeds = [fmean(row) for row in difference_SP]
        parts.append((variance(seeds) / len(seeds), len(seeds) - 1))
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts)
    spread = t95(freedom) * math.sqrt(total)
    return mean - spread, mean + spread


def t95(freedom: float) -> float:
    """Return the two-sided 95% quantile of Student's t, that of the next smaller whole number of degrees of freedom up to 10."""
    return T95[int(freedom) - 1] if freedom < len(T95) + 1 else 1.96 + 2.8 / freedom
