"""Builds with a known hole, to see that the cases find it."""

import fcntl
import math

from opd import checkpoint
from opd.checkpoint import Checkpoint


def no_manifest() -> None:
    """Checkpoints are taken as they are."""
    checkpoint.verify = lambda path: None


def no_buffer() -> None:
    """The rollouts of a step are not kept between its inner steps."""
    Checkpoint.round = lambda self: None  # type: ignore[method-assign]


def no_flush() -> None:
    """Nothing waits for the disk."""
    checkpoint.flush = lambda path: None


def no_lock() -> None:
    """Whoever comes writes."""
    fcntl.flock = lambda *_: None


def no_check_of_numbers() -> None:
    """Whatever comes out of the backward pass is applied."""
    math.isfinite = lambda value: True


BUILDS = {
    "no-manifest": no_manifest,
    "no-buffer": no_buffer,
    "no-flush": no_flush,
    "no-lock": no_lock,
    "no-check-of-numbers": no_check_of_numbers,
}
