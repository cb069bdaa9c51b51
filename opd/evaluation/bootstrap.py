"""95% intervals by the bootstrap. Prompts are resampled with replacement, the same ones for all models (paired), seeded, in float64."""

import torch
from torch import Tensor

DRAWS = 10_000
MAX_INDICES = 2**22  # in memory at a time
LOW, HIGH = 0.025, 0.975


def resampled_means(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Return the means (draws, models) over resampled prompts of `values` (models, prompts)."""
    values = values.double().cpu()
    count = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    size = max(1, MAX_INDICES // count)
    parts = []
    for start in range(0, draws, size):
        index = torch.randint(count, (min(size, draws - start), count), generator=generator)
        parts.append(torch.stack([row[index].mean(1) for row in values], 1))
    return torch.cat(parts)


def quantile_interval(draws: Tensor) -> tuple[float, float]:
    """Return the 95% interval of `draws` (draws,)."""
    low, high = torch.quantile(draws, torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist()
    return low, high


def gap_closed_interval(after: Tensor, before: Tensor, teacher: Tensor) -> tuple[float, float] | None:
    """Return the 95% interval of (after - before) / (teacher - before), each (draws,).

    None where the teacher is not better than `before` in at least 97.5% of the draws: the share has no meaning there.
    """
    better = teacher > before
    if float(better.double().mean()) < HIGH:
        return None
    return quantile_interval(((after - before) / (teacher - before))[better])
