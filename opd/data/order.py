"""Which sample comes when: a function of the seed and of how many were taken, so that nothing needs to be saved but a number."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import torch


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return tuple(torch.randperm(size, generator=generator).tolist())


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text: the same in every process and on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def take(seed: int, size: int, start: int, count: int) -> list[tuple[int, int]]:
    """(epoch, index) of the samples at positions start … start + count of the endless sequence that holds each index once an epoch."""
    return [(position // size, permutation(seed, position // size, size)[position % size]) for position in range(start, start + count)]


def place(number: int, left_out: Sequence[int]) -> int:
    """The position in that endless sequence of its `number`-th sample (from 0) once the positions `left_out`, ascending, are taken out."""
    for position in left_out:
        number += position <= number
    return number
