"""Builds with a known hole, to see that the cases find it."""

import fcntl
import math
from collections.abc import Callable
from typing import NamedTuple

from opd.runs import folder
from opd.training import checkpoint
from opd.training.checkpoint import Checkpoint


def no_manifest() -> None:
    """Checkpoints are taken as they are."""
    checkpoint.verify = lambda path: None


def no_buffer() -> None:
    """The rollouts of a step are not kept between its inner steps."""
    Checkpoint.round = lambda self: None  # type: ignore[method-assign]


def no_flush() -> None:
    """Nothing waits for the disk."""
    folder.flush = lambda path: None


def no_lock() -> None:
    """Whoever comes writes."""
    fcntl.flock = lambda *_: None


def no_check_of_numbers() -> None:
    """Whatever comes out of the backward pass is applied."""
    math.isfinite = lambda value: True


class Build(NamedTuple):
    """case: the one that has to find the hole, in so many tries."""

    open_hole: Callable[[], None]
    case: str
    times: int


BUILDS = {
    "no-manifest": Build(no_manifest, "corruptions", 3),
    "no-buffer": Build(no_buffer, "stops", 1),
    "no-flush": Build(no_flush, "power-cuts", 1),
    "no-lock": Build(no_lock, "second-writer", 1),
    "no-check-of-numbers": Build(no_check_of_numbers, "not-finite", 4),
}
