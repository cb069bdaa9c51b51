"""The run folder: what a run writes and how its state is told (see the README for its layout)."""

import fcntl
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from opd.errors import INTERNAL, OutputError
from opd.runs.files import read_lines, write_json, write_text

log = logging.getLogger(__name__)

LOCK = ".lock"
COMPOSED = ".hydra"

RUN, METRICS, EVALUATIONS, STATUS, SUMMARY, FINAL, CHECKPOINTS, ROLLOUTS, REPORT = (
    "run.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "status.json",
    "summary.json",
    "final",
    "checkpoints",
    "rollouts",
    "report.html",
)


class Status(Enum):
    running = "running"
    done = "done"
    preempted = "preempted"
    failed = "failed"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run. `writes` is true in the main process alone; elsewhere all writing is left out.

    unwritten: lines that a full disk did not take, by file; they are written with the next.
    """

    path: Path
    writes: bool = True
    unwritten: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the folder and prove that it can be written to, before anything costly begins. Raises `OutputError`."""
        if not self.writes:
            return
        try:
            self._refuse_links()
            (self.path / ROLLOUTS).mkdir(parents=True, exist_ok=True)
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            probe = self.path / ".probe"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.path}: the run folder cannot be written ({error.strerror}); choose another with hydra.run.dir=FOLDER"
            ) from None

    def _refuse_links(self) -> None:
        """Nothing is written through a link that leads out of the folder the run folder is in."""
        root = self.path.parent.resolve()
        for path in (self.path, *(self.path.iterdir() if self.path.is_dir() else ())):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise OutputError(f"{path}: a link to {path.resolve()}, outside of {root}; remove it, or take hydra.run.dir=FOLDER")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no other process gets the folder. The lock goes with the process, however it ends. Raises `OutputError`."""
        with (self.path / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise OutputError(
                    f"{self.path}: another run writes here ({file.read().strip()}); wait for it or stop it, or take another name=…"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def status(self) -> Status | None:
        """What the last run in this folder said of itself; None where there was none."""
        file = self.path / STATUS
        return Status(json.loads(file.read_text())["status"]) if file.is_file() else None

    def set_status(self, status: Status, reason: str = "", exit_code: int | None = None) -> None:
        """Where that cannot be written, it is in the log: what happened to the run is what has to be told."""
        if not self.writes:
            return
        try:
            write_json(self.path / STATUS, {"status": status.value, "reason": reason, "exit_code": exit_code})
        except OSError as error:
            log.error("%s: the status %s cannot be written: %s", self.path / STATUS, status.value, error)

    def hung(self, reason: str) -> None:
        """What a watchdog has to say."""
        log.error(reason)
        self.set_status(Status.failed, reason, INTERNAL)

    def stacks(self, process: int) -> Path:
        """Where a process that hangs leaves its stacks."""
        return self.path / (f"stacks_{process}.txt" if process else "stacks.txt")

    def identity(self) -> dict[str, Any] | None:
        """What the run in this folder is: its config and what else decides what it learns. None where none was begun."""
        file = self.path / RUN
        return json.loads(file.read_text()) if file.is_file() else None

    def set_identity(self, identity: Mapping[str, Any]) -> None:
        if self.writes:
            write_json(self.path / RUN, identity)

    def write_composed(self, files: Mapping[str, str]) -> None:
        """What the run was composed from and to, as YAML by name."""
        if self.writes:
            (self.path / COMPOSED).mkdir(exist_ok=True)
            for name, text in files.items():
                write_text(self.path / COMPOSED / f"{name}.yaml", text)

    def adopt(self, other: Path) -> None:
        """Take over what another run logged, to go on from one of its checkpoints."""
        for name in (METRICS, EVALUATIONS):
            if other.resolve() != self.path.resolve() and (other / name).is_file():
                shutil.copyfile(other / name, self.path / name)

    def clear(self) -> None:
        """Forget all that was logged."""
        self.rewind(-1)

    def rewind(self, step: int) -> None:
        """Forget what was logged of later steps, which will be run again."""
        if not self.writes:
            return
        for file in (METRICS, EVALUATIONS):
            if (self.path / file).is_file():
                lines = [line for line in read_lines(self.path / file) if line["step"] <= step]
                (self.path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        for rollouts in (self.path / ROLLOUTS).glob("step_*.jsonl"):
            if int(rollouts.stem.removeprefix("step_")) > step:
                rollouts.unlink()

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        self._append(METRICS, line)

    def add_evaluation(self, line: Mapping[str, Any]) -> None:
        self._append(EVALUATIONS, line)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.path / METRICS)

    def evaluations(self) -> list[dict[str, Any]]:
        return read_lines(self.path / EVALUATIONS)

    def write_rollouts(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        if self.writes:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            try:
                (self.path / ROLLOUTS / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")
            except OSError as error:
                log.error("the rollouts of step %d cannot be written and are left out: %s", step, error)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self.writes:
            write_json(self.path / SUMMARY, summary)

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / SUMMARY).read_text())
        return found

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        text = self.unwritten.pop(name, "") + json.dumps({key: finite(value) for key, value in line.items()}) + "\n"
        file = self.path / name
        size = file.stat().st_size if file.is_file() else 0
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            self.unwritten[name] = text
            if file.is_file():
                os.truncate(file, size)
            log.error("%s cannot be written now (%s); the line is kept and tried again", file, error)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
