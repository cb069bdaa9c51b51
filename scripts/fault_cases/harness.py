"""What the cases share: runs in forked children of one process that has imported everything and computed nothing."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers.models.qwen2.modeling_qwen2  # noqa: F401 - what every child would import for itself

from opd.train import main
from opd.training import runner  # noqa: F401
from opd.training.checkpoint import Checkpoints

Sabotage = Callable[[], None]

PROMPTS = 12  # three steps of four make an epoch
RUN = (
    "experiment=debug", "device=cpu", "name=run", "data=jsonl", "data.train_path=train.jsonl", "data.eval_path=eval.jsonl",
    "train.max_steps=9", "checkpoint.every=1", "eval.limit=4", "eval.kl_prompts=4", "eval.max_new_tokens=8", "eval.kl_max_new_tokens=8",
)  # fmt: skip
LIMIT = 300.0  # seconds after which a child is taken for hung


@dataclass(slots=True)
class Outcome:
    """fired: how often the fault was seen to happen. survived: how often what is promised held then. failures: where not, a line each."""

    tried: int = 0
    fired: int = 0
    survived: int = 0
    note: str = ""
    failures: list[str] = field(default_factory=list)

    def add(self, what: str, fired: bool, problem: str | None) -> None:
        """One try. problem: what went wrong, or None."""
        self.tried += 1
        self.fired += fired
        self.survived += fired and problem is None
        if problem is not None or not fired:
            self.failures.append(f"{what}: {problem or 'the fault did not fire'}")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: exit code, or minus the signal that ended it; and what it wrote to its standard streams."""

    code: int
    text: str


class Child:
    """A run in a forked process."""

    def __init__(self, folder: Path, words: Sequence[str], sabotage: Sabotage | None = None, rank: int = 0, port: int = 0) -> None:
        self.output = folder / f"output-{rank}-{time.monotonic_ns()}.txt"
        self.folder = folder
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                self._live(words, sabotage, rank, port)
                code = main(list(words))
            except KeyboardInterrupt:
                code = 130
            finally:
                flush_streams()
                os._exit(code)

    def _live(self, words: Sequence[str], sabotage: Sabotage | None, rank: int, port: int) -> None:
        os.chdir(self.folder)
        stream = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(stream, number)
        if port:
            two = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "LOCAL_WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in two.items()})
        if sabotage is not None:
            sabotage()

    def kill(self, number: int) -> None:
        """Does nothing to a child that has ended; only `wait` lets go of its number."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                text = self.output.read_text(errors="replace") if self.output.exists() else ""
                return Ended(os.waitstatus_to_exitcode(status), text)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return Ended(-99, "hung\n" + self.output.read_text(errors="replace"))


def flush_streams() -> None:
    import logging
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, words: Sequence[str], processes: int, sabotage: Sabotage | None = None) -> list[Child]:
    """A run of one or two processes; of two, the second alone is sabotaged."""
    if processes == 1:
        return [Child(folder, words, sabotage)]
    words, port = [*words, "train.batch_size=2"], free_port()
    return [Child(folder, words, sabotage if rank == 1 else None, rank, port) for rank in range(2)]


def prepare(folder: Path) -> Path:
    """A working folder with data for the run."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for name, count in (("train", PROMPTS), ("eval", 8)):
        pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(count)]
        lines = [json.dumps({"prompt": f"{one}+{other}=", "answer": str(one + other)[::-1]}) + "\n" for one, other in pairs]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def finish(folder: Path, words: Sequence[str] = RUN, processes: int = 1) -> str | None:
    """Run to the end, undisturbed; what went wrong, or None."""
    for ended in [child.wait() for child in start(folder, words, processes)]:
        if ended.code != 0:
            return f"exit code {ended.code} on going on: {ended.text.strip()[-300:]}"
    return None


def weights(folder: Path) -> str:
    """A digest of the weights a run ended with."""
    return hashlib.sha256((folder / "runs/run/final/model.safetensors").read_bytes()).hexdigest()


_references: dict[tuple[Path, tuple[str, ...], int], Path] = {}


def reference_folder(root: Path, words: Sequence[str] = RUN, processes: int = 1) -> Path:
    """Where a run that nothing disturbed is."""
    key = (root, tuple(words), processes)
    if key not in _references:
        folder = prepare(root / f"reference{len(_references)}")
        problem = finish(folder, words, processes)
        assert problem is None, problem
        _references[key] = folder
    return _references[key]


def reference(root: Path, words: Sequence[str] = RUN, processes: int = 1) -> str:
    """The weights of a run that nothing disturbed."""
    return weights(reference_folder(root, words, processes))


def end_alike(root: Path, folder: Path, words: Sequence[str] = RUN, processes: int = 1) -> str | None:
    """Go on to the end; None when the weights are those of the undisturbed run."""
    problem = finish(folder, words, processes)
    if problem is None and weights(folder) != reference(root, words, processes):
        problem = "other weights than those of the undisturbed run"
    return problem


def valid(folder: Path) -> list[str]:
    """The run's checkpoints that verify."""
    from opd.training.checkpoint import verify

    checkpoints = Checkpoints(folder / "runs/run/checkpoints", 2, True)
    return [checkpoints.path(*moment).name for moment in checkpoints.moments() if verify(checkpoints.path(*moment)) is None]


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "runs/run/status.json").read_text())
    return found


def fresh(root: Path, name: str) -> Path:
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    return prepare(folder)
