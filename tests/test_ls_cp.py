"""`opd ls` tells what there is without torch; `opd cp` copies what is shipped, over nothing and to nowhere else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opd import errors
from opd.cli import catalogue
from opd.cli import main as cli
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


def test_every_shipped_choice_and_every_run_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "first", "done")
    make_run(tmp_path / "sweeps" / "lr" / "lr=1", "failed")
    assert cli.main(["ls", "--json"]) == errors.OK
    listed = json.loads(capsys.readouterr().out)
    for kind, groups in (("models", ("model", "teacher")), ("data", ("data",)), ("experiments", ("experiment",))):
        files = [file for group in groups for file in sorted((conf_dir() / group).glob("*.yaml"))]
        assert [(row["group"], row["name"]) for row in listed[kind]] == [(file.parent.name, file.stem) for file in files]
        assert all(row["about"] for row in listed[kind])
    assert [(row["path"], row["status"], row["steps"], row["of"]) for row in listed["runs"]] == [
        ("runs/first", "done", 2, 9),
        ("sweeps/lr/lr=1", "failed", 2, 9),
    ]
    assert listed["runs"][0]["reward_after"] == 0.75 and listed["runs"][1]["reward_after"] is None
    assert cli.main(["ls"]) == errors.OK
    shown = capsys.readouterr().out
    assert "experiment=tiny" in shown and "runs/first" in shown and "2/9" in shown and "50.0%" in shown


def test_one_kind_or_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", "models", "--json"]) == errors.OK
    assert set(json.loads(capsys.readouterr().out)) == {"models"}
    assert cli.main(["ls", "runs"]) == errors.OK
    assert "none in runs/ and sweeps/ here" in capsys.readouterr().out
    make_run(tmp_path / "elsewhere" / "one", "preempted")
    assert cli.main(["ls", "elsewhere", "--json"]) == errors.OK
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["preempted"]
    assert cli.main(["ls", "nowhere"]) == errors.DATA
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["ls"], ["cp", "experiment/tiny"]])
def test_neither_imports_torch(words: list[str], tmp_path: Path) -> None:
    code = f"import sys; from opd import cli; assert cli.main({words!r}) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "datasets", "accelerate"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", ["experiment/tiny", "optim/adamw", "model/qwen05b", "adamw"])
def test_a_copy_is_used_by_config_dir_as_the_output_says(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cp", name]) == errors.OK
    shown = capsys.readouterr().out
    place, _, command = shown.strip().partition(": change it, then: ")
    copied = tmp_path / place
    assert copied.read_text() == catalogue.find_file(name).read_text()
    copied.write_text(copied.read_text() + ("seed: 7\n" if "experiment" in place else ""))
    words = command.split()[1:]
    assert cli.main([*words, "--cfg", "job"]) == errors.OK
    composed = capsys.readouterr().out
    assert ("seed: 7" in composed) == ("experiment" in place)


def test_the_copy_has_a_name_that_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cp", "optim/adamw", "--name", "slow", "--to", "mine here"]) == errors.OK
    assert "opd train --config-dir 'mine here' optim=slow" in capsys.readouterr().out
    file = tmp_path / "mine here" / "optim" / "slow.yaml"
    file.write_text(file.read_text().replace("lr: 1e-5", "lr: 0.25").replace("lr: 1.0e-5", "lr: 0.25"))
    assert cli.main(["train", "--config-dir", "mine here", "optim=slow", "--cfg", "job"]) == errors.OK
    assert "lr: 0.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["experiment/nothing"], 64, "there are experiment/debug"),
        (["wat"], 64, "opd ls lists them"),
        (["gsm8k"], 64, "there are data/gsm8k, eval/gsm8k; say which"),
        (["../pyproject"], 64, "no such shipped file"),
        (["/etc/passwd"], 64, "no such shipped file"),
        (["hydra/help/opd"], 64, "no such shipped file"),
        (["config"], 64, "copy an experiment"),
        (["optim/adamw", "--name", "../x"], 64, "letters, digits"),
        (["optim/adamw", "--name", "adamw"], 64, "would win over yours"),
        ([], 64, "opd cp --help"),
    ],
)
def test_what_is_not_copied(words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cp", *words]) == code
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_no_link_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "conf" / "optim").mkdir(parents=True)
    own = tmp_path / "conf" / "optim" / "my_adamw.yaml"
    own.write_text("mine")
    assert cli.main(["cp", "optim/adamw"]) == errors.OUTPUT
    assert own.read_text() == "mine" and "nothing was overwritten" in capsys.readouterr().err
    (tmp_path / "outside").mkdir()
    (tmp_path / "conf" / "model").symlink_to(tmp_path / "outside")
    assert cli.main(["cp", "model/tiny"]) == errors.OUTPUT
    assert list((tmp_path / "outside").iterdir()) == []
