"""A few of each of the faults that `scripts/faults` makes, and that its cases fail on builds with a known hole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and signals as Linux has them")]


def faults(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, ROOT / "scripts/faults", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[int, int, int]]:
    """(tried, fired, survived) of each case."""
    cells = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    return {row[0].removeprefix("| "): (int(row[1]), int(row[2]), int(row[3])) for row in cells}


def test_every_fault_fires_and_is_survived():
    done = faults()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows(done)) > 15
    assert all(tried > 0 and tried == fired == survived for tried, fired, survived in rows(done).values())


def test_builds_with_a_hole_are_found_out():
    done = faults("--holes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| yes |") == 5
