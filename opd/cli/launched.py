"""What a process that `opd.cli.launch` started leaves for the one that started it: its process id, and in the end its exit code.

Launchers tell of any failure by their own exit code 1; here the codes of `opd.errors` come through.
"""

import os
from dataclasses import dataclass
from pathlib import Path

FOLDER = "OPD_LAUNCHED"  # the environment variable that names the folder


@dataclass(frozen=True, slots=True)
class Process:
    """number: the process's place on this machine. code: None while it runs, and for one that ended without a word."""

    number: int
    pid: int
    code: int | None


def begin() -> None:
    """Say that this process is there; does nothing in one that was started otherwise."""
    write(str(os.getpid()))


def end(code: int) -> None:
    """Say how this process ended."""
    write(f"{os.getpid()} {code}")


def write(text: str) -> None:
    folder, number = os.environ.get(FOLDER), os.environ.get("LOCAL_RANK", "0")
    if folder is None or not Path(folder).is_dir():
        return
    work = Path(folder) / f".{number}"
    work.write_text(text)
    work.replace(Path(folder) / number)


def processes(folder: Path) -> list[Process]:
    """All that have begun, those that ended first at the head."""
    found = []
    for file in sorted(folder.glob("[0-9]*"), key=lambda file: file.stat().st_mtime_ns):
        pid, *code = file.read_text().split()
        found.append(Process(int(file.name), int(pid), int(code[0]) if code else None))
    return found
