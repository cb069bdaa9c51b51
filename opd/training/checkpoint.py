"""Training state that survives a crash: written to a temporary folder, verified by digest, renamed into place; old ones are deleted last.

A checkpoint is a folder `step_000200/` with `model.safetensors` (float32 weights), `optimizer.safetensors`, `state.json` and, written last,
`manifest.json` with the sha256 of each file. One taken between inner steps is called `step_000200_1/` (one inner step of step 201 is done)
and holds `tokens.safetensors` too: the token table of that step. With `sampling.lag`, `ahead.safetensors` holds the rollouts of the next
step; with `teacher.weights=ema`, `average.safetensors` holds the teacher's weights in float32. No pickle. The next data and random numbers
follow from the step.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from opd.errors import ConfigError, OutputError
from opd.runs import folder as files

if TYPE_CHECKING:  # reading what is there needs no torch
    from torch import Tensor

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST, BEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "best.json"
TOKENS = "tokens.safetensors"
AHEAD = "ahead.safetensors"
AVERAGE = "average.safetensors"
FORMAT = 2  # of state.json and tokens.safetensors
NAME = re.compile(r"step_(\d+)(?:_(\d+))?")
FAILURES_LIMIT = 3
SPARE_BYTES = 2**20  # for the files besides the tensors

Moment = tuple[int, int]  # steps done, inner steps done of the next


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint. `state`: when it was taken, the config of its run, and where the run was, as JSON."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def moment(self) -> Moment:
        return self.step, int(self.state["inner"])

    def tensors(self, name: str) -> "dict[str, Tensor] | None":
        """Return the tensors of `TOKENS`, `AHEAD` or `AVERAGE`; None where the checkpoint has no such file."""
        from safetensors.torch import load_file

        return load_file(self.path / name) if (self.path / name).is_file() else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The contents of a checkpoint. `files`: tensors by file name. `state`: JSON, with the moment in it."""

    files: "dict[str, dict[str, Tensor]]"
    state: dict[str, Any]

    @property
    def moment(self) -> Moment:
        return self.state["step"], self.state["inner"]

    def copy(self) -> "Snapshot":
        """Return a copy on the CPU that training does not change."""
        copies = {
            name: {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in tensors.items()} for name, tensors in self.files.items()
        }
        return Snapshot(copies, json.loads(json.dumps(self.state)))

    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensors in self.files.values() for tensor in tensors.values()) + SPARE_BYTES


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one run in `folder`: the last few and the best. `background`: write while training continues, one at a time.

    With `keep_last` 0 the last one is kept until the run is done.
    """

    folder: Path
    keep_last: int
    keep_best: bool
    background: bool = False
    failures: int = 0
    writer: ThreadPoolExecutor | None = None
    in_flight: Future[Path] | None = None

    def path(self, step: int, inner: int = 0) -> Path:
        return self.folder / (f"step_{step:06d}_{inner}" if inner else f"step_{step:06d}")

    def moments(self) -> list[Moment]:
        """Return the moments with a committed checkpoint, ascending."""
        matches = (NAME.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted((int(match[1]), int(match[2] or 0)) for match in matches if match)

    def newest(self, accepts: Callable[[Mapping[str, Any]], bool] = lambda state: True) -> Checkpoint | None:
        """Return the newest checkpoint that verifies and whose state is accepted; None when there is none.

        Corrupt ones are renamed to `bad_...` and logged. Raises `OutputError` when all checkpoints are corrupt.
        """
        self.wait()
        for moment in reversed(self.moments()):
            path = self.path(*moment)
            problem = verify(path)
            if problem is not None:
                log.error("checkpoint %s is corrupt and set aside: %s", path.name, problem)
                path.rename(unused(self.folder / f"bad_{path.name}"))
                continue
            checkpoint = read(path)
            if accepts(checkpoint.state):
                return checkpoint
        bad = sorted(path.name for path in self.folder.glob("bad_*"))
        if bad and not self.moments():
            raise OutputError(
                f"{self.folder}: no checkpoint is usable ({', '.join(bad)}); nothing was deleted. Start again under another name=…"
            )
        return None

    def save(self, snapshot: Snapshot, best: float | None = None, needed: bool = False) -> None:
        """Commit a checkpoint, now or in the background.

        After a failed write the old checkpoints stay, and the next one is tried as usual.

        Args:
            snapshot: The state to save.
            best: The score of the evaluation at this moment, if it is the best so far.
            needed: Whether the run ends with this checkpoint.

        Raises:
            OutputError: This was the third failure in a row, or the checkpoint is needed.
        """
        self.wait()
        if self.background and not needed:
            self.writer = self.writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self.in_flight = self.writer.submit(self.commit, snapshot.copy(), best)
        else:
            self._tolerate(lambda: self.commit(snapshot, best), 1 if needed else FAILURES_LIMIT)

    def wait(self) -> None:
        """Wait for the background write. Raises `OutputError` as `save` does."""
        if self.in_flight is not None:
            flight, self.in_flight = self.in_flight, None
            self._tolerate(flight.result, FAILURES_LIMIT)

    def _tolerate(self, commit: Callable[[], Path], limit: int) -> None:
        """Raise the error of `commit` only if it is the `limit`-th failure in a row."""
        try:
            commit()
        except OutputError as error:
            self.failures += 1
            if self.failures >= limit:
                raise
            log.error("%s (failure %d of %d in a row; training continues)", error, self.failures, FAILURES_LIMIT)
        else:
            self.failures = 0

    def commit(self, snapshot: Snapshot, best: float | None = None) -> Path:
        """Write a checkpoint, verify it, then delete those that are no longer kept. Raises `OutputError`; the old ones are then intact."""
        target = self.path(*snapshot.moment)
        work = self.folder / f"tmp_{target.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("tmp_*"):
                shutil.rmtree(leftover)
            if target.exists() and verify(target) is not None:
                target.rename(unused(self.folder / f"bad_{target.name}"))
            if not target.exists():
                self._write(snapshot, work, target)
            problem = verify(target)
            if problem is not None:
                target.rename(unused(self.folder / f"bad_{target.name}"))
                raise OutputError(f"{target}: the checkpoint does not read back: {problem}")
            if best is not None and self.keep_best:
                files.write_json(self.folder / BEST, {"step": snapshot.moment[0], "score": best})
                files.flush(self.folder)
            if not snapshot.state.get("trouble", {}).get("steps"):  # a rewind may need those from before steps that were not finite
                self._delete_old(max(self.keep_last, 1))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(work, ignore_errors=True)
            raise OutputError(f"{target}: the checkpoint could not be saved ({error}); make room and run the same command again") from error
        return target

    def _write(self, snapshot: Snapshot, work: Path, target: Path) -> None:
        """Write all files to `work` and rename it into place only when all of it would survive a power cut."""
        from safetensors.torch import save_file

        free, needed = shutil.disk_usage(self.folder).free, snapshot.size()
        if free < needed:
            raise OSError(f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")
        work.mkdir()
        for name, tensors in snapshot.files.items():
            save_file(tensors, work / name)
            files.flush(work / name)
        files.write_json(work / STATE, snapshot.state)
        digests = {name: digest(work / name) for name in (*snapshot.files, STATE)}
        files.write_text(work / MANIFEST, manifest({"step": snapshot.moment[0], "files": digests}))
        files.flush(work)
        work.rename(target)
        files.flush(self.folder)

    def best(self) -> dict[str, float] | None:
        """Return the step and score of the best evaluation so far whose checkpoint exists."""
        best = files.read_json(self.folder / BEST)
        return best if best is not None and (int(best["step"]), 0) in self.moments() else None

    def set_aside(self, moment: Moment) -> None:
        """Rename the checkpoints after `moment`, which the run does not continue from. The best of them is the best no more."""
        best = files.read_json(self.folder / BEST)
        if best is not None and (int(best["step"]), 0) > moment:
            (self.folder / BEST).unlink()
        for later in self.moments():
            if later > moment:
                shutil.rmtree(self.folder / f"old_{self.path(*later).name}", ignore_errors=True)
                self.path(*later).rename(self.folder / f"old_{self.path(*later).name}")

    def finish(self) -> None:
        """Delete what is not kept of a run that is done. A disk that refuses it is only logged."""
        try:
            for old in self.folder.glob("old_step_*"):
                shutil.rmtree(old)
            if self.keep_last == 0:
                self._delete_old(0)
        except OSError as error:
            log.error("%s: old checkpoints could not be deleted: %s", self.folder, error)

    def _delete_old(self, last: int) -> None:
        """Delete all but the `last` newest ones and the best."""
        best, moments = self.best(), self.moments()
        kept = {*moments[max(len(moments) - last, 0) :], *([] if best is None else [(int(best["step"]), 0)])}
        for moment in set(self.moments()) - kept:
            doomed = self.folder / f"tmp_{self.path(*moment).name}"
            self.path(*moment).rename(doomed)  # first, or a crash in between would leave a part that looks like a checkpoint
            shutil.rmtree(doomed)


def unused(path: Path) -> Path:
    """Return `path`, or it with the first number appended for which there is no file yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def read(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`. Raises `ConfigError` for one of another version of opd."""
    state = json.loads((path / STATE).read_text())
    if state.get("format", 1) != FORMAT:
        raise ConfigError(
            f"{path}: a checkpoint of another version of opd (format {state.get('format', 1)}, this one reads {FORMAT}); start again "
            "under another name=…"
        )
    return Checkpoint(path, state)


def verify(path: Path) -> str | None:
    """Return what is wrong with the checkpoint at `path`, or None when every file matches its digest."""
    try:
        text = (path / MANIFEST).read_text()
        content = {key: value for key, value in json.loads(text).items() if key != "sha256"}
        if text != manifest(content):
            return f"{MANIFEST}: its digest does not match"
        digests = {MODEL: None, OPTIMIZER: None, STATE: None, **content["files"]}
        wrong = [name for name in digests if digest(path / name) != digests[name]]
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)}: its digest does not match" if wrong else None


def manifest(content: dict[str, Any]) -> str:
    """Return the manifest's text, with a digest of its own."""
    own = sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=2) + "\n"


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
