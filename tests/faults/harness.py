"""What the fault cases share: small runs, each in a forked child of a process that has imported everything and computed nothing."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import preloaded  # noqa: F401 - once instead of in every child
import torch
from safetensors.torch import load_file

from opd.cli.words import last_of_each
from opd.train import main
from opd.training.checkpoint import Checkpoints, verify

Fault = Callable[[], None]  # called in the child before its run starts

PROMPTS = 12  # three steps of four prompts make an epoch
RUN = (
    "experiment=debug", "device=cpu", "name=run", "data=jsonl", "data.train_path=train.jsonl", "data.eval_path=eval.jsonl",
    "train.max_steps=9", "checkpoint.every=1", "eval.limit=4", "eval.kl_prompts=4", "eval.max_new_tokens=8", "eval.kl_max_new_tokens=8",
)  # fmt: skip
TIME_LIMIT = 300.0  # seconds after which a child counts as hung


class Try(NamedTuple):
    """One try of a case.

    Attributes:
        what: the fault that was injected.
        fired: whether it was observed to happen.
        problem: how the promise was broken, or None.
    """

    what: str
    fired: bool
    problem: str | None


Tries = Generator[Try, None, str | None]  # returns a note
Case = Callable[[int, Path], Tries]


class Ended(NamedTuple):
    """How a child ended: its exit code, or minus the signal that killed it, and its output."""

    code: int
    output: str

    def __str__(self) -> str:
        return f"exit code {self.code}: {self.output.strip()[-300:]}"

    def unless(self, *codes: int) -> str | None:
        """Return None if the exit code is one of `codes`, else what happened instead."""
        return None if self.code in codes else str(self)


class Child:
    """A run in a forked process."""

    def __init__(self, folder: Path, words: Sequence[str], fault: Fault | None = None, rank: int = 0, port: int = 0) -> None:
        self.output = folder / f"output-{rank}-{time.monotonic_ns()}.txt"
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.chdir(folder)
                stream = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                if port:  # as torchrun sets them
                    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
                    os.environ.update({name: str(value) for name, value in ranks.items()})
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                if fault is not None:
                    fault()
                code = main(last_of_each(words)[0])
            except KeyboardInterrupt:
                code = 130
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                logging.shutdown()
                os._exit(code)

    def kill(self, number: int) -> None:
        """Send a signal; harmless after the child has ended, because its process id is free only after `wait`."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        deadline = time.monotonic() + TIME_LIMIT
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                output = self.output.read_text(errors="replace") if self.output.exists() else ""
                return Ended(os.waitstatus_to_exitcode(status), output)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return Ended(-99, f"hung\n{self.output.read_text(errors='replace')}")


def start(folder: Path, words: Sequence[str] = RUN, processes: int = 1, fault: Fault | None = None) -> list[Child]:
    """Start a run of one or two processes; of two, only the second gets the fault."""
    if processes == 1:
        return [Child(folder, words, fault)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return [Child(folder, [*words, "train.batch_size=2"], fault if rank == 1 else None, rank, port) for rank in range(2)]


def run(folder: Path, words: Sequence[str] = RUN, fault: Fault | None = None) -> Ended:
    """Run one process to its end."""
    return start(folder, words, 1, fault)[0].wait()


def finish(folder: Path, words: Sequence[str] = RUN, processes: int = 1) -> str | None:
    """Run or resume to the end without a fault; return what went wrong, or None."""
    problems = [child.wait().unless(0) for child in start(folder, words, processes)]
    return next((f"undisturbed to the end: {problem}" for problem in problems if problem), None)


def new_folder(root: Path, name: str) -> Path:
    """Make a working folder with data for the run, replacing an older one."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split, count in (("train", PROMPTS), ("eval", 8)):
        pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(count)]
        lines = [json.dumps({"prompt": f"{one}+{other}=", "answer": str(one + other)[::-1]}) + "\n" for one, other in pairs]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def each_try(one: Callable[[int, Path, Path], Try]) -> Case:
    """Make a case of a function that makes one try, from its number, a new working folder, and the folder of all tries."""

    @functools.wraps(one)
    def tries(times: int, root: Path) -> Tries:
        for number in range(times):
            yield one(number, new_folder(root, "run"), root)
        return None

    return tries


class Reference(NamedTuple):
    """What an undisturbed run left, and how long it took."""

    weights: dict[str, torch.Tensor]
    digest: str
    seconds: float


@functools.cache
def reference(words: Sequence[str] = RUN, processes: int = 1) -> Reference:
    """Return the results of an undisturbed run, made once for all cases."""
    with tempfile.TemporaryDirectory(prefix="opd-faults-") as root:
        folder, begin = new_folder(Path(root), "run"), time.monotonic()
        problem = finish(folder, words, processes)
        assert problem is None, problem
        return Reference(final_weights(folder), final_digest(folder), time.monotonic() - begin)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs/run/final/model.safetensors")


def final_digest(folder: Path) -> str:
    """Return a digest of the weights that a run ended with."""
    return hashlib.sha256((folder / "runs/run/final/model.safetensors").read_bytes()).hexdigest()


def resume_to_reference(folder: Path, words: Sequence[str] = RUN, processes: int = 1) -> str | None:
    """Resume to the end; return None if the final weights are bitwise those of an undisturbed run."""
    problem = finish(folder, words, processes)
    if problem is None and final_digest(folder) != reference(tuple(words), processes).digest:
        problem = "final weights differ from those of an undisturbed run"
    return problem


def checkpoints_of(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "runs/run/checkpoints", 2, True)


def valid_checkpoints(folder: Path) -> list[Path]:
    """Return the run's checkpoints that verify, oldest first."""
    checkpoints = checkpoints_of(folder)
    paths = [checkpoints.path(*moment) for moment in checkpoints.moments()]
    return [path for path in paths if verify(path) is None]


def status(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs/run/status.json").read_text())
    return content


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Poll `condition`; return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if condition():
                return True
        time.sleep(0.01)
    return False
