"""Intervals by the bootstrap: prompts are drawn again with replacement, the same ones for all models (paired). Seeded, in float64."""

import torch
from torch import Tensor

DRAWS = 10_000
AT_A_TIME = 2**22  # indices that exist at a time
LOW, HIGH = 0.025, 0.975


def resampled_means(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Means (draws, models) over as many prompts drawn with replacement as there are. values: (models, prompts)."""
    values = values.double().cpu()
    count = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    size = max(1, AT_A_TIME // count)
    parts = []
    for start in range(0, draws, size):
        index = torch.randint(count, (min(size, draws - start), count), generator=generator)
        parts.append(torch.stack([row[index].mean(1) for row in values], 1))
    return torch.cat(parts)


def quantiles(draws: Tensor) -> tuple[float, float]:
    """The 95 % interval of what was drawn, (draws,)."""
    low, high = torch.quantile(draws, torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist()
    return low, high


def gap_closed(means: Tensor) -> tuple[float, float] | None:
    """The 95 % interval of (now − before) / (teacher − before). means: (draws, 3), now, before, teacher.

    None where the teacher is not better than before in more than one of forty draws: the share has no meaning there.
    """
    now, before, teacher = means.unbind(1)
    better = teacher > before
    if float(better.double().mean()) < HIGH:
        return None
    return quantiles(((now - before) / (teacher - before))[better])
