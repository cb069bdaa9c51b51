"""Runs in processes that are forked from one that has imported torch and opd and computed nothing: a new interpreter needs seconds."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
Before = Callable[[], object]
FSDP2 = ROOT / "scripts/accelerate/fsdp2_cpu2.yaml"


class Done(NamedTuple):
    """The exit codes of a run's processes, minus the signal for one that was killed, and what they all wrote."""

    codes: list[int]
    stdout: str
    stderr: str


@cache
def context() -> multiprocessing.context.ForkServerContext:
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["pytest", "preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    return forking


def train(folder: Path, words: Sequence[str], processes: int = 1, config: Path | None = None, before: Before | None = None) -> Done:
    """Run `opd train` in a folder, as one process or as torchrun would start it.

    Args:
        config: A file of `accelerate launch`, whose variables the processes get.
        before: Called in each process before the run; a function of a module.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = {} if config is None else variables(config)
    with tempfile.TemporaryDirectory() as outputs:
        running, files = [], [Path(outputs) / name for name in ("stdout", "stderr")]
        for rank in range(processes):
            ranks = {} if processes == 1 else {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**own, **{name: str(value) for name, value in ranks.items()}}
            running.append(context().Process(target=work, args=(folder, list(words), environment, files, before)))
            running[-1].start()
        return Done(wait_for(running), *(file.read_text() for file in files))


def trained(folder: Path, words: Sequence[str], processes: int = 1, **options: Any) -> Done:
    """Do what `train` does, and assert that the run ends well."""
    done = train(folder, words, processes, **options)
    assert done.codes == [0] * processes, f"{done.codes}\n{done.stdout}\n{done.stderr}"
    return done


def work_in_two(work: Callable[..., None], *arguments: object) -> None:
    """Call `work` in two processes, with the rank and the arguments; raise the error of one that fails."""
    context()
    torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="forkserver")


def variables(config: Path) -> dict[str, str]:
    """Return the environment variables that `accelerate launch` sets for a config file, but for those of the ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser  # not in every forked process
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(config), "--main_process_port", "0", "script"])
    found = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def work(folder: Path, words: list[str], environment: Mapping[str, str], files: Sequence[Path], before: Before | None) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    if before is not None:
        before()
    from opd.train import main

    sys.exit(main(words))


def wait_for(running: Sequence[ForkServerProcess], seconds: float = 300.0) -> list[int]:
    """Return the exit codes of processes, of which those that take longer are killed."""
    deadline = time.monotonic() + seconds
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()  # does nothing to one that has ended
        process.join()
    return [process.exitcode for process in running]
