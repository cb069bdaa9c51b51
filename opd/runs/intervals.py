"""Intervals of mean rewards, and of differences between rewards of the same prompts."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, variance

Z95 = 1.959964  # the two-sided 95% quantile of the normal distribution
MIN_SEEDS = 3  # whose variation is counted: from two it would be known to a factor of thirty
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of Student's t by degrees of freedom, from 1


def are_shares(rewards: Iterable[float | None]) -> bool:
    """Return whether all rewards are within 0 and 1, and so are shown in percent. None stands for an answer that was not judged."""
    return all(reward is None or 0 <= reward <= 1 for reward in rewards)


def interval(rewards: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the mean: Wilson's for rewards of 0 and 1, which is sound at 0 % and 100 %, else the normal one."""
    count, mean = len(rewards), fmean(rewards)
    if all(reward in (0.0, 1.0) for reward in rewards):
        centre = mean + Z95**2 / (2 * count)
        spread = Z95 * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
        low, high = (centre - spread) / (1 + Z95**2 / count), (centre + spread) / (1 + Z95**2 / count)
        return max(low, 0.0), min(high, 1.0)  # rounding
    spread = Z95 * math.sqrt((variance(rewards) if count > 1 else 0.0) / count)
    return mean - spread, mean + spread


def paired_interval(difference_SP: Sequence[Sequence[float]], of_shares: bool = False) -> tuple[float, float]:
    """Return the 95% interval of the mean difference between pairs of runs: for new prompts and, from `MIN_SEEDS` on, for new seeds too.

    The variance of the mean over `P` prompts plus that over `S` seeds, which counts the rest twice and so is rather too wide; with degrees
    of freedom by Satterthwaite. To the squared differences of prompts 1 is added (as Agresti and Min 2005 do), so that an interval from
    few prompts on which runs agree is not empty.

    Args:
        difference_SP: by seed and prompt.
        of_shares: whether all rewards are shares, whose differences are within -1 and 1.
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
    low, high = mean - spread, mean + spread
    return (max(low, -1.0), min(high, 1.0)) if of_shares else (low, high)


def t95(freedom: float) -> float:
    """Return the two-sided 95% quantile of Student's t.

    Below 11 degrees of freedom that of the next smaller whole number of them; from there on 1.96 + 2.8 / freedom, which is at most 1 % off.
    """
    return T95[int(freedom) - 1] if freedom < len(T95) + 1 else 1.96 + 2.8 / freedom
