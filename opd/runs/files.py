"""Files that are replaced at once, and lines of JSON."""

import json
import os
from pathlib import Path
from typing import Any

from opd.errors import OutputError


def write_json(file: Path, content: Any) -> None:
    """Replace `file` at once: a reader sees the old or the new content, never a part."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """As `write_json`."""
    work = file.with_name(f".{file.name}.tmp")
    work.write_text(text, encoding="utf-8")
    flush(work)
    work.replace(file)


def write_output(file: Path, text: str) -> None:
    """As `write_text`, to a place that the user named. Raises `OutputError` where it cannot be written."""
    check_output_path(file)
    try:
        write_text(file, text)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from None


def check_output_path(file: Path) -> None:
    """Raises `OutputError` where no file can be: before the work whose result is to be there."""
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


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none where there is no file. A last line that a crash cut short is left out."""
    if not file.is_file():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.split("\n") if line]
