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
    new_folder,
    reference,
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
    return random_moments(times, root, [signal.SIGKILL])


def random_signals(times: int, root: Path) -> Tries:
    """SIGTERM, SIGINT or SIGUSR1 at random moments, up to eight times a run.

    The run ends with 75 and a checkpoint, or had not begun and leaves the last checkpoint untouched; final weights are bitwise those of an
    undisturbed run.
    """
    return random_moments(times, root, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])


def random_moments(times: int, root: Path, signals: Sequence[signal.Signals]) -> Tries:
    draw, words = random.Random(1), LONG_RUN if times > 10 else RUN
    seconds = reference(words).seconds
    done, runs, saved, in_save = 0, 0, 0, 0
    while done < times:
        folder, runs, tries = new_folder(root, "run"), runs + 1, list[Try]()
        while len(tries) < min(FAULTS_PER_RUN, times - done):
            before, number = valid_checkpoints(folder), draw.choice(signals)
            [child] = start(folder, words)
            time.sleep(draw.uniform(0.02, seconds))
            child.kill(number)
            ended = child.wait()
            if ended.code == 0:
                break  # the signal came too late
            after = valid_checkpoints(folder)
            problem = ended.unless(-number) if number == signal.SIGKILL else ended.unless(75, 130, -number)
            if before and not after:
                problem = problem or "no checkpoint is left"
            if ended.code == 75 and status(folder)["status"] != "preempted":
                problem = f"status {status(folder)}"
            if number != signal.SIGKILL and ended.code != 75 and after != before:
                problem = problem or f"checkpoints were {before}, are {after}"
            saved += ended.code == 75
            in_save += any((folder / "runs/run/checkpoints").glob("tmp_*"))
            tries.append(Try(f"{number.name} in run {runs}", True, problem))
        at_end = resume_to_reference(folder, words)
        done += len(tries)
        yield from (attempt._replace(problem=attempt.problem or at_end) for attempt in tries)
    return f"{runs} runs, {in_save} ended inside a save, {saved} with 75"


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
        yield Try(f"look {place} of {len(kinds)}", 75 in codes, problem or resume_to_reference(folder, RUN, processes))
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
    return Try(f"number {number}", True, problem or resume_to_reference(folder, RUN, 2))


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
