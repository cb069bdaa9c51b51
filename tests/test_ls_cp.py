"""`opd ls` lists files and runs without torch; `opd cp` copies a shipped file, never over another one."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from opd import errors
from opd.cli.ls import find_file
from opd.cli.main import main
from opd.config.compose import conf_dir
from opd.runs.folder import write_json


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(folder: Path, status: str) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"status": status, "reason": "why", "exit_code": 0})
    write_json(folder / "run.json", {"config": {"train": {"max_steps": 9}}})
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    if status == "done":
        summary = {"reward_before": 0.5, "reward_after": 0.75, "gap_closed": 0.5, "eval_kl_after": 0.25}
        write_json(folder / "summary.json", summary)


def test_ls_lists_every_shipped_choice_and_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "first", "done")
    make_run(tmp_path / "sweeps" / "lr" / "lr=1", "failed")
    assert main(["ls", "--json"]) == errors.OK
    listed = json.loads(capsys.readouterr().out)
    for kind, groups in (("models", ("model", "teacher")), ("data", ("data",)), ("experiments", ("experiment",))):
        files = [file for group in groups for file in sorted((conf_dir() / group).glob("*.yaml"))]
        assert [(row["group"], row["name"]) for row in listed[kind]] == [(file.parent.name, file.stem) for file in files]
        assert all(row["about"] for row in listed[kind])
    assert [(row["path"], row["status"], row["steps"], row["of"]) for row in listed["runs"]] == [
        ("sweeps/lr/lr=1", "failed", 2, 9),
        ("runs/first", "done", 2, 9),
    ], "newest first"
    assert listed["runs"][1]["reward_after"] == 0.75 and listed["runs"][0]["reward_after"] is None
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row["date"]) for row in listed["runs"])
    assert main(["ls"]) == errors.OK
    shown = capsys.readouterr().out
    assert "experiment=tiny" in shown and "runs/first" in shown and "2/9" in shown and "50.0%" in shown


def test_ls_lists_one_kind_or_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "models", "--json"]) == errors.OK
    assert set(json.loads(capsys.readouterr().out)) == {"models"}
    assert main(["ls", "runs"]) == errors.OK
    assert "none in runs/ and sweeps/ here" in capsys.readouterr().out
    make_run(tmp_path / "elsewhere" / "one", "preempted")
    assert main(["ls", "elsewhere", "--json"]) == errors.OK
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["preempted"]
    assert main(["ls", "nowhere"]) == errors.DATA
    assert "nowhere" in capsys.readouterr().err


def test_ls_shows_a_run_as_killed_when_its_process_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    for name, owner in {"alive": os.getpid(), "killed": process.pid}.items():
        make_run(tmp_path / "runs" / name, "running")
        (tmp_path / "runs" / name / ".lock").write_text(f"process {owner} on {socket.gethostname()}\n")
    make_run(tmp_path / "runs" / "remote", "running")
    (tmp_path / "runs" / "remote" / ".lock").write_text(f"process {process.pid} on another-machine\n")
    make_run(tmp_path / "runs" / "stopped", "preempted")
    (tmp_path / "runs" / "stopped" / ".lock").write_text(f"process {process.pid} on {socket.gethostname()}\n")
    evaluation = {"model": "student", "step": 0, "rewards": {"mean": 0.4, "low": 0.3, "high": 0.5}, "kl": 1.0}
    (tmp_path / "runs/killed/evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    assert main(["ls", "runs", "--json"]) == errors.OK
    rows = json.loads(capsys.readouterr().out)["runs"]
    listed = {Path(row["path"]).name: row["status"] for row in rows}
    assert listed == {"alive": "running", "killed": "killed", "remote": "running", "stopped": "preempted"}
    assert {Path(row["path"]).name: row["reward_before"] for row in rows}["killed"] == 0.4
    assert main(["compare", "runs/killed", "--json"]) == errors.OK
    assert json.loads(capsys.readouterr().out)["runs"][0]["status"] == "killed"


@pytest.mark.parametrize("words", [["ls"], ["cp", "experiment/tiny"]])
def test_ls_and_cp_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    code = f"import sys; from opd.cli.main import main; assert main({words!r}) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "datasets", "accelerate"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", ["experiment/tiny", "optim/adamw", "model/qwen05b", "adamw"])
def test_cp_prints_a_command_that_uses_the_copy(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", name]) == errors.OK
    shown = capsys.readouterr().out
    place, _, command = shown.strip().partition(": change it, then: ")
    copied = tmp_path / place
    assert copied.read_text() == (conf_dir() / f"{find_file(name)}.yaml").read_text()
    copied.write_text(copied.read_text() + ("seed: 7\n" if "experiment" in place else ""))
    words = command.split()[1:]
    assert main([*words, "--cfg", "job"]) == errors.OK
    composed = capsys.readouterr().out
    assert ("seed: 7" in composed) == ("experiment" in place)


def test_cp_name_and_to_make_a_choice_of_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", "optim/adamw", "--name", "slow", "--to", "mine here"]) == errors.OK
    assert "opd train --config-dir 'mine here' optim=slow" in capsys.readouterr().out
    file = tmp_path / "mine here" / "optim" / "slow.yaml"
    file.write_text(file.read_text().replace("lr: null", "lr: 0.25"))
    assert main(["train", "--config-dir", "mine here", "optim=slow", "--cfg", "job"]) == errors.OK
    assert "lr: 0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "remedy"),
    [
        (["experiment/nothing"], 64, "choose from experiment/debug"),
        (["wat"], 64, "opd ls lists them"),
        (["gsm8k"], 64, "choose from data/gsm8k, eval/gsm8k"),
        (["../pyproject"], 64, "no such shipped file"),
        (["/etc/passwd"], 64, "no such shipped file"),
        (["hydra/help/opd"], 64, "no such shipped file"),
        (["config"], 64, "no such shipped file"),
        (["optim/adamw", "--name", "../x"], 64, "letters, digits"),
        (["optim/adamw", "--name", "adamw"], 64, "another name"),
        ([], 64, "opd cp --help"),
    ],
)
def test_cp_refuses_unknown_files_and_names_in_one_line(
    words: list[str], code: int, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cp", *words]) == code
    shown = capsys.readouterr()
    assert remedy in shown.err and shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_cp_overwrites_nothing_and_follows_no_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conf" / "optim").mkdir(parents=True)
    own = tmp_path / "conf" / "optim" / "my_adamw.yaml"
    own.write_text("mine")
    assert main(["cp", "optim/adamw"]) == errors.OUTPUT
    assert own.read_text() == "mine" and "nothing was overwritten" in capsys.readouterr().err
    (tmp_path / "outside").mkdir()
    (tmp_path / "conf" / "model").symlink_to(tmp_path / "outside")
    assert main(["cp", "model/tiny"]) == errors.OUTPUT
    assert list((tmp_path / "outside").iterdir()) == []
