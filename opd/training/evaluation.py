"""What an evaluation found: rewards of answers, and KL and top-k overlap of student and teacher, over all prompts and by dataset."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from opd.config.options import EvalConfig
from opd.runs.answers import Answer
from opd.runs.intervals import Z95, interval
from opd.training.metrics import take_by_position
from opd.training.tokens import Means

KL = "kl"
# Sums over prompts for the KL's interval: of squared sums of KL, of these times the tokens, and of squared numbers of tokens.
KL_SQUARES = ("kl/sum_sum", "kl/sum_tokens", "kl/tokens_tokens")


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
        unjudged: Where answers have no reward: their `count`, `of` how many, the reference `answer` of the first, as `missed` how often
            the reward hit its limits, if it did, and `judges` as in `Judged`; None where all have one.
        kl_interval: The KL's 95 % interval over its prompts; None for one prompt.
        answers: What was answered, which evaluations.jsonl leaves out.
    """

    step: int
    rewards: Rewards | None
    kl: float | None
    example: str | None = None
    overlap: dict[str, Any] | None = None
    datasets: Mapping[str, DatasetResult] = field(default_factory=dict)
    unjudged: Mapping[str, Any] | None = None
    kl_interval: tuple[float, float] | None = None
    answers: Sequence[Answer] = ()

    def to_dict(self) -> dict[str, Any]:
        values = asdict(replace(self, answers=()))
        return {name: value for name, value in values.items() if name != "answers" and (value or name not in ("datasets", "unjudged"))}

    @property
    def has_results(self) -> bool:
        """Whether anything was measured: a run without evaluation prompts measures nothing."""
        return self.rewards is not None or self.kl is not None

    @property
    def score(self) -> float | None:
        """The value by which evaluations are ranked: the mean reward, else minus the KL."""
        if self.rewards is not None:
            return self.rewards.mean
        return None if self.kl is None else -self.kl


def count_evaluations(config: EvalConfig, steps: int) -> int:
    """Return how often a run of so many steps evaluates the student: before, every `eval.steps`, and after the last step."""
    return 1 + (math.ceil(steps / config.steps) if config.steps else 1)


Distances = Mapping[str, Means]  # the KL, as `KL`, and the overlap on the student's samples, by dataset


def added(parts: Iterable[Means]) -> Means:
    whole = Means()
    for part in parts:
        for name in part.sums:
            whole.add(name, part.sums[name], part.counts[name])
    return whole


def mean_kl(distances: Distances) -> float | None:
    return added(distances.values()).means().get(KL)


def add_kl_squares(means: Means, sums: Sequence[float], tokens: Sequence[int]) -> None:
    """Add `KL_SQUARES` of completions of different prompts, from the sum of the KL over each one's tokens."""
    for total, count in zip(sums, tokens, strict=True):
        for name, product in zip(KL_SQUARES, (total * total, total * count, count * count), strict=True):
            means.add(name, product, 1.0)


def kl_interval(distances: Distances) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean KL of a token over prompts: of a ratio of sums, linearised.

    None for fewer than two prompts, or where it is not finite.
    """
    whole = added(distances.values())
    count = whole.counts.get(KL_SQUARES[0], 0.0)
    if count < 2 or not math.isfinite(whole.sums[KL]):
        return None
    mean, tokens = whole.sums[KL] / whole.counts[KL], whole.counts[KL]
    sum_sum, sum_tokens, tokens_tokens = (whole.sums[name] for name in KL_SQUARES)
    squares = max(sum_sum - 2 * mean * sum_tokens + mean**2 * tokens_tokens, 0.0)  # of each prompt's deviation; rounding
    spread = Z95 * math.sqrt(squares * count / (count - 1)) / tokens
    return max(mean - spread, 0.0), mean + spread


def mean_overlap(distances: Distances, max_new_tokens: int) -> dict[str, Any] | None:
    """Return the overlap as in `Evaluation`; None where it was not measured."""
    means = added(distances.values())
    if not means.counts.get(KL):
        return None
    by_position = take_by_position(means, max_new_tokens)
    return {name: value for name, value in means.means().items() if name not in (KL, *KL_SQUARES)} | {"by_position": by_position}


@dataclass(frozen=True, slots=True)
class Judged:
    """Judged answers of a model.

    Attributes:
        missed: How often the reward hit its limits.
        judges: The names of the functions that were passed to judge them; empty where `eval.reward` judged some.
    """

    rows: list[Answer]
    missed: int = 0
    judges: Sequence[str] = ()

    def unjudged(self) -> dict[str, Any] | None:
        """Return what `Evaluation.unjudged` has."""
        missing = [row for row in self.rows if row.reward is None]
        if not missing:
            return None
        found = {"count": len(missing), "of": len(self.rows), "answer": next(iter(missing[0].references), None)}
        return found | ({"missed": self.missed} if self.missed else {}) | ({"judges": [*self.judges]} if self.judges else {})

    def rewards(self, dataset: str | None = None) -> Rewards | None:
        """Return the statistics of one dataset or, for None, of all; None without answers."""
        asked = sorted((row for row in self.rows if dataset in (None, row.dataset)), key=lambda row: row.sample_id)
        rows = [row for row in self.rows if dataset in (None, row.dataset) and row.reward is not None]
        if not rows:
            return None
        values = [row.reward for row in rows if row.reward is not None]
        low, high = interval(values)
        # Whole numbers as integers, which are short in JSON: most rewards are 0 or 1.
        each = tuple(int(row.reward) if row.reward is not None and row.reward == int(row.reward) else row.reward for row in asked)
        lengths, truncated = fmean(row.length for row in rows), fmean(row.truncated for row in rows)
        return Rewards(fmean(values), low, high, len(rows), lengths, truncated, each)

    def evaluation(self, step: int, distances: Distances, max_new_tokens: int) -> Evaluation:
        """Return the evaluation of these answers and of the distances on samples of at most `max_new_tokens`."""
        datasets = {}
        for label in sorted({*(row.dataset for row in self.rows), *distances} - {""}):
            own = {label: distances[label]} if label in distances else {}
            datasets[label] = DatasetResult(self.rewards(label), mean_kl(own), mean_overlap(own, max_new_tokens))
        example = f"{self.rows[0].prompt} → {self.rows[0].completion}" if self.rows else None
        overlap, low_high = mean_overlap(distances, max_new_tokens), kl_interval(distances)
        return Evaluation(
            step, self.rewards(), mean_kl(distances), example, overlap, datasets, self.unjudged(), low_high, answers=self.rows
        )
