"""Runs that are killed or asked to stop, at any moment, by one process of one or two, and go on by themselves."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fault_cases.harness import RUN, Outcome, Sabotage, end_alike, fresh, start, status, valid

KILLS_A_RUN = 8
LONGER = (*RUN, "train.max_steps=24")  # eight epochs
FEW = 10  # tries, for which a short run is enough


def random_kills(times: int, root: Path) -> Outcome:
    """SIGKILL at random moments, up to eight times a run; the same command again, without a hand on anything, until the run is done."""
    outcome, draw = Outcome(), random.Random(1)
    words = LONGER if times > FEW else RUN
    in_save, runs, began_over = 0, 0, 0
    while outcome.tried < times:
        folder, kills, runs, length = fresh(root, "kills"), 0, runs + 1, measured(root, words)
        while kills < min(KILLS_A_RUN, times - outcome.tried):
            [child] = start(folder, words, 1)
            time.sleep(draw.uniform(0, length))
            child.kill(signal.SIGKILL)
            if child.wait().code != -signal.SIGKILL:
                break
            kills += 1
            in_save += any((folder / "runs/run/checkpoints").glob("tmp_*"))
            began_over += not valid(folder)
        problem = end_alike(root, folder, words)
        for _ in range(kills):
            outcome.add(f"run {runs}", True, problem)
    outcome.note = f"{runs} runs, {in_save} kills inside a save, {began_over} before the first; final weights bitwise equal"
    return outcome


def measured(root: Path, words: Sequence[str]) -> float:
    """Seconds that an undisturbed run takes now."""
    folder, began = fresh(root, "measured"), time.monotonic()
    assert end_alike(root, folder, words) is None
    return time.monotonic() - began


def random_terms(times: int, root: Path) -> Outcome:
    """SIGTERM, SIGINT or SIGUSR1 at random moments, while loading and while saving too; then on to the end."""
    outcome, draw, codes = Outcome(), random.Random(2), dict[int, int]()
    words = LONGER if times > FEW else RUN
    runs, tried_then = 0, 0
    while outcome.tried < times:
        folder, runs, tried_then, length = fresh(root, "terms"), runs + 1, outcome.tried, measured(root, words)
        while outcome.tried < min(times, tried_then + KILLS_A_RUN):
            before = valid(folder)
            number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
            [child] = start(folder, words, 1)
            time.sleep(draw.uniform(0.02, length))
            child.kill(number)
            ended = child.wait()
            if ended.code == 0:
                break  # it was about to end: no try
            codes[ended.code] = codes.get(ended.code, 0) + 1
            problem = None
            if ended.code not in (75, -number, 130):
                problem = f"exit code {ended.code}: {ended.text.strip()[-300:]}"
            elif ended.code == 75 and status(folder)["status"] != "preempted":
                problem = f"status {status(folder)}"
            elif ended.code != 75 and valid(folder) != before:
                problem = f"checkpoints were {before}, are {valid(folder)}"
            elif before and not valid(folder):
                problem = "no checkpoint is left"
            outcome.add(f"{signal.Signals(number).name} in run {runs}", True, problem)
        problem = end_alike(root, folder, words)
        if problem is not None:
            outcome.failures.append(f"run {runs}: {problem}")
            outcome.survived -= 1
    early = sum(count for code, count in codes.items() if code != 75)
    outcome.note = f"{runs} runs; {codes.get(75, 0)} left with 75, {early} were ended before the run had begun; weights bitwise equal"
    return outcome


def on_each_look(act: Callable[[str], None]) -> None:
    """Calls `act` whenever the run looks for signals: "check" between decode steps, "inner" after scoring and between inner steps."""
    from opd import signals
    from opd.training import loop as trainer

    def told(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any) -> Any:
            act(kind)
            return original(*args)

        return look

    signals.check = told("check", signals.check)
    trainer.stop_all_processes = told("inner", trainer.stop_all_processes)


def at_look(place: int, number: int = signal.SIGTERM) -> Sabotage:
    """Lets a run ask itself to stop at its `place`-th look for signals."""

    def sabotage() -> None:
        seen = 0

        def count(kind: str) -> None:
            nonlocal seen
            seen += 1
            if seen == place:
                os.kill(os.getpid(), number)

        on_each_look(count)

    return sabotage


def looks(root: Path, processes: int) -> list[str]:
    """The kinds of all looks for signals of an undisturbed run."""
    folder = fresh(root, f"looks{processes}")

    def sabotage() -> None:
        def write(kind: str) -> None:
            with (folder / "looks.txt").open("a") as file:
                file.write(f"{kind}\n")

        on_each_look(write)

    assert all(child.wait().code == 0 for child in start(folder, RUN, processes, sabotage))
    return (folder / "looks.txt").read_text().split()


def stops(times: int, root: Path, processes: int) -> Outcome:
    """Each try stops a new run at one of the places where a run can stop, and again soon after, and lets it go on to the end."""
    outcome, between = Outcome(), 0
    kinds = looks(root, processes)
    inner = [place for place, kind in enumerate(kinds, 1) if kind == "inner"]
    others = [place for place, kind in enumerate(kinds, 1) if kind != "inner"]
    each = max(1, times // 2)
    # Those before a second inner step first: there the rollouts are what has to be saved.
    places = [
        (inner[1::2] + inner[::2], others)[number % 2][number // 2 * (len(inner), len(others))[number % 2] // each]
        for number in range(times)
    ]
    if times > len(kinds):
        places = list(range(1, len(kinds) + 1))
    if times == 1:
        places = [inner[3]]
    for place in places:
        folder = fresh(root, f"stops{processes}")
        first = [child.wait() for child in start(folder, RUN, processes, at_look(place))]
        between += any(name.count("_") == 2 for name in valid(folder))
        second = [child.wait() for child in start(folder, RUN, processes, at_look(1 + place % 12))]
        codes = {ended.code for ended in (*first, *second)}
        last = place > len(kinds) - 12  # the second stop may then come too late
        right = codes == {75} or (last and codes == {0, 75})
        problem = None if right else f"exit codes {codes}: {first[-1].text.strip()[-300:]} {second[-1].text.strip()[-300:]}"
        outcome.add(f"look {place} of {len(kinds)}", 75 in codes, problem or end_alike(root, folder, RUN, processes))
    outcome.note = f"{len(kinds)} places in a run; {between} between inner steps, with the rollouts saved; final weights bitwise equal"
    return outcome


def stops_of_one(times: int, root: Path) -> Outcome:
    return stops(times, root, 1)


def stops_of_two(times: int, root: Path) -> Outcome:
    """The signal reaches one of two processes."""
    return stops(times, root, 2)


def lost_launchers(times: int, root: Path) -> Outcome:
    """A launcher of two processes is killed; they leave, with a checkpoint."""
    outcome = Outcome()
    for number in range(times):
        folder = fresh(root, "launcher")
        launcher = os.fork()
        if launcher == 0:
            workers = start(folder, RUN, 2)
            (folder / "workers.txt").write_text(" ".join(str(worker.pid) for worker in workers))
            for worker in workers:
                worker.wait()
            os._exit(0)
        while not valid(folder):
            time.sleep(0.02)
        pids = [int(word) for word in (folder / "workers.txt").read_text().split()]
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        left = await_end(pids)
        problem = f"processes {left} live on" if left else None
        if problem is None and status(folder)["status"] != "preempted":
            problem = f"status {status(folder)}"
        outcome.add(f"launcher {number}", True, problem or end_alike(root, folder, RUN, 2))
    return outcome


def await_end(pids: list[int], seconds: float = 60.0) -> list[int]:
    """Those of the processes, which are not our children, that are still there."""
    deadline = time.monotonic() + seconds
    left = pids
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if lives(pid)]
        time.sleep(0.02)
    return left


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
