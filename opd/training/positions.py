"""Where in a completion things happen: KL and entropy by token position, and how long completions are, in at most 16 pieces of equal width.

Shapes: `N` tokens that are learnt from, of all rollouts of a step.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd.data.rollouts import Rollout
from opd.objective.means import Means

PIECES = 16
VALUES = ("reverse_kl", "entropy")
PREFIX = "by_position/"

ByPosition = dict[str, int | list[float | None]]


def width(max_new_tokens: int) -> int:
    """Tokens a piece."""
    return math.ceil(max_new_tokens / PIECES)


def pieces(max_new_tokens: int) -> int:
    return math.ceil(max_new_tokens / width(max_new_tokens))


def add_by_position(
    means: Means, seen: Mapping[str, Tensor], learnt: Sequence[Rollout], written: Sequence[Rollout], max_new_tokens: int
) -> None:
    """Adds sums and counts of the step, for each piece under a name of its own. seen: values (N,), in the order of `learnt`."""
    size, count = width(max_new_tokens), pieces(max_new_tokens)
    places = [torch.arange(len(rollout.completion)) for rollout in learnt]
    piece_N = torch.cat(places) // size if places else torch.zeros(0, dtype=torch.long)
    tokens = torch.bincount(piece_N, minlength=count).tolist()
    for name in VALUES:
        sums = torch.bincount(piece_N, seen[name].double().cpu(), minlength=count).tolist()
        for piece in range(count):
            means.add(f"{PREFIX}{name}/{piece:02}", sums[piece], tokens[piece])
    lengths = torch.tensor([len(rollout.completion) for rollout in written], dtype=torch.long)
    ends = torch.bincount((lengths.clamp_min(1) - 1) // size, minlength=count).tolist()
    for piece in range(count):
        means.add(f"{PREFIX}ends/{piece:02}", ends[piece], 1.0)


def by_position(means: Means, max_new_tokens: int) -> ByPosition:
    """Takes what `add_by_position` added, over all processes, out of `means`.

    Returns `width`, the tokens a piece; and for each piece the mean of each of `VALUES` in nats (None where no token is, or no number), its
    `tokens`, and as `ends` how many completions have their last token there.
    """
    names = [name for name in means.sums if name.startswith(PREFIX)]
    sums, counts = ({name: kind.pop(name) for name in names} for kind in (means.sums, means.counts))
    every = range(pieces(max_new_tokens))

    def values(name: str) -> list[float | None]:
        keys = [f"{PREFIX}{name}/{piece:02}" for piece in every]
        return [sums[key] / counts[key] if counts[key] and math.isfinite(sums[key]) else None for key in keys]

    return {
        "width": width(max_new_tokens),
        **{name: values(name) for name in VALUES},
        "tokens": [counts[f"{PREFIX}{VALUES[0]}/{piece:02}"] for piece in every],
        "ends": [sums[f"{PREFIX}ends/{piece:02}"] for piece in every],
    }
