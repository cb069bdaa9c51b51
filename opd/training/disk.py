"""How much room a run takes on the disk: its checkpoints and the model at its end."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from opd.config.options import Best
from opd.models.memory import FLOAT32, optimizer_bytes, weight_bytes
from opd.runs.folder import CHECKPOINTS, FINAL
from opd.runs.text import format_bytes
from opd.training.checkpoint import SPARE_BYTES
from opd.training.loop import Trainer
from opd.training.tensors import model_tensors, trained_tensors

log = logging.getLogger(__name__)

REMEDY = "lower checkpoint.keep_last (0: none is kept once the run is done), set lora=default, or make room"


@dataclass(frozen=True, slots=True)
class Disk:
    """What the files of a run take, in bytes.

    Args:
        checkpoint, model: One checkpoint, and `final/`.
        most: Checkpoints that exist at a time: a new one is complete before an old one is deleted.
        kept: Checkpoints that stay at the end.
    """

    checkpoint: int
    model: int
    most: int
    kept: int

    def total(self, members: int = 1) -> int:
        """Return what runs after each other take, the members of a sweep."""
        left = self.kept * self.checkpoint + self.model
        return (members - 1) * left + max(self.most * self.checkpoint, (self.most - 1) * self.checkpoint + self.model, left)

    def describe(self, free: int, members: int = 1) -> str:
        several = f" for {members} members" if members > 1 else ""
        parts = f"{self.most} checkpoints of {format_bytes(self.checkpoint)}, the model {format_bytes(self.model)}"
        return f"up to {format_bytes(self.total(members))}{several} of {format_bytes(free)} free ({parts})"


def disk_of(trainer: Trainer) -> Disk:
    """Return what the run of this trainer takes."""
    config, masters = trainer.config, trainer.strategy.masters
    trained = sum(FLOAT32 * tensor.numel() for tensor in trained_tensors(trainer.student, masters).values())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model_tensors(trainer.student, masters).values())
    average = trained if trainer.average is not None else 0
    checkpoint = weights + average + optimizer_bytes(trainer.student, config.optim.name) + SPARE_BYTES
    last, best = config.checkpoint.keep_last, config.checkpoint.best is not Best.drop
    intervals = [config.checkpoint.every, *([config.eval.steps] if best and config.eval.steps else [])]
    moments = len({trainer.max_steps, *(step for every in intervals for step in range(every, trainer.max_steps, every))})
    most, kept = min(max(last, 1) + best + 1, moments), min(last + best, moments)
    bf16 = trainer.student.dtype.itemsize < FLOAT32
    return Disk(checkpoint, weight_bytes(trainer.student, bf16) + SPARE_BYTES, most, kept)


def free_disk(folder: Path) -> int:
    """Return the bytes that a run in `folder`, which need not exist, can use: free ones, and those of its own earlier files."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    own = (file for part in (CHECKPOINTS, FINAL) for file in (folder / part).rglob("*") if file.is_file())
    return shutil.disk_usage(existing).free + sum(file.stat().st_size for file in own)


def warn_of_disk(trainer: Trainer, folder: Path) -> None:
    """Log a warning where the files of the run in `folder` cannot fit."""
    needed, free = disk_of(trainer), free_disk(folder)
    if needed.total() > free and trainer.accelerator.is_main_process:
        log.warning("disk: %s: %s", needed.describe(free), REMEDY)
