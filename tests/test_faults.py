"""A few tries of each fault case in tests/faults, and builds with a known hole, on which a case has to fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and signals as Linux has them")


def faults(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, ROOT / "scripts/faults", *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@linux_only
def test_every_fault_fires_and_is_survived() -> None:
    done = faults()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    from faults.main import list_cases

    listed = [line.strip("| ").split(" | ") for line in list_cases().splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(row[0], row[2]) for row in listed], "as many tries as README.md says"
    assert all(tried == fired == survived for _, tried, fired, survived, *_ in rows)


@pytest.mark.long
@pytest.mark.slow
@linux_only
def test_builds_with_a_known_hole_are_found() -> None:
    done = faults("--holes")
    assert done.returncode == 0, done.stdout + done.stderr
    from faults.holes import HOLES

    assert done.stdout.count("| yes |") == len(HOLES)


@linux_only
def test_readme_lists_the_cases() -> None:
    from faults.main import list_cases

    assert f"\n{list_cases()}\n" in (ROOT / "tests/faults/README.md").read_text()
