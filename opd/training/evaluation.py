"""What an evaluation found: rewards of answers, and KL and top-k overlap of student and teacher, over all prompts and by dataset."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from opd.config.options import EvalConfig
from opd.training.metrics import take_by_position
from opd.training.tokens import Means

Z95 = 1.959964
KL = "kl"


@dataclass(frozen=True, slots=True)
class Rewards:
    """Mean reward with its 95 % interval over `count` judged answers, mean completion tokens, and the share that was truncated.

    `each`: the reward of each prompt, in their order, so that runs can be compared prompt by prompt; None where it judged none.
    """

    mean: float
    low: float
    high: float
    count: int
    length: float
    truncated: float
    each: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """What an `Evaluation` measured on the prompts of one dataset."""

    rewards: Rewards | None
    kl: float | None
    overlap: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The student after `step` steps, or the teacher.

    Args:
        rewards: None without answers.
        kl: Exact KL(student‖teacher) at T = 1, nats per token.
        example: A prompt with its answer.
        overlap: Top-k overlap on the samples of the KL: means `share` and `mass`, and `by_position` as in metrics.jsonl.
        datasets: The same of each dataset of `data.mix`; empty without.
    """

    step: int
    rewards: Rewards | None
    kl: float | None
    example: str | None = None
    overlap: dict[str, Any] | None = None
    datasets: Mapping[str, DatasetResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.datasets else {name: value for name, value in values.items() if name != "datasets"}

    @property
    def score(self) -> float | None:
        """The value by which evaluations are ranked: the mean reward, else minus the KL."""
        if self.rewards is not None:
            return self.rewards.mean
        return None if self.kl is None else -self.kl


def count_evaluations(config: EvalConfig, steps: int) -> int:
    """Return how often a run of so many steps evaluates the student: before, every `eval.steps`, and after the last step."""
    return 1 + (math.ceil(steps / config.steps) if config.steps else 1)


def interval(rewards: Sequence[float], shares: bool = True) -> tuple[float, float]:
    """Return the 95 % interval of the mean: Wilson's for rewards of 0 and 1, which is sound at 0 % and 100 %, else the normal one.

    Args:
        shares: False for differences of rewards, which may be 0 and 1 by chance.
    """
    count, mean = len(rewards), fmean(rewards)
    if shares and all(reward in (0.0, 1.0) for reward in rewards):
        centre = mean + Z95**2 / (2 * count)
        spread = Z95 * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
        low, high = (centre - spread) / (1 + Z95**2 / count), (centre + spread) / (1 + Z95**2 / count)
        return max(low, 0.0), min(high, 1.0)  # rounding
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(count - 1, 1)
    spread = Z95 * math.sqrt(variance / count)
    return mean - spread, mean + spread


Distances = Mapping[str, Means]  # the KL, as `KL`, and the overlap on the student's samples, by dataset


def added(parts: Iterable[Means]) -> Means:
    whole = Means()
    for part in parts:
        for name in part.sums:
            whole.add(name, part.sums[name], part.counts[name])
    return whole


def mean_kl(distances: Distances) -> float | None:
    return added(distances.values()).means().get(KL)


def mean_overlap(distances: Distances, max_new_tokens: int) -> dict[str, Any] | None:
    """Return the overlap as in `Evaluation`; None where it was not measured."""
    means = added(distances.values())
    if not means.counts.get(KL):
        return None
    by_position = take_by_position(means, max_new_tokens)
    return {name: value for name, value in means.means().items() if name != KL} | {"by_position": by_position}


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers: dataset, reward (None for one that was not judged), tokens, whether it was truncated, prompt with answer, and sample id."""

    rows: list[tuple[str, float | None, int, bool, str, int]]

    def rewards(self, dataset: str | None = None) -> Rewards | None:
        """Return the statistics of one dataset or, for None, of all; None without answers."""
        asked = sorted((row for row in self.rows if dataset in (None, row[0])), key=lambda row: row[5])
        rows = [row for row in self.rows if dataset in (None, row[0]) and row[1] is not None]
        if not rows:
            return None
        values = [row[1] for row in rows if row[1] is not None]
        low, high = interval(values)
        # Whole numbers as integers, which are short in JSON: most rewards are 0 or 1.
        each = tuple(int(row[1]) if row[1] is not None and row[1] == int(row[1]) else row[1] for row in asked)
        lengths, truncated = fmean(row[2] for row in rows), fmean(row[3] for row in rows)
        return Rewards(fmean(values), low, high, len(rows), lengths, truncated, each)

    def evaluation(self, step: int, distances: Distances, max_new_tokens: int) -> Evaluation:
        """Return the evaluation of these answers and of the distances on samples of at most `max_new_tokens`."""
        datasets = {}
        for label in sorted({*(row[0] for row in self.rows), *distances} - {""}):
            own = {label: distances[label]} if label in distances else {}
            datasets[label] = DatasetResult(self.rewards(label), mean_kl(own), mean_overlap(own, max_new_tokens))
        example = self.rows[0][4] if self.rows else None
        return Evaluation(step, self.rewards(), mean_kl(distances), example, mean_overlap(distances, max_new_tokens), datasets)
