"""Training state that survives a crash: written beside, verified by digest, renamed into place, and only then the old one deleted.

A checkpoint is a folder `step_000200/` with `model.safetensors` (float32 weights), `optimizer.safetensors`, `state.json` and, written
last, `manifest.json` with the sha256 of each. One that was taken between inner steps is called `step_000200_1/` (one inner step of step
201 is done) and holds `round.safetensors` too: the rollouts it works on. With `sampling.lag`, `ahead.safetensors` holds the rollouts of the
step behind. No pickle. Which data come next and which random numbers are drawn follows from the step.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from opd.errors import OutputError
from opd.models.sharding import Held, ZeroOptimizer, gathered, like, put, weight, write_full
from opd.runs import folder as files

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST, BEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "best.json"
ROUND = "round.safetensors"
AHEAD = "ahead.safetensors"
NAME = re.compile(r"step_(\d+)(?:_(\d+))?")
FAILURES_LIMIT = 3
SPARE_BYTES = 2**20  # what a checkpoint takes besides its tensors

Moment = tuple[int, int]  # steps done, inner steps done of the next


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint. state: when it was taken, the config of its run, and how the run was going, as JSON."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def moment(self) -> Moment:
        return self.step, int(self.state["inner"])

    def round(self) -> dict[str, Tensor] | None:
        """The rollouts of the step it is in the middle of; None between steps."""
        return None if self.state["round"] is None else load_file(self.path / ROUND)

    def ahead(self) -> dict[str, Tensor] | None:
        """The rollouts that were sampled ahead, if any were."""
        return load_file(self.path / AHEAD) if (self.path / AHEAD).is_file() else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint is written from. files: tensors by file name. state: JSON, with the moment in it.

    written: files that are there already, in a folder of their own. failure: what kept them from being there.
    """

    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    written: tuple[Path, ...] = ()
    failure: OSError | None = None

    @property
    def moment(self) -> Moment:
        return self.state["step"], self.state["inner"]

    def copied(self) -> "Snapshot":
        """A copy on the CPU that training does not change."""
        copies = {
            name: {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in tensors.items()} for name, tensors in self.files.items()
        }
        return Snapshot(copies, json.loads(json.dumps(self.state)))

    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensors in self.files.values() for tensor in tensors.values()) + SPARE_BYTES


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one run in `folder`: the last few and the best. background: written while training goes on, one at a time."""

    folder: Path
    keep_last: int
    keep_best: bool
    background: bool = False
    failures: int = 0
    writer: ThreadPoolExecutor | None = None
    in_flight: "Future[Path] | None" = field(default=None)

    @property
    def gathered(self) -> Path:
        """Where files may be written before the checkpoint that they are part of."""
        return self.folder / "gathered"

    def path(self, step: int, inner: int = 0) -> Path:
        return self.folder / (f"step_{step:06d}_{inner}" if inner else f"step_{step:06d}")

    def moments(self) -> list[Moment]:
        """Moments with a committed checkpoint, ascending."""
        found = (NAME.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted((int(match[1]), int(match[2] or 0)) for match in found if match)

    def newest(self, suits: Callable[[Mapping[str, Any]], bool] = lambda state: True) -> Checkpoint | None:
        """The newest checkpoint that verifies and whose state suits; None when there are none at all.

        Bad ones are renamed to `bad_…` and named in the log. Raises `OutputError` when there are checkpoints and all are bad.
        """
        self.wait()
        for moment in reversed(self.moments()):
            path = self.path(*moment)
            problem = verify(path)
            if problem is not None:
                log.error("checkpoint %s is bad and set aside: %s", path.name, problem)
                path.rename(unused(self.folder / f"bad_{path.name}"))
            elif suits(read(path).state):
                return read(path)
        bad = sorted(path.name for path in self.folder.glob("bad_*"))
        if bad and not self.moments():
            raise OutputError(
                f"{self.folder}: no checkpoint is usable ({', '.join(bad)}); nothing was deleted. Start again under another name=…"
            )
        return None

    def save(self, snapshot: Snapshot, best: float | None = None, needed: bool = False) -> None:
        """Commit a checkpoint, now or in the background. best: the score of an evaluation better than all before, which it belongs to.

        One that cannot be written is left out: the old ones stay and the next one is tried as usual. Raises `OutputError` when that was
        the third in a row, or when this one is needed, because the run ends with it.
        """
        self.wait()
        if self.background and not needed:
            self.writer = self.writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self.in_flight = self.writer.submit(self.commit, snapshot.copied(), best)
        else:
            self._settle(lambda: self.commit(snapshot, best), 1 if needed else FAILURES_LIMIT)

    def wait(self) -> None:
        """Until nothing is being written any more. Raises `OutputError` as `save` does."""
        if self.in_flight is not None:
            flight, self.in_flight = self.in_flight, None
            self._settle(flight.result, FAILURES_LIMIT)

    def _settle(self, finish: Callable[[], Path], limit: int) -> None:
        try:
            finish()
        except OutputError as error:
            self.failures += 1
            if self.failures >= limit:
                raise
            log.error("%s (failure %d of %d in a row; training goes on)", error, self.failures, FAILURES_LIMIT)
        else:
            self.failures = 0

    def commit(self, snapshot: Snapshot, best: float | None = None) -> Path:
        """Write a checkpoint, verify it, then delete those that are no longer kept. Raises `OutputError`; the old ones are then whole."""
        target = self.path(*snapshot.moment)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("tmp_*"):
                shutil.rmtree(left_over)
            if target.exists() and verify(target) is not None:
                target.rename(unused(self.folder / f"bad_{target.name}"))
            if not target.exists():
                self._write(snapshot, target)
            problem = verify(target)
            if problem is not None:
                target.rename(unused(self.folder / f"bad_{target.name}"))
                raise OutputError(f"{target}: what was written cannot be read back: {problem}")
            if best is not None and self.keep_best:
                files.write_json(self.folder / BEST, {"step": snapshot.moment[0], "score": best})
                files.flush(self.folder)
            self._delete_old()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._work(target), ignore_errors=True)
            raise OutputError(
                f"{target}: the checkpoint could not be written ({error}); make room and run the same command again"
            ) from error
        finally:
            shutil.rmtree(self.gathered, ignore_errors=True)
        return target

    def _work(self, target: Path) -> Path:
        return self.folder / f"tmp_{target.name}"

    def _write(self, snapshot: Snapshot, target: Path) -> None:
        """Nothing is renamed into place before all of it would survive a power cut."""
        if snapshot.failure is not None:
            raise snapshot.failure
        free, needed = shutil.disk_usage(self.folder).free, snapshot.size()
        if free < needed:
            raise OSError(f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")
        work = self._work(target)
        work.mkdir()
        for name, tensors in snapshot.files.items():
            save_file(tensors, work / name)
            files.flush(work / name)
        for file in snapshot.written:
            files.flush(file)
            file.rename(work / file.name)
        files.write_json(work / STATE, snapshot.state)
        names = (*snapshot.files, *(file.name for file in snapshot.written), STATE)
        files.write_text(work / MANIFEST, manifest({"step": snapshot.moment[0], "files": {name: digest(work / name) for name in names}}))
        files.flush(work)
        work.rename(target)
        files.flush(self.folder)

    def best(self) -> dict[str, float] | None:
        """The step and score of the best evaluation so far whose checkpoint is there."""
        if not (self.folder / BEST).is_file():
            return None
        found: dict[str, float] = json.loads((self.folder / BEST).read_text())
        return found if (int(found["step"]), 0) in self.moments() else None

    def set_aside(self, moment: Moment) -> None:
        """Rename the checkpoints after `moment`, which will be run again another way."""
        for later in self.moments():
            if later > moment:
                shutil.rmtree(self.folder / f"old_{self.path(*later).name}", ignore_errors=True)
                self.path(*later).rename(self.folder / f"old_{self.path(*later).name}")

    def _delete_old(self) -> None:
        best = self.best()
        kept = {*self.moments()[-self.keep_last :], *([] if best is None else [(int(best["step"]), 0)])}
        for moment in set(self.moments()) - kept:
            gone = self.folder / f"tmp_{self.path(*moment).name}"
            self.path(*moment).rename(gone)  # first, or a crash in between would leave a part that looks like a checkpoint
            shutil.rmtree(gone)


def unused(path: Path) -> Path:
    """`path`, or with the first number behind it that no file has yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def read(path: Path) -> Checkpoint:
    return Checkpoint(path, json.loads((path / STATE).read_text()))


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None when every file is there and has the digest it was written with."""
    try:
        text = (path / MANIFEST).read_text()
        content = {key: value for key, value in json.loads(text).items() if key != "sha256"}
        if text != manifest(content):
            return f"{MANIFEST}: not what was written"
        files = {MODEL: None, OPTIMIZER: None, STATE: None, **content["files"]}
        wrong = [name for name in files if digest(path / name) != files[name]]
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is not there"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)}: not what was written" if wrong else None


def manifest(content: dict[str, Any]) -> str:
    """The manifest's text, with a digest of its own."""
    own = sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=2) + "\n"


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put the weights and the optimizer back, bit for bit, without ever holding more than one tensor of the file."""
    restore_weights(checkpoint, model)
    restore_optimizer(checkpoint.path / OPTIMIZER, optimizer)


def restore_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises `OutputError` where they are another model's."""
    own = model_tensors(model)
    if names(checkpoint.path / MODEL) != own.keys():
        raise OutputError(f"{checkpoint.path}: holds the weights of another model")
    for name, tensor in own.items():
        put(tensor, stored(checkpoint.path / MODEL, name))


def names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def stored(file: Path, name: str) -> Tensor:
    """A tensor that is the file itself, mapped into memory: what is kept has to be copied.

    The file is opened for this one alone: what was read of it counts as memory of the process until it is closed.
    """
    with safe_open(file, framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(name)
    return found


def snapshot(
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    rollouts: Mapping[str, dict[str, Tensor]] | None = None,
    keep: bool = True,
    place: Path | None = None,
) -> Snapshot:
    """What there is to save now; the tensors are those in use, not copies. state: with `step` and `inner`. rollouts: by file name.

    Sharded ones are gathered, for which all processes have to ask; those that do not `keep` them get none. place: a folder for them, one
    after the other, instead of memory.
    """
    found, rest = {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(optimizer)}, dict(rollouts or {})
    if place is None:
        return Snapshot({name: gathered(tensors, keep) for name, tensors in found.items()} | rest, state)
    failures = [emptied(place) if keep else None]
    failures += [write_full(tensors, place / name if keep else None) for name, tensors in found.items()]
    return Snapshot(rest, state, tuple(place / name for name in found), next(filter(None, failures), None))


def emptied(folder: Path) -> OSError | None:
    """Make a folder, anew if it is there. Returns what kept it from being made."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        return error
    return None


def model_tensors(model: nn.Module) -> dict[str, Held]:
    """Trained parameters and saved buffers; a tied one appears once."""
    persistent = model.state_dict().keys()
    trained = {name: weight(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **{name: buffer for name, buffer in model.named_buffers() if name in persistent}}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Held]:
    """The optimizer's state by `<parameter number>.<name>`, in the order of these, so that a run that went on writes the same files."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, entries in sorted(state.items()) for name, tensor in sorted(entries.items())}


def restore_optimizer(file: Path, optimizer: Optimizer) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key in names(file):
        number, _, name = key.partition(".")
        parameter, tensor = parameters[int(number)], stored(file, key)
        own = like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        # DeepSpeed copies what it takes over, its own share of it.
        state.setdefault(int(number), {})[name] = tensor if isinstance(optimizer, ZeroOptimizer) else own.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
