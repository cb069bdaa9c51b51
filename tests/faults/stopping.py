"""Runs that are killed or asked to stop at any moment, in one process of one or two, and resumed with the same command."""

import math
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from faults import hooks
from faults.harness import (
    RUN,
    Fault,
    Tries,
    Try,
    each_try,
    finish,
    new_folder,
    resume_to_reference,
    start,
    status,
    valid_checkpoints,
    wait_until,
)

FAULTS_PER_RUN = 8
LONG_RUN = (*RUN, "train.max_steps=24")  # eight epochs, for more than ten tries


def random_kills(times: int, root: Path) -> Tries:
    """SIGKILL at random moments, up to eight times a run.

    The same command resumes; final weights are bitwise those of an undisturbed run.
    """
    draw, words = random.Random(1), LONG_RUN if times > 10 else RUN
    done, runs, in_save, before_first = 0, 0, 0, 0
    while done < times:
        folder, kills, runs, seconds = new_folder(root, "kills"), 0, runs + 1, run_seconds(root, words)
        while kills < min(FAULTS_PER_RUN, times - done):
            [child] = start(folder, words)
            time.sleep(draw.uniform(0, seconds))
            child.kill(signal.SIGKILL)
            if child.wait().code != -signal.SIGKILL:
                break
            kills += 1
            in_save += any((folder / "runs/run/checkpoints").glob("tmp_*"))
            before_first += not valid_checkpoints(folder)
        problem = resume_to_reference(root, folder, words)
        done += kills
        for _ in range(kills):
            yield Try(f"run {runs}", True, problem)
    return f"{runs} runs, {in_save} kills inside a save, {before_first} before the first"


def run_seconds(root: Path, words: Sequence[str]) -> float:
    """Return how long an undisturbed run takes at present."""
    folder, begin = new_folder(root, "timed"), time.monotonic()
    assert finish(folder, words) is None
    return time.monotonic() - begin


def random_signals(times: int, root: Path) -> Tries:
    """SIGTERM, SIGINT or SIGUSR1 at random moments, up to eight times a run.

    The run ends with 75 and a checkpoint, or had not begun and leaves the last checkpoint untouched; final weights are bitwise those of an
    undisturbed run.
    """
    draw, words = random.Random(2), LONG_RUN if times > 10 else RUN
    done, runs, saved = 0, 0, 0
    while done < times:
        folder, runs, tries, seconds = new_folder(root, "signals"), runs + 1, list[Try](), run_seconds(root, words)
        while len(tries) < min(FAULTS_PER_RUN, times - done):
            before = valid_checkpoints(folder)
            number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
            [child] = start(folder, words)
            time.sleep(draw.uniform(0.02, seconds))
            child.kill(number)
            ended = child.wait()
            if ended.code == 0:
                break  # too late to be a try
            problem = ended.unless(75, -number, 130)
            if ended.code == 75:
                saved += 1
                if status(folder)["status"] != "preempted":
                    problem = f"status {status(folder)}"
            elif valid_checkpoints(folder) != before:
                problem = problem or f"checkpoints were {before}, are {valid_checkpoints(folder)}"
            if before and not valid_checkpoints(folder):
                problem = problem or "no checkpoint is left"
            tries.append(Try(f"{signal.Signals(number).name} in run {runs}", True, problem))
        at_end = resume_to_reference(root, folder, words)
        done += len(tries)
        yield from (attempt._replace(problem=attempt.problem or at_end) for attempt in tries)
    return f"{runs} runs, {saved} stopped with 75, {done - saved} before the run had begun"


def at_signal_check(place: int) -> Fault:
    """Let a run send itself SIGTERM at its `place`-th look for signals."""
    seen = 0

    def count(kind: str) -> None:
        nonlocal seen
        seen += 1
        if seen == place:
            os.kill(os.getpid(), signal.SIGTERM)

    return lambda: hooks.before_signal_checks(count)


def list_signal_checks(root: Path, processes: int) -> list[str]:
    """Return the kinds of all looks for signals in an undisturbed run."""
    folder = new_folder(root, "checks")

    def write(kind: str) -> None:
        with (folder / "checks.txt").open("a") as file:
            file.write(f"{kind}\n")

    assert all(child.wait().code == 0 for child in start(folder, RUN, processes, lambda: hooks.before_signal_checks(write)))
    return (folder / "checks.txt").read_text().split()


def stops(times: int, root: Path, processes: int = 1) -> Tries:
    """SIGTERM between decoding steps, after scoring or between inner steps, twice a run.

    The run ends with 75 and a checkpoint, between inner steps with the rollouts; final weights are bitwise those of an undisturbed run.
    """
    kinds, between = list_signal_checks(root, processes), 0
    inner, decode = ([place for place, kind in enumerate(kinds, 1) if kind == name] for name in ("inner", "decode"))
    # Before second inner steps the rollouts have to be saved too: there first, then at other places in turn.
    groups, each = (inner[1::2], decode, inner[::2]), math.ceil(times / 3)
    for number in range(times):
        group = groups[number % 3]
        place = group[number // 3 * len(group) // each]
        folder = new_folder(root, "stops")
        first = [child.wait() for child in start(folder, RUN, processes, at_signal_check(place))]
        between += any(path.name.count("_") == 2 for path in valid_checkpoints(folder))
        second = [child.wait() for child in start(folder, RUN, processes, at_signal_check(1 + place % 12))]
        codes = {ended.code for ended in (*first, *second)}
        near_end = place > len(kinds) - 12  # the second signal may come after the run
        expected = codes == {75} or (near_end and codes == {0, 75})
        problem = None if expected else f"exit codes {codes}: {first[-1]}; {second[-1]}"
        yield Try(f"look {place} of {len(kinds)}", 75 in codes, problem or resume_to_reference(root, folder, RUN, processes))
    return f"{len(kinds)} places in a run; {between} stops between inner steps"


def stops_of_two(times: int, root: Path) -> Tries:
    """The same, to one of two processes.

    As for one process.
    """
    return stops(times, root, 2)


@each_try
def lost_launchers(number: int, folder: Path, root: Path) -> Try:
    """SIGKILL to the launcher of two processes.

    Both save a checkpoint and end; final weights are bitwise those of an undisturbed run.
    """
    launcher = os.fork()
    if launcher == 0:
        workers = start(folder, RUN, 2)
        (folder / "workers.txt").write_text(" ".join(str(worker.pid) for worker in workers))
        for worker in workers:
            worker.wait()
        os._exit(0)
    assert wait_until(lambda: valid_checkpoints(folder))
    pids = (folder / "workers.txt").read_text().split()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    problem = None
    if not wait_until(lambda: not any(map(is_alive, pids))):
        problem = f"processes {list(filter(is_alive, pids))} are still alive"
    elif status(folder)["status"] != "preempted":
        problem = f"status {status(folder)}"
    return Try(f"number {number}", True, problem or resume_to_reference(root, folder, RUN, 2))


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
