"""Training state that survives a crash: written beside, verified by digest, renamed into place, and only then the old one deleted.

A checkpoint is a folder `step_000200/` with `model.safetensors` (float32 weights), `optimizer.safetensors`, `state.json` and, written
last, `manifest.json` with the sha256 of each. No pickle. Which data come next and which random numbers are drawn follows from the step.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from opd.errors import OutputError

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST, BEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "best.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint. state: the step it was taken after and the config of its run, as JSON."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


class Checkpoints:
    """The checkpoints of one run in `folder`: the last few and the best."""

    def __init__(self, folder: Path, keep_last: int, keep_best: bool) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None when there are none at all.

        Bad ones are renamed to `bad_…` and named in the log. Raises `OutputError` when there are checkpoints and all are bad.
        """
        steps = self.steps()
        for step in reversed(steps):
            problem = verify(self.path(step))
            if problem is None:
                return read(self.path(step))
            log.error("checkpoint %s is bad and set aside: %s", self.path(step).name, problem)
            self.path(step).rename(self.folder / f"bad_{self.path(step).name}")
        bad = sorted(path.name for path in self.folder.glob("bad_*"))
        if bad:
            raise OutputError(
                f"{self.folder}: no checkpoint is usable ({', '.join(bad)}); nothing was deleted. Start again under another name=…"
            )
        return None

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
        """Commit the checkpoint of `step`, verify it, then delete those that are no longer kept."""
        target, work = self.path(step), self.folder / f"tmp_step_{step:06d}"
        try:
            if not target.exists():
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                save_file(model_tensors(model), work / MODEL)
                save_file(optimizer_tensors(optimizer), work / OPTIMIZER)
                write_json(work / STATE, {**state, "step": step})
                write_json(work / MANIFEST, {"step": step, "files": {name: digest(work / name) for name in (MODEL, OPTIMIZER, STATE)}})
                for file in work.iterdir():
                    flush(file)
                flush(work)
                work.rename(target)
                flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{target}: the checkpoint could not be written ({error}); make room and run the same command again"
            ) from error
        problem = verify(target)
        if problem is not None:
            raise OutputError(f"{target}: what was written cannot be read back: {problem}")
        self._delete_old()
        return target

    def mark_best(self, step: int, score: float) -> None:
        if self.keep_best:
            write_json(self.folder / BEST, {"step": step, "score": score})

    def best(self) -> dict[str, float] | None:
        """The step and score of the best evaluation so far whose checkpoint is there."""
        if not (self.folder / BEST).is_file():
            return None
        found: dict[str, float] = json.loads((self.folder / BEST).read_text())
        return found if int(found["step"]) in self.steps() else None

    def set_aside(self, step: int) -> None:
        """Rename the checkpoints after `step`, which will be run again another way."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.folder / f"old_{self.path(later).name}", ignore_errors=True)
                self.path(later).rename(self.folder / f"old_{self.path(later).name}")

    def _delete_old(self) -> None:
        best = self.best()
        kept = {*self.steps()[-self.keep_last :], *([] if best is None else [best["step"]])}
        for step in set(self.steps()) - kept:
            shutil.rmtree(self.path(step))


def read(path: Path) -> Checkpoint:
    return Checkpoint(path, json.loads((path / STATE).read_text()))


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None when every file is there and has the digest it was written with."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        wrong = [name for name in (MODEL, OPTIMIZER, STATE) if digest(path / name) != files[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)}: not what was written" if wrong else None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the weights and the optimizer back, bit for bit."""
    tensors = load_file(checkpoint.path / MODEL)
    own = model_tensors(model)
    if tensors.keys() != own.keys():
        raise OutputError(f"{checkpoint.path}: holds the weights of another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    restore_optimizer(load_file(checkpoint.path / OPTIMIZER), optimizer)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and saved buffers; a tied one appears once."""
    persistent = model.state_dict().keys()
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **{name: buffer for name, buffer in model.named_buffers() if name in persistent}}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, entries in state.items() for name, tensor in entries.items()}


def restore_optimizer(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Replace `file` at once: a reader sees the old or the new content, never a part."""
    work = file.with_name(f".{file.name}.tmp")
    work.write_text(json.dumps(content, indent=2) + "\n")
    flush(work)
    work.replace(file)


def flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
