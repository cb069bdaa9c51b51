"""Known holes in a build, each with the case that has to find it: they show that the cases can fail."""

import fcntl
import math
from collections.abc import Callable
from typing import NamedTuple

from opd.runs import folder
from opd.teachers import ServedTeacher
from opd.training import checkpoint
from opd.training.checkpoint import Checkpoint


def skip_manifest() -> None:
    """Use checkpoints without verifying them."""
    checkpoint.verify = lambda path: None


def lose_rollouts() -> None:
    """Forget the rollouts of a step that was stopped between its inner steps."""
    Checkpoint.tensors = lambda self, name: None  # type: ignore[method-assign]


def skip_flush() -> None:
    """Do not wait for the disk."""
    folder.flush = lambda path: None


def skip_lock() -> None:
    """Let two runs write to the same folder."""
    fcntl.flock = lambda *_: None


def accept_non_finite() -> None:
    """Apply gradients whatever numbers they are."""
    math.isfinite = lambda value: True


def trust_teachers() -> None:
    """Take a served teacher for the right one after the start of the run."""
    check = ServedTeacher.check
    ServedTeacher.check = lambda self: None if self.reference else check(self)  # type: ignore[method-assign]


class Hole(NamedTuple):
    """A hole, the case that has to find it, and the tries that suffice."""

    open: Callable[[], None]
    case: str
    times: int


HOLES = {
    "no-manifest": Hole(skip_manifest, "corruptions", 3),
    "no-buffer": Hole(lose_rollouts, "stops", 1),
    "no-flush": Hole(skip_flush, "power-cuts", 100),
    "no-lock": Hole(skip_lock, "second-writer", 1),
    "no-check-of-teachers": Hole(trust_teachers, "wrong-teachers", 1),
    "no-check-of-numbers": Hole(accept_non_finite, "not-finite", 4),
}
