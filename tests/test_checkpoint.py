"""Checkpoints: whole or not there, verified before anything is deleted, and patient with a disk that is full for a while."""

import json
import threading

import pytest
import torch
from torch import nn

from opd.errors import OutputError
from opd.training import checkpoint
from opd.training.checkpoint import BEST, MANIFEST, MODEL, OPTIMIZER, ROUND, Checkpoints, Snapshot, read, restore, snapshot, verify


def taken(step: int, inner: int = 0) -> Snapshot:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(step)
        model.weight.grad = torch.zeros(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    rounds = {ROUND: {"ids": torch.arange(3)}} if inner else None
    return snapshot(model, optimizer, {"step": step, "inner": inner, "round": {"inner": inner} if inner else None}, rounds)


def test_moments_are_in_order_also_between_inner_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, 9, True)
    for moment in ((2, 0), (1, 0), (1, 2), (1, 1)):
        checkpoints.save(taken(*moment))
    assert checkpoints.moments() == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert checkpoints.newest().round() is None
    assert read(checkpoints.path(1, 2)).round()["ids"].tolist() == [0, 1, 2]
    checkpoints.set_aside((1, 1))
    assert checkpoints.moments() == [(1, 0), (1, 1)]


def test_the_last_few_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, True)
    for step in range(1, 6):
        checkpoints.save(taken(step), best=0.5 if step == 2 else None)
    assert checkpoints.moments() == [(2, 0), (4, 0), (5, 0)]
    assert checkpoints.best() == {"step": 2, "score": 0.5}
    assert not [path.name for path in tmp_path.iterdir() if path.name not in (BEST, "step_000002", "step_000004", "step_000005")]


def test_three_failures_in_a_row_are_too_many_and_the_old_one_stays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 1, True)
    checkpoints.save(taken(1))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    checkpoints.save(taken(2))
    checkpoints.save(taken(3))
    with pytest.raises(OutputError, match="MiB are needed, 0 MiB are free"):
        checkpoints.save(taken(4))
    with pytest.raises(OutputError):
        Checkpoints(tmp_path, 1, True).save(taken(5), needed=True)
    assert checkpoints.newest().step == 1
    monkeypatch.undo()
    checkpoints.save(taken(6))
    assert checkpoints.failures == 0 and checkpoints.moments() == [(6, 0)]


def test_in_the_background_one_is_written_at_a_time_and_of_the_weights_of_then(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 9, True, background=True)
    gate, running = threading.Event(), []
    original = Checkpoints.commit

    def slow(self, snapshot, best=None):
        running.append(threading.active_count())
        assert gate.wait(10)
        return original(self, snapshot, best)

    monkeypatch.setattr(Checkpoints, "commit", slow)
    first = taken(1)
    checkpoints.save(first)
    for tensor in first.files[checkpoint.MODEL].values():
        tensor.fill_(-1.0)  # training goes on
    assert checkpoints.moments() == []
    gate.set()
    checkpoints.save(taken(2))
    checkpoints.wait()
    assert checkpoints.moments() == [(1, 0), (2, 0)]
    assert torch.all(checkpoint.load_file(tmp_path / "step_000001" / checkpoint.MODEL)["weight"] == 1)
    monkeypatch.setattr(Checkpoints, "commit", lambda *_: (_ for _ in ()).throw(OutputError("full")))
    for step in (3, 4, 5):
        checkpoints.save(taken(step))
    with pytest.raises(OutputError, match="full"):
        checkpoints.wait()


def test_a_manifest_that_lies_is_found_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, True)
    checkpoints.save(taken(1))
    file = checkpoints.path(1) / MANIFEST
    assert verify(file.parent) is None
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "step": 2}, indent=2) + "\n")
    assert verify(file.parent) == "manifest.json: not what was written"


def test_bad_ones_of_the_same_step_do_not_replace_each_other(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, True)
    for _ in range(2):
        checkpoints.save(taken(1))
        checkpoints.save(taken(2))
        (checkpoints.path(2) / MANIFEST).unlink()
        assert checkpoints.newest().step == 1
    assert sorted(path.name for path in tmp_path.glob("bad_*")) == ["bad_step_000002", "bad_step_000002.2"]


def test_what_was_read_is_no_longer_the_files(tmp_path):
    """Weights and optimizer state stay what they were when the checkpoint is written over, as they would not if they were its pages."""
    checkpoints = Checkpoints(tmp_path, 2, True)
    saved = taken(3)
    checkpoints.save(saved)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    restore(checkpoints.newest(), model, optimizer)
    for name in (MODEL, OPTIMIZER):
        file = checkpoints.path(3) / name
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    found = snapshot(model, optimizer, {"step": 3, "inner": 0}).files
    assert len(found[OPTIMIZER]) == 3  # of the weight; nothing moved the bias
    assert all(torch.equal(saved.files[name][key], tensor) for name in found for key, tensor in found[name].items())
