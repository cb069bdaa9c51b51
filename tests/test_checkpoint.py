"""Checkpoints are complete or absent, verified before anything is deleted, and survive a disk that is full for a while."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opd.errors import ConfigError, OutputError
from opd.train import main
from opd.training import checkpoint
from opd.training.checkpoint import (
    AHEAD,
    BEST,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    TOKENS,
    Checkpoints,
    Snapshot,
    read,
    verify,
)
from opd.training.tensors import model_tensors, restore, snapshot


def make_snapshot(step: int, inner: int = 0) -> Snapshot:
    """Return a snapshot of a small model whose weights are `step`, between inner steps with a table."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(step)
        model.weight.grad = torch.zeros(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    tables = {TOKENS: {"ids": torch.arange(3)}} if inner else None
    return snapshot(model_tensors(model), optimizer, {"step": step, "inner": inner, "tokens": {"inner": inner} if inner else None}, tables)


def test_moments_are_in_order_also_between_inner_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, 9, True)
    for moment in ((2, 0), (1, 0), (1, 2), (1, 1)):
        checkpoints.save(make_snapshot(*moment))
    assert checkpoints.moments() == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert checkpoints.newest().moment == (2, 0) and checkpoints.newest().tensors(TOKENS) is None
    between = read(checkpoints.path(1, 2))
    assert between.tensors(TOKENS)["ids"].tolist() == [0, 1, 2] and between.tensors(AHEAD) is None
    assert between.state["tokens"] == {"inner": 2}
    checkpoints.set_aside((1, 1))
    assert checkpoints.moments() == [(1, 0), (1, 1)]


def test_the_last_few_and_the_best_checkpoint_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, True)
    for step in range(1, 6):
        checkpoints.save(make_snapshot(step), best=0.5 if step == 2 else None)
    assert checkpoints.moments() == [(2, 0), (4, 0), (5, 0)]
    assert checkpoints.best() == {"step": 2, "score": 0.5}
    assert not [path.name for path in tmp_path.iterdir() if path.name not in (BEST, "step_000002", "step_000004", "step_000005")]


def test_a_checkpoint_of_steps_that_were_not_finite_deletes_none_that_a_rewind_needs(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=True)
    checkpoints.save(make_snapshot(1))
    troubled = make_snapshot(2)
    checkpoints.save(replace(troubled, state=troubled.state | {"trouble": {"steps": 2}}), best=0.5)
    assert checkpoints.moments() == [(1, 0), (2, 0)]
    checkpoints.save(make_snapshot(3))
    assert checkpoints.moments() == [(2, 0), (3, 0)]


def test_a_best_checkpoint_that_is_set_aside_is_the_best_no_more(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=True)
    checkpoints.save(make_snapshot(1))
    checkpoints.save(make_snapshot(2), best=0.9)
    checkpoints.set_aside((1, 0))
    checkpoints.save(make_snapshot(2))
    assert checkpoints.best() is None
    assert (tmp_path / "old_step_000002").is_dir()
    checkpoints.finish()
    assert not (tmp_path / "old_step_000002").exists() and checkpoints.moments() == [(1, 0), (2, 0)]


def test_a_full_disk_is_survived_twice_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 1, True)
    checkpoints.save(make_snapshot(1))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    checkpoints.save(make_snapshot(2))
    checkpoints.save(make_snapshot(3))
    with pytest.raises(OutputError, match="0 MiB are free") as raised:
        checkpoints.save(make_snapshot(4))
    assert raised.value.exit_code == 74
    with pytest.raises(OutputError):
        Checkpoints(tmp_path, 1, True).save(make_snapshot(5), needed=True)
    assert checkpoints.newest().step == 1
    monkeypatch.undo()
    checkpoints.save(make_snapshot(6))
    assert checkpoints.failures == 0 and checkpoints.moments() == [(6, 0)]


def test_in_the_background_one_checkpoint_is_written_at_a_time_with_the_weights_of_its_moment(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 9, True, background=True)
    is_awaited, events = threading.Event(), []
    commit, copy, wait = Checkpoints.commit, Snapshot.copy, Checkpoints.wait

    def slow_commit(self, snapshot, best=None):
        assert is_awaited.wait(10)
        path = commit(self, snapshot, best)
        events.append(("committed", snapshot.moment))
        return path

    def noted_wait(self):
        if self.in_flight is not None:
            is_awaited.set()
        wait(self)

    monkeypatch.setattr(Checkpoints, "commit", slow_commit)
    monkeypatch.setattr(Checkpoints, "wait", noted_wait)
    monkeypatch.setattr(Snapshot, "copy", lambda self: events.append(("copied", self.moment)) or copy(self))
    first = make_snapshot(1)
    checkpoints.save(first)
    for tensor in first.files[MODEL].values():
        tensor.fill_(-1.0)  # training continues
    assert checkpoints.moments() == []
    checkpoints.save(make_snapshot(2))
    checkpoints.wait()
    assert events == [(what, moment) for moment in ((1, 0), (2, 0)) for what in ("copied", "committed")]
    assert torch.all(load_file(tmp_path / "step_000001" / MODEL)["weight"] == 1)


def test_three_failures_in_the_background_are_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 9, True, background=True)
    monkeypatch.setattr(Checkpoints, "commit", lambda *_: (_ for _ in ()).throw(OutputError("full")))
    for step in (3, 4, 5):
        checkpoints.save(make_snapshot(step))
    with pytest.raises(OutputError, match="full"):
        checkpoints.wait()


def test_a_changed_manifest_is_detected(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, True)
    checkpoints.save(make_snapshot(1))
    file = checkpoints.path(1) / MANIFEST
    assert verify(file.parent) is None
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "step": 2}, indent=2) + "\n")
    assert MANIFEST in verify(file.parent)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, TOKENS, "state.json"])
def test_a_changed_file_is_detected_and_the_checkpoint_set_aside(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, 2, True)
    checkpoints.save(make_snapshot(1))
    checkpoints.save(make_snapshot(1, inner=1))
    file = checkpoints.path(1, 1) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert name in verify(file.parent)
    assert checkpoints.newest().moment == (1, 0)
    assert [path.name for path in tmp_path.glob("bad_*")] == ["bad_step_000001_1"]


def test_corrupt_checkpoints_of_the_same_step_do_not_replace_each_other(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, True)
    for _ in range(2):
        checkpoints.save(make_snapshot(1))
        checkpoints.save(make_snapshot(2))
        (checkpoints.path(2) / MANIFEST).unlink()
        assert checkpoints.newest().step == 1
    assert sorted(path.name for path in tmp_path.glob("bad_*")) == ["bad_step_000002", "bad_step_000002.2"]


def test_restored_tensors_do_not_change_with_their_files(tmp_path):
    """They would if they were memory-mapped pages of the files."""
    checkpoints = Checkpoints(tmp_path, 2, True)
    saved = make_snapshot(3)
    checkpoints.save(saved)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    restore(checkpoints.newest(), model_tensors(model), optimizer)
    for name in (MODEL, OPTIMIZER):
        file = checkpoints.path(3) / name
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    restored = snapshot(model_tensors(model), optimizer, {"step": 3, "inner": 0}).files
    assert len(restored[OPTIMIZER]) == 3  # of the weight; the bias had no gradient
    assert all(torch.equal(saved.files[name][key], tensor) for name in restored for key, tensor in restored[name].items())


# Formats.


def save_as_format(checkpoints: Checkpoints, number: int | None) -> None:
    """Save a checkpoint of another format; None for the first format, which had no number."""
    current = make_snapshot(1)
    state = {key: value for key, value in current.state.items() if key != "format"}
    checkpoints.save(Snapshot(current.files, state if number is None else {**state, "format": number}))


@pytest.mark.parametrize("number", [None, FORMAT - 1, FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_with_exit_code_64(tmp_path, number):
    checkpoints = Checkpoints(tmp_path, 2, True)
    save_as_format(checkpoints, number)
    assert verify(checkpoints.path(1)) is None  # it is intact
    for attempt in (lambda: read(checkpoints.path(1)), checkpoints.newest):
        with pytest.raises(ConfigError, match=r"format.*name=") as raised:
            attempt()
        assert raised.value.exit_code == 64
    assert checkpoints.moments() == [(1, 0)] and not list(tmp_path.glob("bad_*"))  # nor renamed


def test_a_run_that_resumes_from_an_old_checkpoint_format_ends_with_exit_code_64(tmp_path, monkeypatch, capfd):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, True)
    save_as_format(checkpoints, None)
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=debug", "device=cpu", "name=run", f"resume={checkpoints.path(1)}"]) == 64
    error = capfd.readouterr().err
    assert "format 1" in error and "name=" in error and "Traceback" not in error
