"""How much of a gain is the teacher's: runs against their control arms (`control`), paired by evaluation prompt and seed. No torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from opd.runs.intervals import MIN_SEEDS, are_shares, paired_interval
from opd.runs.reader import Run, flatten
from opd.runs.text import format_amount

NONE = "none"
# Runs are compared where all options are the same but these: they do not affect training, or tell arms and seeds apart.
OTHER_OPTIONS = ("control", "seed", "name", "resume", "resume_force", "sweep.", "track.", "checkpoint.", "launch.")


@dataclass(frozen=True, slots=True)
class Effect:
    """What the teacher accounts for, in reward.

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
        reward_is_share: whether all compared rewards are within 0 and 1.
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
    reward_is_share: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gain": self.after - self.before, "of_the_teacher": self.after - self.without}

    def sentence(self) -> str:
        """Return "the teacher accounts for x of y points [low, high]", with what was compared.

        Points are hundredths of reward. Rewards that are not all within 0 and 1 have none and are shown as they are.
        """
        shares = self.reward_is_share
        differences = (self.after - self.without, self.after - self.before, self.low, self.high)
        part, gain, low, high = (f"{100 * value:.1f}" if shares else f"{value:.4g}" for value in differences)
        before, after, without = (format_amount(value, shares) for value in (self.before, self.after, self.without))
        count = len(self.seeds)
        seeds = f" and {count} seeds" if count >= MIN_SEEDS else f"; from {MIN_SEEDS} seeds on their variation counts too"
        return (
            f"the teacher accounts for {part} of {gain}{' points' * shares} [{low}, {high}]: reward {before} before, "
            f"{after} after {self.step:,} steps, {without} with control={self.control}"
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
    shares = are_shares(reward for pair in rewards for one in pair for each in one.values() for reward in each)
    low, high = paired_interval(differences, shares)
    before, after, without = (
        fmean(fmean(one) for one in each)
        for each in ([taught[0] for taught, _ in rewards], [taught[step] for taught, _ in rewards], [arm[step] for _, arm in rewards])
    )
    folders = [str(run.path) for pair in pairs for run in pair]
    return Effect(control, seeds, step, len(common), before, after, without, low, high, folders, shares)


def _rewards(run: Run) -> dict[int, list[Any]]:
    """Return the student's reward on each prompt, None where it judged none, by step."""
    student = [line for line in run.evaluations if line.get("model") == "student"]
    return {line["step"]: line["rewards"]["each"] for line in student if (line.get("rewards") or {}).get("each")}
