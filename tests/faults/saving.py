"""Saves that are cut short, disks that are full or lose what was not flushed, and checkpoints that are damaged afterwards."""

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from faults import hooks
from faults.harness import RUN, Fault, Tries, Try, each_try, finish, new_folder, resume_to_reference, run, status, valid_checkpoints
from faults.hooks import file_operations, snapshot_of
from opd.errors import OutputError
from opd.training.checkpoint import MODEL, Checkpoints

SavesWithFault = Callable[[Checkpoints, int], bool]  # saves with a fault at a file operation; returns whether it fired


def usable(checkpoints: Checkpoints, oldest: int) -> str | None:
    """Return None if the newest checkpoint is of step `oldest` or later and holds what was saved then, else what is wrong."""
    try:
        newest = checkpoints.newest()
    except OutputError as error:
        return str(error)
    if newest is None or newest.step < oldest:
        return f"the newest checkpoint is {newest and newest.path.name}"
    if any(not torch.all(tensor == newest.step) for tensor in load_file(newest.path / MODEL).values()):
        return f"{newest.path.name} holds other weights"
    return None


def with_two(folder: Path) -> Checkpoints:
    """Return the checkpoints of a folder that has those of steps 1 and 2."""
    checkpoints = Checkpoints(folder, 2, True)
    for step in (1, 2):
        checkpoints.commit(snapshot_of(step))
    return checkpoints


def at_operation(place: int, half: bool, fault: Callable[[], None]) -> hooks.Act:
    """Call `fault` before the file operation `place` (from 0) or, with `half`, after half of its data are in the file."""
    count = 0

    def act(name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        if count == place + 1:
            if half and name in ("save_file", "write_text"):
                call()
                file = Path(args[1] if name == "save_file" else args[0])
                os.truncate(file, file.stat().st_size // 2)
            fault()
        return call()

    return act


def failing_saves(times: int, root: Path, kinds: Sequence[tuple[str, SavesWithFault]]) -> Tries:
    """Save with each kind of fault at each file operation, then check the previous checkpoint and the next save."""
    operations: list[str] = []
    first = with_two(root / "first")
    with file_operations(lambda name, call, args: (operations.append(name), call())[1]):
        first.commit(snapshot_of(3), best=0.5)
    for number in range(1, times + 1):
        place = number % len(operations)
        name, save = kinds[number // len(operations) % len(kinds)]
        checkpoints = with_two(root / f"checkpoints{number}")
        fired = save(checkpoints, place)
        problem = usable(checkpoints, 2)
        if problem is None:
            checkpoints.save(snapshot_of(4))
            problem = usable(checkpoints, 4) or (None if checkpoints.failures == 0 else "failures are still counted")
        yield Try(f"{name} at operation {place} ({operations[place]})", fired, problem)
        shutil.rmtree(checkpoints.folder)
    return f"{len(operations)} operations x {len(kinds)}"


def kills_in_save(times: int, root: Path) -> Tries:
    """SIGKILL before, or half-way through, each file operation of a save.

    The previous checkpoint is usable, and the next save works.
    """

    def killed(checkpoints: Checkpoints, place: int, half: bool) -> bool:
        pid = os.fork()
        if pid == 0:
            with file_operations(at_operation(place, half, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                checkpoints.commit(snapshot_of(3), best=0.5)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    return failing_saves(times, root, [("before", partial(killed, half=False)), ("half-way", partial(killed, half=True))])


def disk_errors(times: int, root: Path) -> Tries:
    """ENOSPC or EIO at each file operation of a save.

    Training continues, the previous checkpoint is usable, and the next save works.
    """

    def failed(checkpoints: Checkpoints, place: int, half: bool, code: int) -> bool:
        fired = False

        def fault() -> None:
            nonlocal fired
            fired = True
            raise OSError(code, os.strerror(code))

        with file_operations(at_operation(place, half, fault)):
            checkpoints.save(snapshot_of(3), best=0.5)  # raises only at the third failure in a row
        return fired

    kinds = [(errno.errorcode[code], partial(failed, half=half, code=code)) for code in (errno.ENOSPC, errno.EIO) for half in (False, True)]
    return failing_saves(times, root, kinds)


@each_try
def full_disks(number: int, folder: Path, root: Path) -> Try:
    """A full disk, in turn for a while and for good: a small tmpfs where this process may mount one.

    The run ends with 0, or for good with 74 and a usable checkpoint; resumed, final weights are bitwise those of an undisturbed run.
    """
    for_good, disk = number % 2 == 1, folder / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], capture_output=True).returncode == 0
    try:
        ended = run(folder, RUN, fill_disk(disk / "filler", mounted, for_good))
        problem = ended.unless(74 if for_good else 0)
        if for_good and (status(folder).get("exit_code") not in (74, None) or not valid_checkpoints(folder)):
            problem = problem or f"status {status(folder)}, checkpoints {valid_checkpoints(folder)}"
        (disk / "filler").unlink(missing_ok=True)
        what = f"{number}: {'for good' if for_good else 'for a while'}, {'tmpfs' if mounted else 'simulated'}"
        return Try(what, (folder / hooks.FIRED).exists(), problem or resume_to_reference(folder))
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def fill_disk(filler: Path, real: bool, for_good: bool) -> Fault:
    """Fill the disk before the third save; unless it is for good, make room again after the second failure."""
    saves = 0

    def fill() -> None:
        nonlocal saves
        saves += 1
        if saves == 3:
            hooks.FIRED.touch()
        if saves == 3 and not real:
            hooks.report_free_disk(0)
        elif saves == 3:
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(65536))
                except OSError:
                    pass
        if saves == 5 and not for_good:
            filler.unlink(missing_ok=True)
            if not real:
                hooks.report_free_disk(2**40)

    return lambda: hooks.before_saves(fill)


def corruptions(times: int, root: Path) -> Tries:
    """A file of the newest checkpoint with a flipped bit, cut, longer, empty or gone.

    It is found and set aside, and the checkpoint before it is used.
    """
    draw = random.Random(3)
    base = new_folder(root, "base")
    assert finish(base, [*RUN, "train.max_steps=3", "checkpoint.keep_last=3"]) is None
    for number in range(times):
        folder = root / "damaged"
        shutil.copytree(base / "runs/run/checkpoints", folder)
        checkpoints = Checkpoints(folder, 2, True)
        newest, before = (checkpoints.path(*moment) for moment in reversed(checkpoints.moments()[-2:]))
        file = draw.choice(sorted(newest.iterdir()))
        content = file.read_bytes()
        kind = draw.choice(("flip", "flip", "flip", "cut", "gone", "empty", "longer"))
        if kind == "gone":
            file.unlink()
        elif kind == "flip":
            place = draw.randrange(len(content))
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        else:
            file.write_bytes({"cut": content[: draw.randrange(len(content))], "empty": b"", "longer": content + b"\0"}[kind])
        fired = not file.exists() or file.read_bytes() != content
        problem = None
        try:
            found = checkpoints.newest()
            if found is None or found.path != before:
                problem = f"{found and found.path.name} was used"
            elif not (folder / f"bad_{newest.name}").is_dir():
                problem = "the bad checkpoint was not set aside"
        except OutputError as error:
            problem = str(error)
        yield Try(f"{number}: {kind} in {file.name}", fired, problem)
        shutil.rmtree(folder)
    return None


@each_try
def all_bad(number: int, folder: Path, root: Path) -> Try:
    """Every checkpoint damaged.

    The run ends with 74 and deletes nothing.
    """
    words = [*RUN, "train.max_steps=3"]
    assert finish(folder, words) is None
    (folder / "runs/run/status.json").write_text('{"status": "failed"}')
    checkpoints = folder / "runs/run/checkpoints"
    files = sorted(checkpoints.glob("step_*/model.safetensors"))
    for file in files:
        os.truncate(file, 100)
    fired = not valid_checkpoints(folder)
    problem = run(folder, words).unless(74)
    left = len(list(checkpoints.glob("bad_*/model.safetensors")))
    return Try(f"number {number}", fired, problem or (None if left == len(files) else f"{left} of {len(files)} checkpoints are left"))


class Disk:
    """What a folder would hold after a power cut.

    File contents are those of their last flush; the names in a folder are either those of its last flush or the current ones. Each inode
    is kept open, so that its number is not given to another file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.descriptors: dict[int, int] = {}
        for path in (root, *root.rglob("*")):
            self.flush(path)

    def flush(self, path: Path) -> None:
        """Note that `path` was flushed."""
        inode = self.inode(path)
        if path.is_dir():
            self.names[inode] = self.entries(path)
        else:
            self.contents[inode] = path.read_bytes()

    def inode(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self.descriptors:
            self.descriptors[inode] = os.open(path, os.O_RDONLY)
        return inode

    def entries(self, folder: Path) -> dict[str, tuple[int, bool]]:
        return {path.name: (self.inode(path), path.is_dir()) for path in folder.iterdir()}

    def keep_open(self) -> None:
        for path in self.root.rglob("*"):
            self.inode(path)

    def restore(self, target: Path, current_names: bool) -> None:
        """Write what would be left to `target`."""

        def write(inode: int, target: Path, source: Path) -> None:
            target.mkdir()
            names = self.entries(source) if current_names else self.names.get(inode, {})
            for name, (inner, is_folder) in names.items():
                if is_folder:
                    write(inner, target / name, source / name)
                else:
                    (target / name).write_bytes(self.contents.get(inner, b""))

        shutil.rmtree(target, ignore_errors=True)
        write(self.root.stat().st_ino, target, self.root)

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def power_cuts(times: int, root: Path) -> Tries:
    """A power cut after each file operation of saves that keep one checkpoint: only what was flushed is left.

    A usable checkpoint is left.
    """
    tries: list[Try] = []

    def cut(disk: Disk, what: str, oldest: int) -> None:
        for current_names in (False, True):
            disk.restore(root / "left", current_names)
            tries.append(Try(what, True, usable(Checkpoints(root / "left", 1, True), oldest)))

    while len(tries) < times:
        shutil.rmtree(root / "power", ignore_errors=True)
        checkpoints = Checkpoints(root / "power", 1, True)
        checkpoints.commit(snapshot_of(1))
        disk = Disk(checkpoints.folder)

        def act(name: str, call: Callable[[], Any], args: tuple[Any, ...], disk: Disk = disk) -> Any:
            flushed = Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else None
            result = call()
            disk.keep_open()
            if flushed is not None:
                disk.flush(flushed)
            cut(disk, f"after {name}", 1)
            return result

        for step in (2, 3):
            with file_operations(act):
                checkpoints.commit(snapshot_of(step), best=0.1 * step)
            cut(disk, f"after the save of step {step}", step)
        disk.close()
    yield from tries[:times]
    return None
