"""The room on the disk: what a run takes is what its files have, the doctor and the run compare it with what is free."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from test_checkpoint import make_snapshot

from opd import errors
from opd.cli import main as cli
from opd.doctor import machine
from opd.doctor.findings import Status
from opd.training import disk
from opd.training.checkpoint import Checkpoints
from opd.training.disk import Disk, disk_of

RUN = ["experiment=debug", "device=cpu", "name=run", "train.max_steps=2", "eval.limit=4", "eval.kl_prompts=0", "checkpoint.every=1"]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_estimate_is_what_a_run_leaves_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Disk] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "disk_of", lambda trainer: found.append(disk_of(trainer)) or found[-1])
    assert cli.main(["train", *RUN]) == errors.OK
    [estimate], run = found, tmp_path / "runs/run"
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    assert len(checkpoints) == estimate.kept == 2  # the best one is the last but one, or the last
    for measured, estimated in ((size(checkpoints[0]), estimate.checkpoint), (size(run / "final"), estimate.model)):
        assert 0 <= estimated - measured <= 2 * 2**20  # room for the small files
    assert estimate.most == 2


def test_members_leave_what_is_kept_and_the_last_one_needs_its_most() -> None:
    found = Disk(checkpoint=10, model=3, most=4, kept=3)
    assert found.total() == 40 and found.total(3) == 2 * 33 + 40
    assert Disk(10, 3, most=2, kept=0).total(3) == 2 * 3 + 20
    assert "3 members" in found.describe(100, 3)


@pytest.mark.parametrize(("free", "status"), [(39, Status.fail), (42, Status.warn), (100, Status.ok)])
def test_the_doctor_compares_with_what_is_free(free: int, status: Status) -> None:
    [finding] = machine.check_disk(Disk(10, 3, most=4, kept=3), free)
    assert finding.check == "disk" and finding.status is status
    assert ("checkpoint.keep_last" in finding.remedy) == (status is not Status.ok)


def test_a_run_that_cannot_fit_warns_at_its_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True))
    monkeypatch.setattr(disk, "disk_of", lambda trainer: Disk(2**40, 2**40, 3, 2))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    disk.warn_of_disk(trainer, tmp_path / "runs/run")
    assert "disk: up to" in caplog.text and "checkpoint.keep_last" in caplog.text


def test_files_of_an_earlier_start_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert disk.free_disk(tmp_path / "runs/run") == 100
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/file").write_bytes(b"12345")
    assert disk.free_disk(tmp_path) == 105


def test_keep_last_0_keeps_one_until_the_run_is_done_and_then_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 0, True)
    checkpoints.save(make_snapshot(1), best=0.5)
    for step in (2, 3):
        checkpoints.save(make_snapshot(step))
    assert checkpoints.moments() == [(1, 0), (3, 0)]
    checkpoints.finish()
    assert checkpoints.moments() == [(1, 0)]
    others = Checkpoints(tmp_path / "others", 1, False)
    others.save(make_snapshot(1))
    others.finish()
    assert others.moments() == [(1, 0)]


def test_a_done_run_without_checkpoints_is_found_and_not_trained_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    words = [*RUN, "checkpoint.keep_last=0", "checkpoint.best=drop"]
    forked.trained(tmp_path, words)
    assert list((tmp_path / "runs/run/checkpoints").iterdir()) == []
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "runs/run/metrics.jsonl").read_text()
    assert cli.main(["train", *words]) == errors.OK
    assert "finished" in capfd.readouterr().out
    assert cli.main(["train", *words, "train.max_steps=3", "resume_force=true"]) == errors.USAGE
    assert "checkpoint.keep_last" in capfd.readouterr().err
    assert (tmp_path / "runs/run/metrics.jsonl").read_text() == before
