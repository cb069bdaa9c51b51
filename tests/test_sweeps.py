"""Sweeps: plan, members and their outcomes, resuming, objectives for sweepers, members in other processes (joblib, submitit)."""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from opd import errors
from opd.cli import hydra_app, sweep
from opd.config import compose
from opd.config.options import METRICS, SweepConfig
from opd.config.schema import Config
from opd.runs.outcome import objective
from opd.runs.reader import find_runs, open_run
from opd.training import runner
from opd.training.identity import differences

DEBUG = ["experiment=debug", "train.max_steps=2", "checkpoint.every=1", "eval.steps=0", "eval.limit=8", "eval.kl_prompts=2", "name=s"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opd"])
    for name in ("RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


def members(folder: str = "sweeps/s") -> dict[str, dict[str, object]]:
    """The members' files, by the names of their folders."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(Path(folder).glob(f"*/{sweep.MEMBER}"))}


def planned(*words: str, processes: int = 1) -> sweep.Sweep:
    return sweep.plan(hydra_app.parse(["-m", *words]), processes)


def succeed(config: Config, folder: Path) -> float:
    return 1.0


# Titles, table and outcomes


def test_a_sweep_whose_members_all_got_worse_does_not_choose_one(capfd: pytest.CaptureFixture[str]) -> None:
    def task(config: Config, folder: Path) -> float | None:
        warnings = ["reward 50.0% → 0.0%: worse than before training; …"] if config.seed < 2 else []
        (folder / "summary.json").write_text(json.dumps({"warnings": warnings, "reward_after": 0.25}))
        return 0.25

    assert hydra_app.run_verb(task, ["-m", "seed=0,1", "name=s"]) == errors.OK
    shown = capfd.readouterr().out
    assert "best: seed=0 (highest reward; 1 more with the same)" in shown and "none is to be chosen" in shown
    assert hydra_app.run_verb(task, ["-m", "seed=1,2", "name=other"]) == errors.OK
    assert "none is to be chosen" not in capfd.readouterr().out


def test_sweep_prints_a_title_per_member_and_a_table_of_outcomes(capfd: pytest.CaptureFixture[str]) -> None:
    def task(config: Config, folder: Path) -> float | None:
        if config.seed == 1:
            raise errors.DataError("no data:\n none")
        return None if config.seed == 2 else float(config.seed)

    assert hydra_app.run_verb(task, ["-m", "seed=0,1,2,3", "optim.lr=0.1", "name=s"]) == errors.DATA
    shown = capfd.readouterr()
    lines = shown.out.splitlines()
    assert [line for line in lines if line.startswith("member")] == [f"member {number} of 4: seed={number - 1}" for number in (1, 2, 3, 4)]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.startswith(" seed=")}
    assert rows == {
        "seed=0": "│ done │ 0 │",
        "seed=1": "│ failed │ – │ no data: none",
        "seed=2": "│ done │ – │ no objective was measured",
        "seed=3": "│ done │ 3 │",
    }
    assert "best: seed=3 (highest objective)" in shown.out
    assert "3 of 4 done" in shown.out and "the same command resumes" in shown.out
    assert shown.err == "opd: error: no data: none\n"


def test_complete_sweep_does_not_offer_to_resume(capfd: pytest.CaptureFixture[str]) -> None:
    assert hydra_app.run_verb(succeed, ["-m", "seed=0,1"]) == errors.OK
    assert "resumes" not in capfd.readouterr().out


def test_preempted_sweep_offers_to_resume(capfd: pytest.CaptureFixture[str]) -> None:
    def task(config: Config, folder: Path) -> float:
        if config.seed == 0:
            raise errors.DataError("no data")
        raise errors.Preempted("stopped by SIGTERM")

    assert hydra_app.run_verb(task, ["-m", "seed=0,1,2", "name=s"]) == errors.PREEMPTED, "also after a failure"
    shown = capfd.readouterr().out
    assert "0 of 3 done, 1 not begun;" in shown and "the same command resumes" in shown and "member 3" not in shown
    assert [member["status"] for member in members().values()] == ["failed", "preempted"]


def test_signal_between_members_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    titled = sweep.title

    def title(*arguments: object) -> str:
        if arguments[1].number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return titled(*arguments)

    monkeypatch.setattr(sweep, "title", title)
    before = signal.getsignal(signal.SIGTERM)
    assert hydra_app.run_verb(succeed, ["-m", "seed=0,1,2"]) == errors.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    shown = capfd.readouterr()
    assert shown.err == "opd: stopped by SIGTERM\n"
    assert "1 of 3 done" in shown.out and "the same command resumes" in shown.out


def test_exit_code_of_a_preempted_member_wins_over_that_of_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [sweep.Member("", number, [], exit_code=code) for number, code in enumerate((0, errors.DATA, errors.PREEMPTED), 1)]
    monkeypatch.setattr(sweep, "read_members", lambda plan, known: stored)
    assert hydra_app.run_verb(succeed, ["-m", "seed=0,1,2"]) == errors.PREEMPTED
    stored.pop()
    assert hydra_app.run_verb(succeed, ["-m", "seed=0,1,2"]) == errors.DATA


def test_member_that_fails_early_is_a_failed_run_but_an_earlier_run_keeps_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert hydra_app.run_verb(succeed, ["-m", "optim.lr=-1", "name=s"]) == errors.USAGE
    [run] = find_runs([Path("sweeps/s")])
    assert run.status == "failed" and "must be above 0" in run.reason and run.exit_code == errors.USAGE

    done = Path("sweeps/s/name=s,seed=5/status.json")
    done.parent.mkdir()
    done.write_text('{"status": "done", "reason": "", "exit_code": 0}')

    def refuses(config: Config, folder: Path) -> float:
        raise errors.ConfigError("another run")

    assert hydra_app.run_verb(refuses, ["-m", "seed=5", "name=s"]) == errors.USAGE
    assert open_run(done.parent).status == "done"
    assert "another run" in capfd.readouterr().out


def test_members_of_an_earlier_call_are_not_counted(capfd: pytest.CaptureFixture[str]) -> None:
    for seeds in ("0,1,2", "1,7"):
        assert hydra_app.run_verb(succeed, ["-m", f"seed={seeds}", "name=s"]) == errors.OK
    assert "2 of 2 done" in capfd.readouterr().out.rpartition("member 1")[2]


def test_the_name_of_the_metric_is_that_of_this_calls_members() -> None:
    plans = [sweep.Sweep(Path("sweeps/s"), 1, frozenset(["seed"]), SweepConfig()) for _ in range(2)]
    for number, (plan, measured) in enumerate(zip(plans, ("reward_after", "eval_kl_after"), strict=True), 1):
        folder = Path(f"sweeps/s/{number}")
        folder.mkdir(parents=True)
        sweep.write_member(folder, sweep.Member(plan.key, number, []))
        (folder / "summary.json").write_text(json.dumps({measured: 0.5}))
    assert [sweep.name_metric(plan) for plan in plans] == ["reward", "-KL"]


def test_member_without_an_outcome_has_failed() -> None:
    plan = sweep.Sweep(Path("sweeps/s"), 2, frozenset(["seed"]), SweepConfig())
    Path("sweeps/s/a").mkdir(parents=True)
    sweep.write_member(Path("sweeps/s/a"), sweep.Member(plan.key, 1, ["seed=0"]))
    [member] = sweep.read_members(plan, [])
    assert (member.status, member.exit_code, member.reason) == ("failed", errors.INTERNAL, sweep.NO_OUTCOME)


# The plan


@pytest.mark.parametrize(
    ("words", "count", "swept"),
    [
        (["seed=0,1,2", "optim.lr=1,2", "name=s"], 6, {"seed", "optim.lr"}),
        (["seed=range(0,4)"], 4, {"seed"}),
        (["model=glob(qwen3_*)"], 3, {"model"}),
        (["--config-dir=own", "experiment=mine"], 2, {"seed"}),
        (["seed=0"], 1, set()),
        (["seed=0,1", "hydra.sweeper.max_batch_size=1"], 2, {"seed"}),
    ],
)
def test_plan_knows_the_number_of_members_and_the_swept_options(words: list[str], count: int, swept: set[str]) -> None:
    Path("own/experiment").mkdir(parents=True)
    Path("own/experiment/mine.yaml").write_text("# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 0,1\n")
    compose.register()
    plan = planned(*words)
    assert (plan.members, plan.swept) == (count, swept)
    seen = []
    if count <= 2:
        assert hydra_app.run_verb(lambda config, folder: seen.append(folder), ["-m", *words]) == errors.OK
        assert len(seen) == count


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["sweep.metric=reward"], "reward_after, reward_teacher, gap_closed"),
        (["sweep.metric=seed"], "reward_after, reward_teacher, gap_closed"),
        (["sweep.direction=minimize"], "sweep.metric decides it"),
        (["hydra/sweeper=optuna"], "opd[optuna]"),
        (["hydra/launcher=joblib"], "opd[joblib]"),
        (["hydra/launcher=submitit_slurm"], "opd[submitit]"),
    ],
)
def test_impossible_sweep_is_refused_before_its_first_member(
    words: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    assert hydra_app.run_verb(succeed, ["-m", "seed=0,1", *words]) == errors.USAGE
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and remedy in shown.err
    assert not Path("sweeps").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=1e-4,0.0001,2e-4", "optim.lr: 0.0001 is given more than once; give optim.lr=0.0001,0.0002"),
        ("model=tiny,qwen05b,tiny,qwen05b", "model: tiny, qwen05b are given more than once; give model=tiny,qwen05b"),
    ],
)
def test_a_value_that_is_given_twice_is_refused(word: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert hydra_app.run_verb(succeed, ["-m", "seed=0,1", word]) == errors.USAGE
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == f"opd: error: {message}\n"
    assert not Path("sweeps").exists()


def test_a_sweep_with_a_bad_member_leaves_no_folder_but_keeps_an_earlier_one() -> None:
    assert hydra_app.run_verb(succeed, ["-m", "name=s", "optim.lr=1e-4,abc"]) == errors.USAGE
    assert not Path("sweeps/s").exists()
    assert hydra_app.run_verb(succeed, ["-m", "name=s", "optim.lr=1e-4,2e-4"]) == errors.OK
    assert hydra_app.run_verb(succeed, ["-m", "name=s", "optim.lr=1e-4,abc"]) == errors.USAGE
    assert len(members()) == 2 and Path("sweeps/s/multirun.yaml").is_file()


def test_metric_that_is_not_measured_is_refused() -> None:
    for metric, off in (("gap_closed", {"reward": None}), ("eval_kl_after", {"kl_prompts": 0})):
        part = {"sweep": {"metric": metric}, "eval": off}
        with pytest.raises(errors.ConfigError, match="is not measured with eval"):
            OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), part))


def test_launched_processes_may_use_the_basic_sweeper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compose.register()
    monkeypatch.setattr(sweep, "find_spec", lambda name: object())
    assert planned("seed=0,1", processes=2).members == 2
    with pytest.raises(errors.ConfigError, match="opd train -m"):
        planned("seed=0,1", "hydra/launcher=joblib", processes=2)


# The objective


@pytest.mark.parametrize(
    ("metric", "reward", "kl", "expected"),
    [
        ("auto", 0.5, 2.0, 0.5),
        ("auto", 0.0, 2.0, 0.0),
        ("auto", None, 2.0, -2.0),
        ("auto", None, None, None),
        ("eval_kl_after", 0.5, 2.0, 2.0),
        ("eval_kl_after", 0.5, None, None),
    ],
)
def test_objective_comes_from_the_summary(metric: str, reward: float | None, kl: float | None, expected: float | None) -> None:
    assert objective(SweepConfig(metric=metric), {"reward_after": reward, "eval_kl_after": kl}) == expected


@pytest.mark.parametrize(("metric", "best"), [("reward_after", 3), ("eval_kl_after", 2)])
def test_best_member_has_an_objective(metric: str, best: int) -> None:
    config = SweepConfig(metric=metric)
    values = [None, 1.0, 5.0, 5.0]
    ended = [sweep.Member("", number, [], objective=value) for number, value in enumerate(values, 1)]
    winner = sweep.best_member(config, ended)
    assert winner is not None and winner.number == best
    assert sweep.best_member(config, ended[:1]) is None


def test_sweep_metric_changes_neither_the_run_nor_its_folder() -> None:
    stored = {"sweep": {"metric": "auto", "direction": "maximize"}, "seed": 0}
    assert not differences(stored, {"sweep": {"metric": "gap_closed"}, "seed": 0})
    assert not differences({"seed": 0}, stored), "nor in a run from before these options existed"
    seen = []
    for more in ([], ["sweep.metric=gap_closed"]):
        assert hydra_app.run_verb(lambda config, folder: seen.append(folder.name), ["-m", "seed=1", *more]) == errors.OK
    assert seen == 2 * ["seed=1"]


# Real members

KILLED = """
import os, signal, sys
from opd.cli import hydra_app
from opd.training import runner
from opd.runs.folder import METRICS, RunFolder

append = RunFolder.append

def append_or_die(self, name, line):
    if "seed=1" in self.path.name and name == METRICS and line["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, name, line)

RunFolder.append = append_or_die
sys.exit(hydra_app.run_verb(runner.run, sys.argv[1:]))
"""


def test_a_members_folder_is_named_by_the_options_in_which_members_differ() -> None:
    words = ["-m", "name=s", "train.max_steps=2", "optim.lr=1e-4,2e-4", "model=tiny,qwen05b"]
    assert hydra_app.run_verb(succeed, words) == errors.OK
    assert set(members()) == {f"model={model},optim.lr={lr}" for model in ("tiny", "qwen05b") for lr in ("0.0001", "0.0002")}
    assert hydra_app.run_verb(succeed, ["-m", "name=one", "seed=3"]) == errors.OK
    assert list(members("sweeps/one")) == ["name=one,seed=3"]


@pytest.mark.slow
def test_killed_sweep_skips_finished_members_and_resumes_the_killed_one(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-m", *DEBUG, "seed=0,1"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folders = {seed: Path(f"sweeps/s/seed={seed}") for seed in (0, 1)}
    assert open_run(folders[0]).status == "done" and open_run(folders[1]).status == "killed"
    before = (folders[0] / "summary.json").stat().st_mtime_ns
    capfd.readouterr()

    assert hydra_app.run_verb(runner.run, words) == errors.OK
    first, second = capfd.readouterr().out.partition("sweep\n")[0].split("\nmember ")
    assert "nothing to do" in first and "step 2/2" not in first
    assert "resuming after step 1" in second and "step 2/2" in second and "step 1/2" not in second
    assert (folders[0] / "summary.json").stat().st_mtime_ns == before
    assert [member["status"] for member in members().values()] == 2 * ["done"]
    summaries = [run.summary for run in find_runs([Path("sweeps/s")])]
    assert [member["objective"] for member in members().values()] == [summary["reward_after"] for summary in summaries if summary]
    assert all(
        {key for key, value in summary.items() if not isinstance(value, list | dict | str | bool)} == set(METRICS)
        for summary in summaries
        if summary
    ), "sweep.metric knows every number of a summary"


def installed(plugin: str) -> Callable[..., object]:
    there = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{plugin}")
    return pytest.mark.skipif(not there, reason=f"needs the extra {sweep.EXTRAS[plugin]}")


def opd(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "opd", "train", "-m", *words], capture_output=True, text=True, timeout=180)


@pytest.mark.slow
@installed("hydra_optuna_sweeper")
@pytest.mark.long
def test_optuna_minimizes_the_metric_and_ignores_failed_members() -> None:
    options = ["sweep.metric=eval_kl_after"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "optim.lr=interval(-1.2e-3,0.8e-3)", *options]
    first = opd(*DEBUG, *search)
    assert first.returncode == errors.USAGE, first.stderr
    stored = list(members().values())
    values = {word: member["objective"] for member in stored for word in member["overrides"] if word.startswith("optim.lr=")}
    assert {member["status"] for member in stored} == {"done", "failed"}
    assert all((float(word.partition("=")[2]) <= 0) == (value is None) for word, value in values.items())
    found = OmegaConf.load("sweeps/s/optimization_results.yaml")
    assert found.best_value == min(value for value in values.values() if value is not None)
    assert values[f"optim.lr={found.best_params['optim.lr']}"] == found.best_value
    assert "Traceback" not in first.stderr

    again = opd(*DEBUG, *search)
    assert again.stdout.count("nothing to do") == sum(value is not None for value in values.values())
    assert len(members()) == len(stored), "the same command proposes the same members"


@installed("hydra_optuna_sweeper")
def test_optuna_with_failed_members_only_ends_with_their_exit_code() -> None:
    failed = opd(
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra/sweeper/sampler=random", "optim.lr=interval(-2.0,-1.0)", "name=s"
    )
    assert failed.returncode == errors.USAGE
    assert failed.stdout.count("│ failed") == 2 and "Traceback" not in failed.stderr


DIES = """
import os, signal, sys
from opd.cli import hydra_app

def task(config, folder):
    if config.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0

if __name__ == "__main__":
    sys.exit(hydra_app.run_verb(task, sys.argv[1:]))
"""


@installed("hydra_joblib_launcher")
def test_member_whose_process_dies_is_one_line() -> None:
    Path("dies.py").write_text(DIES)
    words = ["-m", "seed=0,1", "name=s", "hydra/launcher=joblib"]
    died = subprocess.run([sys.executable, "dies.py", *words], capture_output=True, text=True, timeout=120)
    assert died.returncode == errors.INTERNAL
    assert died.stderr.count("opd: ") == 1 and "joblib ended the sweep: A worker process" in died.stderr and "Traceback" not in died.stderr
    assert "seed=1 │ failed" in died.stdout and "left no outcome" in died.stdout


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=[installed("hydra_joblib_launcher"), pytest.mark.long]),
        pytest.param("submitit_local", marks=installed("hydra_submitit_launcher")),
    ],
)
@pytest.mark.slow
def test_members_in_other_processes_store_their_outcome(launcher: str) -> None:
    done = opd(*DEBUG, f"hydra/launcher={launcher}", "model=tiny", "optim.lr=1e-4,-1")
    assert done.returncode == errors.USAGE, done.stderr
    good, bad = sorted(members().values(), key=lambda member: str(member["status"]))
    assert (good["status"], bad["status"], bad["exit_code"]) == ("done", "failed", errors.USAGE)
    assert isinstance(good["objective"], float)
    assert "must be above 0" in done.stdout and "1 of 2 done" in done.stdout and "step 1/2" not in done.stdout
    [screen] = [file for file in Path("sweeps/s").glob(f"*/{sweep.SCREEN}") if "step 1/2" in file.read_text()]
    assert open_run(screen.parent).status == "done"
    assert sorted(run.status for run in find_runs([Path("sweeps/s")])) == ["done", "failed"]
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(("handler", "exits"), [(lambda *_: sys.exit(-1), True), (lambda *_: 1 // 0, False), (signal.SIG_DFL, False)])
def test_member_at_its_time_limit_is_left_to_submitit(handler: object, exits: bool) -> None:
    """Submitit's handler exits after queueing the member again, and raises if it refuses; without submitit nothing happens."""
    before = signal.signal(signal.SIGUSR2, handler)  # type: ignore[arg-type]
    try:
        with pytest.raises(SystemExit) if exits else contextlib.nullcontext():
            hydra_app.requeue()
    finally:
        signal.signal(signal.SIGUSR2, before)


def cluster() -> bool:
    """Whether a SLURM cluster with accounting, which submitit needs, takes jobs here."""
    return shutil.which("sbatch") is not None and subprocess.run(["sacct"], capture_output=True, timeout=60).returncode == 0


on_slurm = pytest.mark.skipif(not cluster(), reason="needs sbatch and sacct of a SLURM cluster that shares this folder")
JOBS = ("hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1")


@pytest.mark.slow
@on_slurm
@installed("hydra_submitit_launcher")
def test_slurm_jobs_store_their_outcome() -> None:
    done = opd(*DEBUG, *JOBS, "model=tiny", "optim.lr=1e-4,-1")
    assert done.returncode == errors.USAGE, done.stderr
    assert "must be above 0" in done.stdout and "1 of 2 done" in done.stdout
    assert sorted(str(member["status"]) for member in members().values()) == ["done", "failed"]


@pytest.mark.slow
@on_slurm
@installed("hydra_submitit_launcher")
@pytest.mark.parametrize(("number", "code"), [("TERM", errors.PREEMPTED), ("USR2", errors.OK)])
def test_slurm_job_saves_when_cancelled_and_is_queued_again_at_its_time_limit(number: str, code: int) -> None:
    """SIGUSR2 tells a job that its time is up; submitit believes it of one that has less than ten minutes."""
    words = [*DEBUG, *JOBS, "seed=1", "hydra.launcher.timeout_min=5", "train.max_steps=60", "checkpoint.every=1000"]
    command = [sys.executable, "-m", "opd", "train", "-m", *words, "hydra.launcher.max_num_timeout=1"]
    sweeping = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1000):
        metrics = list(Path("sweeps/s").glob("*/metrics.jsonl"))
        if metrics and '"step": 2,' in metrics[0].read_text():
            break
        time.sleep(0.1)
    [job] = {path.name.partition("_")[0] for path in Path("sweeps/s/.submitit").iterdir() if path.is_dir()}
    subprocess.run(["scancel", *(["-s", "USR2"] if number == "USR2" else []), job], timeout=60, check=True)
    output, complaints = sweeping.communicate(timeout=400)  # SLURM lets a job that is queued again wait for two minutes
    assert sweeping.returncode == code, complaints
    assert code == errors.OK or "stopped by SIGTERM" in output
    assert opd(*words).returncode == errors.OK
    screen = metrics[0].with_name(sweep.SCREEN).read_text()
    assert open_run(metrics[0].parent).status == "done" and ("resuming after step" in screen or "nothing to do" in screen)
    assert len((metrics[0].parent / "metrics.jsonl").read_text().splitlines()) == 60
