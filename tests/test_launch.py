"""`launch.processes`: one command starts several processes, stops them, and ends with the run's own exit code."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from opd import errors, signals
from opd.api import OnPolicyDistillationTrainer, from_options
from opd.cli import launch
from opd.config.options import Device, LaunchConfig
from opd.errors import ConfigError
from opd.models import accelerator
from opd.training.identity import differences

TWO = ["experiment=debug", "device=cpu", "name=run", "launch.processes=2", "train.batch_size=2", "eval.limit=4", "eval.kl_prompts=2"]
LONG = ["train.max_steps=100000", "optim.schedule=constant"]


def begin(folder: Path, *words: str, terminal: int | None = None) -> "subprocess.Popen[str]":
    """Start a run in a session of its own, on a terminal or on pipes. A `sitecustomize.py` in `folder` is run by each of its processes."""
    path = f"{folder}{os.pathsep}{Path(__file__).resolve().parent.parent}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "opd", "train", *TWO, *words]
    output = subprocess.PIPE if terminal is None else terminal
    claim = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    if terminal is not None:
        command = [sys.executable, "-c", claim, *command]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, text=True, start_new_session=True)


def wait_for_step(folder: Path, step: int = 1) -> None:
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    for _ in range(3000):
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not reach the step")


def workers(running: "subprocess.Popen[str]") -> list[psutil.Process]:
    [launcher] = psutil.Process(running.pid).children()
    return launcher.children()


def read(file: Path) -> dict[str, object]:
    return json.loads(file.read_text())


def status(folder: Path) -> tuple[object, object]:
    content = read(folder / "runs" / "run" / "status.json")
    return content["status"], content["exit_code"]


@pytest.mark.slow
def test_sweep_launches_each_member_once_with_its_own_overrides(tmp_path):
    running = begin(tmp_path, "-m", "train.max_steps=1", "teacher.system='a, b=c'", "hydra.sweep.subdir='${hydra.job.num}=x'")
    output, complaints = running.communicate(timeout=300)
    assert running.returncode == 0, complaints
    assert output.count("each step:") == output.count("× 2 processes") == 1
    assert output.count("starting 2 processes\n") == 1 and output.index("starting") < output.index("each step:")
    (member,) = (tmp_path / "sweeps" / "run").glob("*=x")
    assert "launch.processes=2" in (member / ".hydra" / "overrides.yaml").read_text()
    assert "teacher.system='a, b=c'" in (member / ".hydra" / "overrides.yaml").read_text()
    assert read(member / "run.json")["config"]["teacher"]["system"] == "a, b=c"
    assert read(member / "summary.json")["steps"] == 1


ONE_FAILS = """import os, opd

@opd.reward
def one(completion, answer):
    if os.environ['RANK'] == '1':
        raise ValueError('not me')
    return 1.0
"""


LATE_END = """import atexit, os, sys, time

def end_late():
    if "torch" in sys.modules:  # in the worker and not in the process of its reward
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # the other worker loses its peer now and ends first
        time.sleep(3)

if os.environ.get("RANK") == "1":
    atexit.register(end_late)
"""


@pytest.mark.slow
def test_exit_code_and_message_are_those_of_the_failing_worker_although_it_ends_last(tmp_path):
    (tmp_path / "own.py").write_text(ONE_FAILS)
    (tmp_path / "sitecustomize.py").write_text(LATE_END)
    running = begin(tmp_path, "eval.reward=own:one")
    complaints = running.communicate(timeout=300)[1]
    assert running.returncode == errors.DATA, complaints
    assert "[rank 1] error: " in complaints and "own:one" in complaints and "ValueError: not me" in complaints
    assert not any(word in complaints for word in ("Traceback", "ChildFailedError", "torch.distributed", "Root Cause"))


def press_ctrl_c(running: "subprocess.Popen[str]") -> None:
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does; a second SIGINT would interrupt a worker at once


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(press_ctrl_c, id="ctrl-c"),
        pytest.param(lambda running: running.send_signal(signal.SIGUSR1), id="sigusr1", marks=pytest.mark.long),  # forwarded likewise
    ],
)
def test_signal_to_the_parent_stops_all_workers_with_a_checkpoint(stop: Callable[["subprocess.Popen[str]"], None], tmp_path):
    running = begin(tmp_path, *LONG)
    wait_for_step(tmp_path)
    stop(running)
    complaints = running.communicate(timeout=300)[1]
    assert running.returncode == errors.PREEMPTED, complaints
    assert status(tmp_path) == ("preempted", errors.PREEMPTED)
    assert complaints.count("stopped by") == 1 and list((tmp_path / "runs" / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_closed_terminal_stops_a_run_like_sigterm(processes: int, tmp_path):
    keyboard, terminal = pty.openpty()
    running = begin(tmp_path, *LONG, f"launch.processes={processes}", terminal=terminal)
    os.close(terminal)
    reader = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(keyboard, 4096), b"")], daemon=True)
    reader.start()
    wait_for_step(tmp_path)
    os.dup2(os.open(os.devnull, os.O_RDONLY), keyboard)  # closes the terminal: the kernel sends SIGHUP, and writing fails with EIO
    assert running.wait(timeout=300) == errors.PREEMPTED
    assert status(tmp_path) == ("preempted", errors.PREEMPTED)


@pytest.mark.long  # tests/faults kills a launcher too
@pytest.mark.slow
def test_sigkill_of_the_parent_leaves_no_orphans_and_a_checkpoint(tmp_path):
    running = begin(tmp_path, *LONG)
    wait_for_step(tmp_path)
    processes = workers(running)
    assert len(processes) == 2
    running.kill()
    running.communicate(timeout=300)  # until no process has the other ends of the pipes
    psutil.wait_procs(processes, timeout=60)
    assert not any(process.is_running() for process in processes)
    assert status(tmp_path) == ("preempted", errors.PREEMPTED)


@pytest.mark.long
@pytest.mark.slow
def test_killed_worker_is_named(tmp_path):
    running = begin(tmp_path, *LONG)
    wait_for_step(tmp_path)
    next(worker for worker in workers(running) if worker.environ()["RANK"] == "1").kill()
    complaints = running.communicate(timeout=300)[1]
    assert running.returncode == errors.INTERNAL
    assert "process 1 of the run was killed by SIGKILL" in complaints


FILES = Path(__file__).resolve().parent.parent / "scripts" / "accelerate"


SHIPPED = {
    "cpu2": ("multi_gpu", 1, 2),
    "fsdp2_cpu2": ("use_fsdp", 1, 2),
    "gpu1": (None, 1, 1),
    "gpu2": ("multi_gpu", 1, 2),
    "gpu8": ("multi_gpu", 1, 8),
    "fsdp2_gpu8": ("use_fsdp", 1, 8),
    "nodes2_gpu8": ("multi_gpu", 2, 16),
}


def test_every_shipped_config_file_is_tested():
    assert {file.stem for file in FILES.glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize(("name", "strategy", "machines", "processes"), [(name, *expected) for name, expected in SHIPPED.items()])
def test_accelerate_understands_the_shipped_config_files(name, strategy, machines, processes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = str(FILES / f"{name}.yaml")
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "-m", "opd.train"]))
    assert [kind for kind in ("multi_gpu", "use_fsdp") if getattr(parsed, kind)] == ([strategy] if strategy else [])
    assert (parsed.num_machines, parsed.num_processes, parsed.use_cpu) == (machines, processes, "cpu" in name)
    if strategy == "use_fsdp":
        assert (parsed.fsdp_version, parsed.fsdp_cpu_ram_efficient_loading) == (2, False)
    options = LaunchConfig(config_file=file)
    arguments = launch.launch_arguments(options, launch.read_config_file(options), "")
    assert arguments == ["--config_file", file, *([] if machines > 1 else ["--main_process_port", "0"])]


@pytest.mark.parametrize(
    ("failures", "code", "killed"),
    [
        ({0: errors.DATA, 1: errors.INTERNAL, 2: errors.PREEMPTED}, errors.DATA, None),
        ({1: errors.INTERNAL, 0: errors.DATA}, errors.DATA, None),  # 70 is what a worker ends with when it loses a peer
        ({0: errors.PREEMPTED, 1: errors.OUTPUT}, errors.OUTPUT, None),
        ({0: errors.PREEMPTED, 1: errors.INTERNAL}, errors.INTERNAL, None),
        ({0: errors.PREEMPTED, 1: errors.PREEMPTED}, errors.PREEMPTED, None),
        ({0: errors.PREEMPTED, 1: errors.INTERRUPTED}, errors.INTERRUPTED, None),
        ({0: -signal.SIGTERM, 1: -signal.SIGHUP}, errors.PREEMPTED, None),  # asked to stop before they could save
        ({0: -signal.SIGINT}, errors.INTERRUPTED, None),
        ({1: -signal.SIGKILL, 0: errors.INTERNAL}, errors.INTERNAL, "process 1 of the run was killed by SIGKILL, perhaps"),
        ({0: -signal.SIGSEGV}, errors.INTERNAL, "process 0 of the run was killed by SIGSEGV\n"),
        ({0: errors.INTERNAL, 1: -signal.SIGKILL}, errors.INTERNAL, None),  # torch elastic kills a worker that does not stop
        ({0: errors.PREEMPTED, 2: -signal.SIGKILL}, errors.INTERNAL, "process 2"),
        ({0: 1}, errors.INTERNAL, None),  # no exit code of ours
        *(({0: code}, code, None) for code in (errors.USAGE, errors.DATA, errors.OUTPUT, errors.ENGINE, errors.NUMERIC)),
    ],
)
def test_exit_code_of_a_run_is_that_of_the_worker_that_failed_first(failures, code, killed, capsys):
    assert launch.exit_code(failures) == code
    complaint = capsys.readouterr().err
    assert complaint == "" if killed is None else killed in complaint


def test_worker_does_not_launch_others(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert launch.is_requested(from_options({"launch.processes": 2}))
    assert launch.is_requested(from_options({"launch.config_file": "x.yaml"}))
    assert not launch.is_requested(from_options({"launch.processes": 1}))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not launch.is_requested(from_options({"launch.processes": 2}))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3"}, (0, 1)),
        ({"RANK": "abc", "WORLD_SIZE": "abc", "LOCAL_RANK": "0"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2)),
    ],
)
def test_rank_is_a_launchers_where_its_variables_agree(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert signals.launched_as() == expected


def test_variables_of_an_earlier_launcher_are_named_in_one_line(monkeypatch, tmp_path, capsys):
    config, exits = from_options({"device": "cpu"}), []
    monkeypatch.setattr(accelerator, "PATIENCE", 0.05)
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for outcome in (ValueError("no\nMASTER_ADDR"), TimeoutError(), SimpleNamespace(num_processes=1)):

        def start(outcome=outcome, **settings):
            assert settings["mixed_precision"] == "no"
            if isinstance(outcome, TimeoutError):
                time.sleep(0.5)
            if isinstance(outcome, Exception):
                raise ValueError(outcome)
            return outcome

        monkeypatch.setattr(accelerator, "Accelerator", start)
        config.launch.processes = 2
        with pytest.raises(ConfigError, match=r"^launch.*ACCELERATE_MIXED_PRECISION=bf16.*unset") as caught:
            accelerator.make_accelerator(config, tmp_path)
        assert "\n" not in str(caught.value)
    assert exits == [errors.USAGE] and capsys.readouterr().err.startswith("opd: error: launch")


def test_launch_options_are_not_part_of_a_run_identity():
    assert differences({"launch": {"processes": 2}}, {"launch": {"processes": None}}) == []


@pytest.mark.parametrize(("rank", "is_answered"), [("0", True), ("1", False)])
def test_the_first_ctrl_c_is_answered_at_once_by_the_main_process_and_the_second_ends_it(rank, is_answered, monkeypatch, capfd):
    for name, value in {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with signals.deferred():
        signal.raise_signal(signal.SIGINT)
        assert ("press Ctrl-C again to end without saving" in capfd.readouterr().err) is is_answered
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr() == ("", "")


def test_launch_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(errors.ConfigError, match=r"launch\.processes=0"):
        from_options({"launch.processes": 0})
    with pytest.raises(errors.ConfigError, match="accelerate launch YOUR_SCRIPT"):
        OnPolicyDistillationTrainer("bundled:tiny-student", "bundled:tiny-teacher", [], options={"launch.processes": 2})
    file = str(tmp_path / "accelerate.yaml")
    arguments = ["--config_file", file, "--num_processes", "9", "-m", "opd.train"]
    assert launch.launch_workers(Device.cuda, arguments) == errors.USAGE
    complaint = capsys.readouterr().err
    assert complaint == "opd: error: launch.processes=9: torch sees 0 GPUs here; use device=cpu\n"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.launch_workers(Device.cuda, arguments) == errors.USAGE
    assert "use launch.processes=2 or device=cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "scripts/accelerate/"),
        ("- a list\n", "scripts/accelerate/"),
        ("a: [\n", "scripts/accelerate/"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\n", "scripts/accelerate/fsdp2_gpu8.yaml"),
    ],
)
def test_unusable_config_file_names_one_to_use(content, remedy, tmp_path):
    file = tmp_path / "accelerate.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(errors.ConfigError) as raised:
        launch.run(from_options({"launch.config_file": str(file)}), tmp_path)
    assert f"launch.config_file={file}: " in str(raised.value) and remedy in str(raised.value) and "\n" not in str(raised.value)


def test_config_file_that_accelerate_rejects_is_one_line(tmp_path, capsys):
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 2\n")
    assert launch.launch_workers(Device.cpu, ["--config_file", str(file), "-m", "opd.train"]) == errors.USAGE
    complaint = capsys.readouterr().err
    assert f"launch.config_file={file}" in complaint and "distributed_type" in complaint and complaint.count("\n") == 1
