"""The script for a GPU machine runs on a CPU with small shapes, so that no minute is lost there to a mistake in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/bench/gpu"


@pytest.mark.slow
@pytest.mark.long
def test_script_for_a_gpu_machine_measures_and_makes_its_tables(tmp_path):
    environment = {**os.environ, "TINY": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, SCRIPT, tmp_path, "facts", "decode", "step", "kernels", "profile", "trl"]
    subprocess.run(words, check=True, env=environment, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    assert {line["of"] for line in lines if line["part"] == "took"} == set(words[3:])
    done = subprocess.run([sys.executable, SCRIPT, "--table", tmp_path / "results.jsonl"], check=True, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| student", "| 7B", "| sampled", "| exact"))]
    assert len(rows) == 8 and all(cell.strip() for row in rows[:4] for cell in row.strip("| ").split("|"))
