"""`launch.processes`: one command starts several processes, stops them, and ends with the run's own exit code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from opd import errors
from opd.api import OnPolicyDistillationTrainer, from_options
from opd.cli import launch, launched, launcher
from opd.config.schema import Device
from opd.models import fsdp2, zero
from opd.models.accelerator import make_accelerator
from opd.training.identity import differences

TWO = ["experiment=debug", "device=cpu", "name=run", "launch.processes=2", "train.batch_size=2", "eval.limit=4", "eval.kl_prompts=2"]


def begin(folder: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-m", "opd", "train", *TWO, *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(running: "subprocess.Popen[str]", text: str) -> None:
    assert running.stdout is not None
    assert any(text in line for line in running.stdout), running.communicate()[1]


def read(file: Path) -> dict[str, object]:
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_sweep_launches_each_member_once_under_its_own_overrides(tmp_path):
    running = begin(tmp_path, "-m", "train.max_steps=1", "teacher.system='a, b=c'", "hydra.sweep.subdir='${hydra.job.num}=x'")
    told, complaints = running.communicate(timeout=300)
    assert running.returncode == 0, complaints
    assert told.count("2 prompts × 2 processes × 2 completions = 8 rollouts") == 1
    (member,) = (tmp_path / "sweeps" / "run").glob("*=x")
    assert "launch.processes=2" in (member / ".hydra" / "overrides.yaml").read_text()
    assert "teacher.system='a, b=c'" in (member / ".hydra" / "overrides.yaml").read_text()
    assert read(member / "run.json")["config"]["teacher"]["system"] == "a, b=c"
    assert read(member / "summary.json")["steps"] == 1


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_error_and_its_exit_code(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os, opd\n\n@opd.reward\ndef one(completion, answer):\n"
        "    if os.environ['RANK'] == '1':\n        raise ValueError('not me')\n    return 1.0\n"
    )
    _, complaints = (running := begin(tmp_path, "eval.reward=own:one")).communicate(timeout=300)
    assert running.returncode == errors.DATA
    assert "[rank 1] error: reward `own:one` failed on an answer: ValueError: not me" in complaints
    assert "opd: error: another process of the run ended" in complaints
    assert not any(word in complaints for word in ("Traceback", "ChildFailedError", "torch.distributed", "Root Cause"))


@pytest.mark.slow
def test_a_ctrl_c_stops_all_processes_once_and_the_death_of_the_parent_leaves_none(tmp_path):
    running = begin(tmp_path, "train.max_steps=100000", "optim.schedule=constant")
    wait_for(running, "step 1/")
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does, to whatever runs in it: a second one would end them at once
    assert (running.communicate(timeout=300), running.returncode)[1] == errors.PREEMPTED
    status = read(tmp_path / "runs" / "run" / "status.json")
    assert (status["status"], status["exit_code"]) == ("preempted", errors.PREEMPTED)
    running = begin(tmp_path, "train.max_steps=100000", "optim.schedule=constant")
    wait_for(running, "going on after step")
    running.kill()
    running.communicate(timeout=300)  # until no process holds the other ends of the pipes
    assert read(tmp_path / "runs" / "run" / "status.json")["status"] == "preempted"


FILES = Path(__file__).resolve().parent.parent / "scripts" / "accelerate"


@pytest.mark.parametrize(
    ("name", "strategy", "machines", "processes"),
    [
        ("cpu2", "multi_gpu", 1, 2),
        ("fsdp2_cpu2", "use_fsdp", 1, 2),
        ("gpu1", None, 1, 1),
        ("gpu2", "multi_gpu", 1, 2),
        ("gpu8", "multi_gpu", 1, 8),
        ("fsdp2_gpu8", "use_fsdp", 1, 8),
        ("zero2_cpu2", "use_deepspeed", 1, 2),
        ("zero3_cpu2", "use_deepspeed", 1, 2),
        ("zero2_gpu8", "use_deepspeed", 1, 8),
        ("zero3_gpu8", "use_deepspeed", 1, 8),
        ("nodes2_gpu8", "multi_gpu", 2, 16),
    ],
)
def test_accelerate_reads_the_shipped_files_as_they_are_meant(name, strategy, machines, processes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--config_file", str(FILES / f"{name}.yaml"), "-m", "opd.train"]
    found, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert [kind for kind in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(found, kind)] == ([strategy] if strategy else [])
    assert (found.num_machines, found.num_processes, found.use_cpu) == (machines, processes, "cpu" in name)
    if strategy == "use_fsdp":
        assert (found.fsdp_version, found.fsdp_cpu_ram_efficient_loading) == (2, False)
    if strategy == "use_deepspeed":
        monkeypatch.setattr(zero, "is_installed", lambda: True)
        assert found.zero_stage == int(name[4]) and found.offload_optimizer_device == "none"
    assert launcher.free_port(FILES / f"{name}.yaml") == ([] if machines > 1 else ["--main_process_port", "0"])


def test_every_shipped_file_is_read_here():
    assert sorted(path.stem for path in FILES.iterdir()) == sorted(
        ["cpu2", "fsdp2_cpu2", "gpu1", "gpu2", "gpu8", "fsdp2_gpu8", "nodes2_gpu8", "zero2_cpu2", "zero2_gpu8", "zero3_cpu2", "zero3_gpu8"]
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 1 is not supported"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true is not supported"),
    ],
)
def test_what_fsdp_is_asked_for_and_does_not_work_is_refused(environment, said, monkeypatch):
    for name, value in {**environment, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}.items():
        monkeypatch.setenv(name, value)
    assert said in (fsdp2.check_settings(FullyShardedDataParallelPlugin()) or "")


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zero, "is_installed", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(errors.ConfigError, match=r"pip install 'opd\[deepspeed\]'"):
        make_accelerator(from_options({"device": "cpu"}), tmp_path)
    monkeypatch.setattr("opd.signals.die_with_parent", lambda number: None)
    assert launcher.main(["", "cpu", str(FILES / "zero3_cpu2.yaml"), "-m", "opd.train"]) == errors.USAGE
    assert "zero3_cpu2.yaml: distributed_type: DEEPSPEED needs the package deepspeed" in capsys.readouterr().err


def ended(*codes: int | None) -> list[launched.Process]:
    return [launched.Process(number, 1000 + number, code) for number, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("returned", "processes", "asked", "code"),
    [
        (0, ended(0, 0), [], errors.OK),
        (1, ended(errors.DATA, errors.INTERNAL, errors.PREEMPTED), [], errors.DATA),  # the first is the reason
        (1, ended(errors.PREEMPTED, errors.OUTPUT), [], errors.OUTPUT),  # one that was told to stop is not
        (1, ended(errors.PREEMPTED, None), [], errors.INTERNAL),  # killed
        (1, ended(errors.PREEMPTED, errors.PREEMPTED), [], errors.PREEMPTED),  # a scheduler asked them
        (1, ended(errors.PREEMPTED, errors.PREEMPTED), [signal.SIGINT], errors.PREEMPTED),  # they saved what there was
        (1, ended(None, None), [signal.SIGTERM], errors.PREEMPTED),  # too early for a word
        (1, ended(None, errors.INTERRUPTED), [signal.SIGINT], errors.INTERRUPTED),
        (-15, [], [signal.SIGTERM], errors.PREEMPTED),
        (errors.USAGE, [], [], errors.USAGE),  # the launcher could not begin, and said why
        (1, [], [], errors.INTERNAL),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed_first(returned, processes, asked, code):
    assert launch.outcome(returned, processes, asked) == code


def test_processes_tell_their_ids_and_codes(tmp_path, monkeypatch):
    monkeypatch.setenv(launched.FOLDER, str(tmp_path))
    for number in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", number)
        launched.begin()
    launched.end(errors.DATA)
    assert {(process.number, process.pid, process.code) for process in launched.processes(tmp_path)} == {
        (0, os.getpid(), errors.DATA),
        (1, os.getpid(), None),
    }


def test_a_process_that_a_launcher_started_launches_none(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launch.wanted(from_options({"launch.processes": 2}))
    assert launch.wanted(from_options({"launch.config_file": "x.yaml"}))
    assert not launch.wanted(from_options({"launch.processes": 1}))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not launch.wanted(from_options({"launch.processes": 2}))


def test_how_processes_are_started_is_no_part_of_what_a_run_is():
    assert differences({"launch": {"processes": 2}}, {"launch": {"processes": None}}) == []


def test_mistakes_are_refused_in_a_line(tmp_path, capsys, monkeypatch):
    with pytest.raises(errors.ConfigError, match=r"launch\.processes=0: must be at least 1"):
        from_options({"launch.processes": 0})
    with pytest.raises(errors.ConfigError, match="there is no such file"):
        launch.run(from_options({"launch.config_file": str(tmp_path / "none.yaml")}), tmp_path)
    with pytest.raises(errors.ConfigError, match="accelerate launch YOUR_SCRIPT"):
        OnPolicyDistillationTrainer("bundled:tiny-student", "bundled:tiny-teacher", [], options={"launch.processes": 2})
    with pytest.raises(errors.ConfigError, match=r"launch\.processes=9: torch sees \d GPUs here"):
        launcher.own_file(9, Device.cuda, tmp_path)
    (tmp_path / "bad.yaml").write_text("num_processes: 2\n")
    monkeypatch.setattr("opd.signals.die_with_parent", lambda number: None)
    assert launcher.main(["", "cpu", str(tmp_path / "bad.yaml"), "-m", "opd.train"]) == errors.USAGE
    assert "`distributed_type` must be specified" in capsys.readouterr().err
