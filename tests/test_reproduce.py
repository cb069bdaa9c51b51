"""The scripts that reproduce published results, on the bundled models and on logs made by hand."""

import argparse
import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from opd.data.rewards import number
from opd.runs.reader import open_run

SUMS = Path(__file__).resolve().parent.parent / "scripts/reproduce/smollm2_sums"


def run_sums(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TINY": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SUMS, work, *words], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sums() -> ModuleType:
    sys.path.insert(0, str(SUMS.parent))  # as Python does for a script
    loader = SourceFileLoader("smollm2_sums", str(SUMS))
    spec = spec_from_loader("smollm2_sums", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def leave_run(folder: Path, after: list[int], seconds: float, status: str = "done") -> None:
    """Leave the logs of a run: rewards of each question from 0, the teacher's all 1."""
    folder.mkdir(parents=True)
    evaluations = [("student", 0, [0] * len(after), 2.0), ("teacher", 0, [1] * len(after), None), ("student", 2, after, 0.5)]
    lines = [
        {"model": model, "step": step, "kl": kl, "rewards": {"mean": sum(each) / len(each), "low": 0.0, "high": 1.0, "each": each}}
        for model, step, each, kl in evaluations
    ]
    steps = [{"step": step, "time/step": seconds, "time/score": 6.0, "tokens": 8, "memory/peak_bytes": 2**30} for step in (1, 2)]
    for name, content in (("evaluations", lines), ("metrics", steps)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    (folder / "run.json").write_text(json.dumps({"config": {"seed": 0}, "content": {}}))
    (folder / "status.json").write_text(json.dumps({"status": status}))
    if status == "done":
        (folder / "summary.json").write_text("{}")


def row_of(printed: str, arm: str) -> list[str]:
    return next([cell.strip() for cell in line.split("|")[2:-1]] for line in printed.splitlines() if line.startswith(f"| {arm} |"))


def test_the_table_of_sums_has_the_figures_of_finished_runs_only(tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps({"seconds": 600, "seconds_each": 0.375}))
    for seed, right in enumerate((10, 9, 8)):
        leave_run(tmp_path / "runs" / f"0.05min-sampled-seed{seed}", [1] * right + [0] * (10 - right), 30.0)
        leave_run(tmp_path / "runs" / f"0.05min-constant-seed{seed}", [0] * 9 + [1], 30.0)
        leave_run(tmp_path / "runs" / f"0.05min-sft-seed{seed}", [1, 0] * 5, 30.0)
        leave_run(tmp_path / "runs" / f"0.05min-exact-seed{seed}", [1] * 10, 30.0, status="running" if seed == 1 else "done")
    done = run_sums(tmp_path, "--table", "--arms", "sampled", "constant", "sft", "exact", "trl")
    assert done.returncode == 1, done.stderr
    sampled = row_of(done.stdout, "sampled")
    assert sampled[0].startswith("90.0%") and sampled[1] == "100%, 90%, 80%" and sampled[2].startswith("90.0%")
    assert sampled[3:] == ["0.5000", "1.0", "2", "1.00 GiB"]
    assert row_of(done.stdout, "sft")[4] == "1.0"  # minutes: 1 of steps, less 0.2 of scoring, and 0.2 for two batches of texts
    for arm, folder in (("exact", "0.05min-exact-seed1"), ("trl", "")):
        reason, *figures = row_of(done.stdout, arm)
        assert folder in reason and not any(figures)
    assert "accounts for 80.0 of 90.0 points" in done.stdout
    assert run_sums(tmp_path, "--table", "--arms", "sampled", "constant").returncode == 0
    other_time = run_sums(tmp_path, "--table", "--minutes=1")
    assert other_time.returncode == 1 and "|" not in other_time.stdout


def test_worked_steps_end_with_the_answer(sums: ModuleType) -> None:
    assert sums.worked_steps("35 - 40 - 34") == "35 - 40 = -5, -5 - 34 = -39. The answer is -39."
    for expression in ("3 + 5 - 9 + 11", "99 + 99 + 99", "10 - 99 - 99 - 99"):
        assert number(sums.worked_steps(expression), str(eval(expression))) == 1.0


def test_no_question_of_sums_is_in_two_splits(sums: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    sums.SPLITS = {"eval": 16, "student": 100, "teacher": 100}
    sums.make_data(tmp_path / "data")
    prompts = {}
    for split, count in sums.SPLITS.items():
        rows = [json.loads(line) for line in (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines()]
        prompts[split] = {row["prompt"] for row in rows}
        assert len(prompts[split]) == count
        assert all(number(row["completion"], row["answer"]) == 1.0 for row in rows)
    assert len(set.union(*prompts.values())) == sum(sums.SPLITS.values())


def test_a_command_is_stopped_when_it_is_time_and_a_failed_one_is_named(sums: ModuleType, tmp_path: Path) -> None:
    wait = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({0})); print('up', flush=True); time.sleep(60)"
    logs = {code: tmp_path / "logs" / f"{code}.log" for code in (70, 75)}

    def wait_for_the_time(code: int) -> None:
        sums.execute([sys.executable, "-c", wait.format(code)], logs[code], lambda: logs[code].read_text() == "up\n")

    wait_for_the_time(75)
    with pytest.raises(SystemExit, match="exit code 70: up"):
        wait_for_the_time(70)
    with pytest.raises(SystemExit, match="exit code 75: gone"):  # a signal that was not ours
        sums.execute([sys.executable, "-c", "import sys; print('gone'); sys.exit(75)"], tmp_path / "other.log")


@pytest.mark.slow
@pytest.mark.long
def test_sums_makes_a_teacher_and_trains_each_arm_once(sums: ModuleType, tmp_path: Path) -> None:
    arms = [arm for arm in sums.ARMS if arm not in sums.TRL or find_spec("trl")]
    tmp_path /= "a b"
    done = run_sums(tmp_path, "--seeds", "0", "--arms", *arms)
    assert done.returncode == 0, done.stderr
    for arm in arms:
        options = argparse.Namespace(work=tmp_path)
        assert 3 <= sums.clock(options, open_run(tmp_path / "runs" / f"0.05min-{arm}-seed0"), arm) < 10, arm
    assert not list(tmp_path.glob("**/checkpoints/*"))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("**/metrics.jsonl")}
    assert len(files) == len(arms) + 1
    again = run_sums(tmp_path, "--seeds", "0", "--arms", *arms)
    assert again.stdout == done.stdout
    assert files == {file: file.stat().st_mtime_ns for file in files}
