"""Each tracker gets the metrics of metrics.jsonl under the same names; a missing package ends the run at its start. All offline."""

import json
import os
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest

from opd.config.options import Tracker
from opd.errors import ConfigError
from opd.training.logs import check_tracker

OFFLINE = {
    "WANDB_MODE": "offline",
    "SWANLAB_MODE": "offline",
    "TRACKIO_DIR": "trackio",
    "MLFLOW_TRACKING_URI": "mlruns",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def stay_offline() -> None:
    """Let trackers write to the working folder."""
    folders = {name: str(Path(value).resolve()) for name, value in OFFLINE.items() if name.endswith(("DIR", "URI"))}
    os.environ.update(OFFLINE | folders)


def tracked_run(folder: Path, tool: str) -> set[str]:
    """Run two steps with the tracker in a process of its own and return the names of the numbers in metrics.jsonl."""
    words = ["experiment=debug", "device=cpu", "name=run", f"track={tool}", "train.max_steps=2", "eval.limit=4", "eval.kl_prompts=4"]
    forked.trained(folder, words, before=stay_offline)
    lines = [json.loads(line) for line in (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    return {name for name, value in lines[0].items() if not isinstance(value, dict)} - {"step"}


@pytest.mark.parametrize("tool", [tool for tool in Tracker if tool is not Tracker.none])
def test_a_missing_tracker_package_is_an_error_before_the_run(tool: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.training.logs.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"track\.tool={tool.value}: .*pip install 'opd\[\w+\]'"):
        check_tracker(tool)
    check_tracker(Tracker.none)


def test_every_tracker_has_its_file() -> None:
    from opd.config.compose import conf_dir

    assert {file.stem for file in (conf_dir() / "track").glob("*.yaml")} == {tool.value for tool in Tracker}


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    names = tracked_run(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (tmp_path / "runs" / "run").rglob("events.out.tfevents.*") if file.parent.name == "opd"}
    events = EventAccumulator(str(folder)).Reload()
    assert names | {"eval/reward", "eval/kl", "eval/length"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("reverse_kl")] == [1, 2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(tmp_path: Path) -> None:
    names = tracked_run(tmp_path, "wandb")
    (file,) = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()
    assert all(name.encode() in written or name.rpartition("/")[2].encode() in written for name in names)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_local(tmp_path: Path) -> None:
    names = tracked_run(tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").glob("opd*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    by_step = {step: json.loads(metrics) for step, metrics in rows if "reverse_kl" in json.loads(metrics)}
    assert set(by_step) == {1, 2} and names <= set(by_step[1])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_in_files(tmp_path: Path) -> None:
    names = tracked_run(tmp_path, "mlflow")
    stored = {
        str(file.relative_to(folder))
        for folder in (tmp_path / "mlruns").glob("*/*/metrics")
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert names | {"eval/kl"} <= stored


@pytest.mark.slow
@pytest.mark.skipif(find_spec("swanlab") is None, reason="swanlab is not installed")
def test_swanlab_offline(tmp_path: Path) -> None:
    names = tracked_run(tmp_path, "swanlab")
    files = [file for file in (tmp_path / "runs" / "run" / "swanlab").rglob("*") if file.is_file()]
    written = b"".join(file.read_bytes() for file in files)
    assert all(name.encode() in written for name in names)
