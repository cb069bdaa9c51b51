"""The order of the samples, a function of the seed and a position: a checkpoint only stores the number of the step."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import torch


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from anything with a stable `repr`: the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return tuple(torch.randperm(size, generator=generator).tolist())


def take(seed: int, size: int, start: int, count: int) -> list[tuple[int, int]]:
    """Return (epoch, index) at positions start to start + count of the endless sequence with every index once per epoch."""
    return [(position // size, permutation(seed, position // size, size)[position % size]) for position in range(start, start + count)]


def nth_position(number: int, left_out: Sequence[int]) -> int:
    """Return the position of the `number`-th sample (from 0) when the positions `left_out`, in ascending order, are skipped."""
    for position in left_out:
        number += position <= number
    return number
