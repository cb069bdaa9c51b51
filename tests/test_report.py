"""What a run stores for the report, and the report itself: what is in it, what stays inert, and how large it gets."""

import json
import math
from pathlib import Path

import pytest
import torch

from opd.train import main

DEBUG = ("experiment=debug", "device=cpu")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished debug run of two inner steps."""
    root = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*DEBUG, "name=run"]) == 0
    return root / "runs" / "run"


def stored(folder: Path) -> list[dict]:
    return [record for file in sorted((folder / "rollouts").glob("*.jsonl")) for record in lines(file)]


def test_the_teachers_best_ids_stand_beside_each_stored_token(finished):
    records = stored(finished)
    assert len(records) == 12
    for record in records:
        assert len(record["ids"]) == len(record["alternatives"]) == len(record["entropy"]) == record["learnt"]
        for token, logp, best in zip(record["ids"], record["teacher_logp"], record["alternatives"], strict=True):
            logps = [one["logp"] for one in best]
            assert len(best) == 5 and logps == sorted(logps, reverse=True) and sum(map(math.exp, logps)) < 1.001
            same = [one["logp"] for one in best if one["id"] == token]
            assert all(abs(value - logp) < 1e-4 for value in same)  # the token's own score, where it is among the best
            assert same or logp <= logps[-1] + 1e-4  # and no better than they are, where it is not
    assert any(entropy > 0.1 for record in records for entropy in record["entropy"])


def test_tokens_that_a_clip_or_bound_changed_say_so(finished):
    metrics = {line["step"]: line for line in lines(finished / "metrics.jsonl")}
    for step in metrics:
        told = [flag for record in lines(finished / f"rollouts/step_{step:06d}.jsonl") for flag in record["cut"]]
        assert all(isinstance(flag, bool) for flag in told)
    for record in stored(finished):
        gaps = [abs(teacher - student) for teacher, student in zip(record["teacher_logp"], record["student_logp"], strict=True)]
        assert record["cut"] == [gap > 2.0 for gap in gaps]  # ppo.advantage_clip of the debug run
        assert len(record["clipped"]) == len(record["ids"])


def test_what_is_stored_for_the_report_changes_nothing_that_is_learnt(finished, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "track.alternatives=0", "track.rollouts_per_step=1"]) == 0
    folder = tmp_path / "runs" / "run"
    assert all(record["alternatives"] is None for record in stored(folder)) and len(stored(folder)) == 6
    one, other = (AutoModelForCausalLM.from_pretrained(path / "final").state_dict() for path in (finished, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_masked_and_dropped_completions_are_not_learnt_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["train.max_steps=1", "sampling.max_new_tokens=2", "track.rollouts_per_step=8"]
    for name, options in {"mask": ["sampling.truncated=mask"], "prefix": ["ppo.loss_prefix=1"]}.items():
        assert main([*DEBUG, f"name={name}", *short, *options]) == 0
    masked, prefix = stored(tmp_path / "runs" / "mask"), stored(tmp_path / "runs" / "prefix")
    cut_off = [record for record in masked if record["finish_reason"] == "length"]
    assert cut_off and all(record["learnt"] == 0 and record["teacher_logp"][0] is not None for record in cut_off)
    assert all(record["learnt"] == 1 for record in prefix) and all(record["alternatives"][1:] == [None] for record in prefix)


def test_positions_add_up_to_the_step(finished):
    for line in lines(finished / "metrics.jsonl"):
        found = line["by_position"]
        assert found["width"] == 1 and len(found["tokens"]) == 8 and sum(found["tokens"]) == line["tokens"]
        assert sum(found["ends"]) == line["finish/stop"] + line["finish/length"] and found["ends"][-1] >= line["finish/length"]
        for name in ("reverse_kl", "entropy"):
            total = sum(value * count for value, count in zip(found[name], found["tokens"], strict=True) if count)
            assert math.isclose(total / line["tokens"], line[name], rel_tol=1e-5)


def test_where_the_memory_went_adds_up_to_the_peak(finished):
    summary = json.loads((finished / "summary.json").read_text())
    grown = summary["peak_memory_grown_bytes"]
    assert set(grown) == {"loading", "evaluation", "sampling", "scoring", "update"} and min(grown.values()) >= 0 < grown["loading"]
    assert sum(grown.values()) <= summary["peak_memory_bytes"]
