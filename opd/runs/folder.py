"""The run folder: its layout, and how a run writes to it."""

import fcntl
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from opd.errors import INTERNAL, ConfigError, DataError, OutputError

log = logging.getLogger(__name__)

HYDRA = ".hydra"
LOCK = ".lock"
RUN = "run.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
ANSWERS = "answers.jsonl"
STATUS = "status.json"
SUMMARY = "summary.json"
FINAL = "final"
CHECKPOINTS = "checkpoints"
ROLLOUTS = "rollouts"
REPORT = "report.html"


class Status(Enum):
    running = "running"
    done = "done"
    preempted = "preempted"
    failed = "failed"


@dataclass(slots=True)
class RunFolder:
    """The folder of one run, open for writing.

    Attributes:
        writes: true on the main process; on all others every write is left out.
        begun: whether this start passed all checks before training, so that the folder has its run.
        unwritten: text by file name that a full disk did not take; the next `append` tries again.
    """

    path: Path
    writes: bool = True
    begun: bool = False
    unwritten: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Create the folder and test that it can be written to.

        Raises:
            OutputError: it cannot, or a link in it leads elsewhere.
        """
        if not self.writes:
            return
        root = self.path.parent.resolve()
        try:
            for path in (self.path, *(self.path.iterdir() if self.path.is_dir() else ())):
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise OutputError(f"{path}: a link to {path.resolve()}, outside of {root}; remove it, or set hydra.run.dir=FOLDER")
            (self.path / ROLLOUTS).mkdir(parents=True, exist_ok=True)
            (self.path / CHECKPOINTS).mkdir(exist_ok=True)
            probe = self.path / ".probe"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot write to the run folder ({error.strerror}); choose another with hydra.run.dir=FOLDER"
            ) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock ends with the process, however it ends.

        Raises:
            OutputError: another process has the lock.
        """
        with (self.path / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise OutputError(
                    f"{self.path}: another run writes here ({file.read().strip()}); wait for it or stop it, or choose another name=NAME"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    @contextmanager
    def unchanged_if_refused(self) -> Iterator[None]:
        """Undo what this start did to the folder if an error in the block refuses the run before it has begun."""
        file = self.path / STATUS
        earlier = file.read_text(encoding="utf-8") if file.is_file() else None
        try:
            yield
        except (ConfigError, DataError, OutputError):
            if self.writes and not self.begun:
                if earlier is None:
                    file.unlink(missing_ok=True)
                    (self.path / LOCK).unlink(missing_ok=True)
                    for name in (ROLLOUTS, CHECKPOINTS):
                        with suppress(OSError):  # it has something in it
                            (self.path / name).rmdir()
                elif (self.path / RUN).is_file():
                    write_text(file, earlier)
            raise

    def status(self) -> Status | None:
        """Return the status that the last run in this folder recorded; None for a new folder."""
        content = read_json(self.path / STATUS)
        return None if content is None else Status(content["status"])

    def set_status(self, status: Status, reason: str = "", exit_code: int | None = None) -> None:
        """Record the status. A disk that refuses it is only logged: it must not hide what happened to the run."""
        try:
            self.write(STATUS, {"status": status.value, "reason": reason, "exit_code": exit_code})
        except OSError as error:
            log.error("cannot write the status %s to %s: %s", status.value, self.path / STATUS, error)

    def record_hang(self, reason: str) -> None:
        """Log and record that the watchdog is about to end the process."""
        log.error(reason)
        self.set_status(Status.failed, reason, INTERNAL)

    def stacks_file(self, process: int) -> Path:
        """Return the file for the stack traces of a process that hangs."""
        return self.path / (f"stacks_{process}.txt" if process else "stacks.txt")

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder, such as `RUN` or `SUMMARY`."""
        if self.writes:
            write_json(self.path / name, content)

    def write_hydra(self, files: Mapping[str, str]) -> None:
        """Write the composed config and its parts to `.hydra/`, as YAML text by name."""
        if self.writes:
            (self.path / HYDRA).mkdir(exist_ok=True)
            for name, text in files.items():
                write_text(self.path / HYDRA / f"{name}.yaml", text)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a log, `METRICS` or `EVALUATIONS`; a number that is not finite becomes null, as JSON has none."""
        if not self.writes:
            return
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
        self.append_text(name, json.dumps(plain) + "\n")

    def append_unwritten(self) -> None:
        """Try once more to append what a full disk did not take."""
        for name in list(self.unwritten):
            self.append_text(name, "")

    def append_text(self, name: str, text: str) -> None:
        """Append lines to a log. Those that the disk refuses come with the next ones."""
        text = self.unwritten.pop(name, "") + text
        file = self.path / name
        size = file.stat().st_size if file.is_file() else 0
        try:
            with file.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            self.unwritten[name] = text
            if file.is_file():
                os.truncate(file, size)
            log.error("cannot write to %s now (%s); the next line tries again", file, error)

    def write_rollouts(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        if not self.writes:
            return
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            (self.path / ROLLOUTS / f"step_{step:06d}.jsonl").write_text(text, encoding="utf-8")
        except OSError as error:
            log.error("cannot write the rollouts of step %d, which are left out: %s", step, error)

    def copy_logs(self, other: Path) -> None:
        """Copy another run's logs, to resume from one of its checkpoints."""
        for name in (METRICS, EVALUATIONS, ANSWERS):
            if other.resolve() != self.path.resolve() and (other / name).is_file():
                shutil.copyfile(other / name, self.path / name)

    def rewind(self, step: int) -> None:
        """Delete from the logs what came after `step`; -1 deletes everything."""
        if not self.writes:
            return
        for name, text in self.unwritten.items():
            self.unwritten[name] = "".join(line for line in text.splitlines(keepends=True) if json.loads(line)["step"] <= step)
        for file in (self.path / METRICS, self.path / EVALUATIONS, self.path / ANSWERS):
            if file.is_file():
                lines = [line for line in read_lines(file) if line["step"] <= step]
                write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
        for rollouts in (self.path / ROLLOUTS).glob("step_*.jsonl"):
            if int(rollouts.stem.removeprefix("step_")) > step:
                rollouts.unlink()


def write_json(file: Path, content: Any) -> None:
    """Replace `file` atomically by `content` as JSON."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace `file` atomically: a reader, or a crash, sees the old or the new content, never a part."""
    work = file.with_name(f".{file.name}.tmp")
    work.write_text(text, encoding="utf-8")
    flush(work)
    work.replace(file)


def write_output(file: Path, text: str) -> None:
    """Replace a file that the user named.

    Raises:
        OutputError: the disk refuses it.
    """
    check_output_path(file)
    try:
        write_text(file, text)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}") from None


def check_output_path(file: Path) -> None:
    """Check that `file` can be created, before the work whose result it is for.

    Raises:
        OutputError: it is a folder, or its folder does not exist.
    """
    if file.is_dir():
        raise OutputError(f"{file}: a folder; name a file")
    if not file.parent.is_dir():
        raise OutputError(f"{file}: there is no folder {file.parent}")


def flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no file. Raises `ValueError` for anything but an object."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(content, dict | None):
        raise ValueError(f"{file.name} holds no object")
    return content


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, without a last line that a crash cut short; none where there is no file."""
    if not file.is_file():
        return []
    complete = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in complete.split("\n") if line]
