"""Saves that are cut short, disks that are full or lose what was not flushed, and checkpoints that are damaged afterwards."""

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from fault_cases.harness import RUN, Outcome, end_alike, finish, fresh, prepare, start, status, valid
from safetensors.torch import load_file
from torch import nn

from opd.errors import OutputError
from opd.training import checkpoint
from opd.training.checkpoint import MODEL, Checkpoints, Snapshot, snapshot

Act = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]
# Every call by which a save changes the disk.
CALLS: tuple[tuple[Any, str], ...] = (
    (checkpoint, "save_file"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"),
    (os, "fsync"), (os, "unlink"), (os, "rmdir"),
)  # fmt: skip


@contextmanager
def instead(act: Act) -> Iterator[None]:
    """Within it each of `CALLS` goes through `act(name, original, arguments)`."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in CALLS]

    def replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: act(name, lambda: original(*args, **kwargs), args)

    for owner, name, original in originals:
        setattr(owner, name, replacement(name, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def taken(step: int) -> Snapshot:
    """What a checkpoint of `step` is written from; all its weights are `step`."""
    model = nn.Linear(32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    return snapshot(model, optimizer, {"step": step, "inner": 0, "round": None})


def usable(checkpoints: Checkpoints, least: int) -> str | None:
    """None when the newest checkpoint is of `least` or later, and holds what was saved then."""
    try:
        newest = checkpoints.newest()
    except OutputError as error:
        return str(error)
    if newest is None or newest.step < least:
        return f"the newest checkpoint is {newest and newest.path.name}"
    if any(not torch.all(tensor == newest.step) for tensor in load_file(newest.path / MODEL).values()):
        return f"{newest.path.name} holds other weights"
    return None


def with_two(root: Path, number: int) -> Checkpoints:
    """A folder with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(root / f"checkpoints{number}", 2, True)
    for step in (1, 2):
        checkpoints.commit(taken(step))
    return checkpoints


def operations(root: Path) -> list[str]:
    """The file operations of a save that also deletes an old checkpoint and marks the best."""
    seen: list[str] = []
    checkpoints = with_two(root, 0)
    with instead(lambda name, original, args: (seen.append(name), original())[1]):
        checkpoints.commit(taken(3), best=0.5)
    return seen


def cut_short(name: str, original: Callable[[], Any], args: tuple[Any, ...]) -> None:
    """Do half of what a call would have done: what is written is not all there."""
    if name in ("save_file", "write_text"):
        original()
        file = Path(args[1] if name == "save_file" else args[0])
        os.truncate(file, file.stat().st_size // 2)


def die_at(place: int, half: bool, save: Callable[[], Any]) -> NoReturn:
    """Save in this process, which ends by SIGKILL at the file operation `place`."""
    count = 0

    def act(name: str, original: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        if count == place + 1:
            if half:
                cut_short(name, original, args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original()

    with instead(act):
        save()
    os._exit(0)


def kills_in_save(times: int, root: Path) -> Outcome:
    """SIGKILL before, or half-way through, each file operation of a save."""
    outcome, calls = Outcome(), operations(root)
    for number in range(1, times + 1):
        place, half = number % len(calls), number // len(calls) % 2 == 1
        checkpoints = with_two(root, number)
        pid = os.fork()
        if pid == 0:
            die_at(place, half, lambda checkpoints=checkpoints: checkpoints.commit(taken(3), best=0.5))
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        problem = usable(checkpoints, 2)
        if problem is None:
            checkpoints.commit(taken(4))
            problem = usable(checkpoints, 4)
        outcome.add(f"{'half of ' if half else ''}{calls[place]} (operation {place})", killed, problem)
        shutil.rmtree(checkpoints.folder)
    outcome.note = f"{len(calls)} operations"
    return outcome


def disk_errors(times: int, root: Path) -> Outcome:
    """ENOSPC or EIO at each file operation of a save, with nothing or half of it written."""
    outcome, calls = Outcome(), operations(root)
    kinds = [(code, half) for code in (errno.ENOSPC, errno.EIO) for half in (False, True)]
    for number in range(1, times + 1):
        place = number % len(calls)
        code, half = kinds[number // len(calls) % len(kinds)]
        checkpoints, count = with_two(root, number), 0

        def act(
            name: str, original: Callable[[], Any], args: tuple[Any, ...], place: int = place, code: int = code, half: bool = half
        ) -> Any:
            nonlocal count
            count += 1
            if count == place + 1:
                if half:
                    cut_short(name, original, args)
                raise OSError(code, os.strerror(code))
            return original()

        with instead(act):
            checkpoints.save(taken(3), best=0.5)  # the first failure in a row: nothing is raised
        fired = count > place
        problem = usable(checkpoints, 2)
        if problem is None:
            checkpoints.save(taken(4))
            problem = usable(checkpoints, 4) or (None if checkpoints.failures == 0 else "failures are still counted")
        outcome.add(f"{os.strerror(code)} at {calls[place]} (operation {place})", fired, problem)
        shutil.rmtree(checkpoints.folder)
    outcome.note = f"{len(calls)} operations × {len(kinds)}"
    return outcome


def full_disks(times: int, root: Path) -> Outcome:
    """A run on a disk that is full for a while, and for good. A real file system of a few MiB, where this process may mount one."""
    outcome, real = Outcome(), 0
    for number in range(times):
        folder, for_good = fresh(root, "full"), number % 2 == 1
        small = folder / "runs"
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(small)], capture_output=True).returncode == 0
        real += mounted
        try:
            [child] = start(folder, RUN, 1, fill(small / "filler", mounted, for_good))
            ended = child.wait()
            fired = "could not be written" in ended.text
            problem = None
            if for_good and (ended.code != 74 or status(folder).get("exit_code") not in (74, None) or not valid(folder)):
                problem = f"exit code {ended.code}, {valid(folder)}: {ended.text.strip()[-300:]}"
            if not for_good and ended.code != 0:
                problem = f"exit code {ended.code}: {ended.text.strip()[-300:]}"
            (small / "filler").unlink(missing_ok=True)
            outcome.add("full for good" if for_good else "full for a while", fired, problem or end_alike(root, folder))
        finally:
            if mounted:
                subprocess.run(["umount", str(small)], check=True)
    outcome.note = f"{real} of them on a real full file system; weights bitwise equal"
    return outcome


def fill(filler: Path, mounted: bool, for_good: bool) -> Callable[[], None]:
    """Fill the disk before the third save, and make room again after the second failure, or not."""

    def sabotage() -> None:
        original = Checkpoints.save
        saves = 0

        def save(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
            nonlocal saves
            saves += 1
            if saves == 3:
                if mounted:
                    with filler.open("wb", buffering=0) as file:
                        try:
                            while True:
                                file.write(bytes(65536))
                        except OSError:
                            pass
                else:
                    shutil.disk_usage = lambda path: (1, 1, 0)  # type: ignore[assignment]
                    checkpoint.shutil.disk_usage = lambda path: type("Usage", (), {"free": 0})()  # type: ignore[attr-defined]
            if saves == 5 and not for_good:
                if mounted:
                    filler.unlink()
                else:
                    checkpoint.shutil.disk_usage = lambda path: type("Usage", (), {"free": 2**40})()  # type: ignore[attr-defined]
            original(self, *args, **kwargs)

        Checkpoints.save = save  # type: ignore[method-assign]

    return sabotage


def corruptions(times: int, root: Path) -> Outcome:
    """A bit, the end, or the whole of a random file of the newest checkpoint is damaged or gone."""
    outcome, draw = Outcome(), random.Random(3)
    base = prepare(root / "base")
    assert finish(base, [*RUN, "train.max_steps=3", "checkpoint.keep_last=3"]) is None
    source = base / "runs/run/checkpoints"
    for number in range(times):
        folder = root / "damaged"
        shutil.copytree(source, folder)
        checkpoints = Checkpoints(folder, 2, True)
        newest, before = (checkpoints.path(*moment) for moment in reversed(checkpoints.moments()[-2:]))
        file = draw.choice(sorted(newest.iterdir()))
        content = file.read_bytes()
        kind = draw.choice(("flip", "flip", "flip", "cut", "gone", "empty", "longer"))
        damage(file, content, kind, draw)
        fired = not file.exists() or file.read_bytes() != content
        problem = None
        try:
            found = checkpoints.newest()
            if found is None or found.path != before:
                problem = f"{kind} in {file.name}: {found and found.path.name} was taken"
            elif not (folder / f"bad_{newest.name}").is_dir():
                problem = f"{kind} in {file.name}: the bad one was not set aside"
        except OutputError as error:
            problem = str(error)
        outcome.add(f"corruption {number}", fired, problem)
        shutil.rmtree(folder)
    return outcome


def damage(file: Path, content: bytes, kind: str, draw: random.Random) -> None:
    if kind == "gone":
        file.unlink()
    elif kind == "flip":
        place = draw.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    else:
        file.write_bytes({"cut": content[: draw.randrange(len(content))], "empty": b"", "longer": content + b"\0"}[kind])


def all_bad(times: int, root: Path) -> Outcome:
    """All checkpoints are damaged: the run ends with 74, deletes nothing, and does not begin anew."""
    outcome = Outcome()
    for number in range(times):
        folder = fresh(root, "all-bad")
        assert finish(folder, [*RUN, "train.max_steps=3"]) is None
        (folder / "runs/run/status.json").write_text('{"status": "failed"}')
        files = sorted((folder / "runs/run/checkpoints").glob("step_*/model.safetensors"))
        for file in files:
            os.truncate(file, 100)
        [child] = start(folder, [*RUN, "train.max_steps=3"], 1)
        ended = child.wait()
        kept = len(list((folder / "runs/run/checkpoints").glob("bad_*/model.safetensors")))
        right = ended.code == 74 and kept == len(files)
        outcome.add(f"all bad {number}", not valid(folder), None if right else f"exit code {ended.code}, {kept} of {len(files)} kept")
    return outcome


class PowerCut:
    """What would be on the disk after a power cut: file contents as they were last flushed, and of the names in a folder either those
    of its last flush, or those of now. An inode is held open while it is known, so that its number is not given to another file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.held: dict[int, int] = {}
        for path in (root, *root.rglob("*")):
            self.flushed(path)

    def flushed(self, path: Path) -> None:
        number = self.hold(path)
        if path.is_dir():
            self.names[number] = self.entries(path)
        else:
            self.contents[number] = path.read_bytes()

    def hold(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number

    def entries(self, folder: Path) -> dict[str, tuple[int, bool]]:
        return {path.name: (self.hold(path), path.is_dir()) for path in folder.iterdir()}

    def look(self) -> None:
        for path in self.root.rglob("*"):
            self.hold(path)

    def after(self, target: Path, eager: bool) -> None:
        """Write what would be found. eager: names as of now."""
        shutil.rmtree(target, ignore_errors=True)
        self._write(self.root.stat().st_ino, target, self.root if eager else None)

    def _write(self, number: int, target: Path, source: Path | None) -> None:
        target.mkdir()
        names = self.entries(source) if source is not None else self.names.get(number, {})
        for name, (inner, is_folder) in names.items():
            if is_folder:
                self._write(inner, target / name, None if source is None else source / name)
            else:
                (target / name).write_bytes(self.contents.get(inner, b""))

    def close(self) -> None:
        for descriptor in self.held.values():
            os.close(descriptor)


def power_cuts(times: int, root: Path) -> Outcome:
    """The power fails after each file operation of saves that keep a single checkpoint."""
    outcome = Outcome()
    for number in range(times):
        folder = root / f"power{number}"
        checkpoints = Checkpoints(folder, 1, True)
        checkpoints.commit(taken(1))
        disk, cuts = PowerCut(folder), 0

        def act(name: str, original: Callable[[], Any], args: tuple[Any, ...], disk: PowerCut = disk) -> Any:
            nonlocal cuts
            path = Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else None
            result = original()
            disk.look()
            if path is not None:
                disk.flushed(path)
            cuts += 1
            for eager in (False, True):
                check(disk, eager, 1, f"cut {cuts} ({name})")
            return result

        def check(disk: PowerCut, eager: bool, least: int, what: str) -> None:
            calm(lambda: disk.after(root / "found", eager))
            outcome.add(what, True, calm(lambda: usable(Checkpoints(root / "found", 1, True), least)))

        for step in (2, 3):
            with instead(act):
                checkpoints.commit(taken(step), best=0.1 * step)
            for eager in (False, True):
                check(disk, eager, step, f"after the save of step {step}")
        disk.close()
    return outcome


def calm(work: Callable[[], Any]) -> Any:
    """`work` with the file operations as they are."""
    replaced = [(owner, name, getattr(owner, name)) for owner, name in CALLS]
    for owner, name, _ in replaced:
        setattr(owner, name, ORIGINAL[name])
    try:
        return work()
    finally:
        for owner, name, function in replaced:
            setattr(owner, name, function)


ORIGINAL = {name: getattr(owner, name) for owner, name in CALLS}
