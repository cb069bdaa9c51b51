"""Files and folders that options name and that are not there: refused before anything is loaded or started."""

import json
from pathlib import Path

import pytest

from opd import train
from opd.config.compose import to_dict
from opd.config.schema import Config
from opd.errors import DATA, OK, USAGE

MIX = "data.mix={math: {source: jsonl, train_path: puzzles.jsnl}, sums: {source: arithmetic}}"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with data, a model and an adapter, in which no run may start."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models/small", "models/adapters"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("train.jsonl", "puzzles.jsonl"):
        (tmp_path / file).write_text("{}")
    for start in ("opd.training.runner.run", "opd.cli.launch.subprocess.Popen"):
        monkeypatch.setattr(start, lambda *_, **__: pytest.fail("the run was started"))


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["data=jsonl", "data.train_path=trian.jsonl"],
            DATA,
            "data.train_path=trian.jsonl: there is no such file (did you mean train.jsonl?)",
        ),
        (["data=jsonl", "data.train_path=train.jsonl", "data.eval_path=x"], DATA, "data.eval_path=x: there is no such file"),
        (["data=hub", "data.path=./model"], DATA, "data.path=./model: there is no such folder (did you mean models?)"),
        (["model.path=models/smal"], USAGE, "model.path=models/smal: there is no such folder (did you mean small?)"),
        (["teacher.path=./modls/small"], USAGE, "teacher.path=./modls/small: there is no such folder (did you mean models?)"),
        (["model.adapter=models/adaptres"], USAGE, "model.adapter=models/adaptres: there is no such folder (did you mean adapters?)"),
        (["teacher.adapter=nowhere"], USAGE, "teacher.adapter=nowhere: there is no such folder"),
        ([MIX], DATA, "data.mix.math.train_path=puzzles.jsnl: there is no such file (did you mean puzzles.jsonl?)"),
        (
            ["data.mix={sums: {source: arithmetic}}", "teachers={sums: {path: models/smal}}"],
            USAGE,
            "teachers.sums.path=models/smal: there is no such folder (did you mean small?)",
        ),
        (["launch.config_file=train.yaml"], USAGE, "launch.config_file=train.yaml: there is no such file (did you mean train.jsonl?)"),
    ],
)
def test_a_file_that_is_not_there_is_refused_before_anything_is_loaded_or_started(
    words: list[str], code: int, message: str, processes: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["experiment=debug", "name=run", f"launch.processes={processes}", *words]) == code
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"opd: error: {message}")
    assert not list((tmp_path / "runs").iterdir())


def test_a_finished_run_no_longer_needs_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def finish(config: Config, folder: Path) -> None:
        (folder / "run.json").write_text(json.dumps({"config": to_dict(config)}))
        (folder / "status.json").write_text('{"status": "done"}')

    (tmp_path / "gone").mkdir()
    monkeypatch.setattr("opd.training.runner.run", finish)
    words = ["experiment=debug", "model.path=./gone"]
    assert train.main([*words, "hydra.run.dir=done"]) == OK
    (tmp_path / "gone").rmdir()
    assert train.main([*words, "hydra.run.dir=done"]) == OK
    assert train.main([*words, "hydra.run.dir=new"]) == USAGE
    assert train.main([*words, "hydra.run.dir=done", "teacher.path=./other"]) == USAGE  # another run
