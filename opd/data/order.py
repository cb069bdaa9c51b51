"""The order of the samples, a function of the seed and a position: a checkpoint only stores the number of the step."""

from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import groupby

import torch

from opd.config.schema import Config
from opd.data.prompts import Prompt


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from anything with a stable `repr`: the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def shuffled(seed: object, size: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return tuple(torch.randperm(size, generator=generator).tolist())


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    return shuffled(seed, size, epoch)


def take(seed: int, size: int, start: int, count: int) -> list[tuple[int, int]]:
    """Return (epoch, index) at positions start to start + count of the endless sequence with every index once per epoch."""
    return [(position // size, permutation(seed, position // size, size)[position % size]) for position in range(start, start + count)]


class Order:
    """The order of the prompts of a run: which one is at a position of the endless sequence.

    With several datasets each position belongs to the one that is furthest behind its share of the positions so far; at each dataset's own
    positions its prompts come in an order of their own, every one once per epoch.

    Args:
        seed: The run's.
        datasets: The label of each prompt's dataset; prompts of a dataset are next to each other.
        weights: Share of the positions by label, relative to each other; empty for a single dataset.
    """

    def __init__(self, seed: int, datasets: Sequence[str], weights: Mapping[str, float]) -> None:
        self.seed = seed
        self.size = len(datasets)
        sizes = {label: len(list(prompts)) for label, prompts in groupby(datasets)} if weights else {}
        self.sizes = list(sizes.values())
        self.weights = [weights[label] for label in sizes]
        self.starts = [datasets.index(label) for label in sizes]
        self.permutations = [lru_cache(maxsize=2)(partial(shuffled, (seed, label), size)) for label, size in sizes.items()]
        # For each position so far: its dataset, and how many positions the dataset had before.
        self.turns, self.earlier = array("H"), array("Q")
        self.counts = [0] * len(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """Return the epoch, of its dataset, and the index of the prompt at a position."""
        if not self.weights:
            return take(self.seed, self.size, position, 1)[0]
        while len(self.turns) <= position:
            self.add_turn()
        dataset = self.turns[position]
        epoch, place = divmod(self.earlier[position], self.sizes[dataset])
        return epoch, self.starts[dataset] + self.permutations[dataset](epoch)[place]

    def turn(self, position: int) -> int:
        """Return how many earlier positions belong to the dataset of a position."""
        if not self.weights:
            return position
        self.at(position)  # which fills the turns up to it
        return self.earlier[position]

    def add_turn(self) -> None:
        total, positions = sum(self.weights), len(self.turns) + 1
        behind = [weight * positions - total * count for weight, count in zip(self.weights, self.counts, strict=True)]
        dataset = behind.index(max(behind))
        self.turns.append(dataset)
        self.earlier.append(self.counts[dataset])
        self.counts[dataset] += 1


def prompt_order(config: Config, prompts: Sequence[Prompt]) -> Order:
    """Return the order of a run's prompts."""
    weights = {label: dataset.weight for label, dataset in config.data.datasets.items()}
    return Order(config.seed, [prompt.dataset for prompt in prompts], weights)


def nth_position(number: int, left_out: Sequence[int]) -> int:
    """Return the position of the `number`-th sample (from 0) when the positions `left_out`, in ascending order, are skipped."""
    for position in left_out:
        number += position <= number
    return number
