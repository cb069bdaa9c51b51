"""Metrics of a step and its stored rollouts: means over trained tokens, by position too, and null for untrained tokens."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import config, make_trainer, rollout_lists, rollout_of

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, repetition
from opd.training.metrics import (
    add_by_position,
    bucket_count,
    bucket_width,
    engine_gap,
    rollout_records,
    sample_text,
    step_metrics,
    take_by_position,
)
from opd.training.speed import CALLS, RUNS, Speed, fastest, measure_speed
from opd.training.tokens import Means, Tokens

CPU = torch.device("cpu")
HOLES = (True, False, True, False)


def completion(length: int, mask: tuple[bool, ...] | None = None) -> Rollout:
    return rollout_of((3,), tuple(range(length)), mask=mask)


def by_position(rollouts: list[Rollout], values: torch.Tensor, max_new_tokens: int) -> dict:
    means = Means()
    add_by_position(means, {"reverse_kl": values, "entropy": 2 * values}, rollouts, max_new_tokens)
    means.add("loss", 1.0, 1.0)
    result = take_by_position(means, max_new_tokens)
    assert means.means() == {"loss": 1.0}  # all metrics by position are taken out
    return result


def scored(rollouts: list[Rollout], **columns: list[float]) -> Tokens:
    """Return a table with all columns of a first pass; values in the order of the rollouts, 0 where they are not given."""
    tokens = Tokens(rollouts, CPU)
    for name in dict.fromkeys(("logp", "teacher_logp", "entropy", "reverse_kl", "advantage", "clipped", "cut", *columns)):
        tokens.columns[name] = torch.zeros(len(tokens.rollout_N))
        tokens.columns[name][tokens.sampling_order_N] = torch.tensor(columns.get(name, [0.0] * len(tokens.rollout_N))).float()
    return tokens


# Means.


def over_two_processes(first: Means, second: Means) -> Means:
    stored = []

    def process(reduce):
        return SimpleNamespace(num_processes=2, device=CPU, reduce=reduce)

    first.over_processes(process(lambda pairs, how: stored.append(pairs) or pairs))
    return second.over_processes(process(lambda pairs, how: pairs + stored[0]))


def test_means_of_parts_sum_to_the_means_of_the_whole():
    whole, parts = Means(), Means()
    values = torch.randn(10)
    whole.add_tensors("x", [values])
    parts.add_tensors("x", [values[:3], values[3:]])
    assert math.isclose(whole.means()["x"], parts.means()["x"], rel_tol=1e-9)
    doubled = over_two_processes(parts, parts)
    assert doubled.means() == parts.means() and doubled.counts == {"x": 20}


def test_repetition_counts_n_grams_that_occurred_before():
    assert repetition((1, 2, 3)) == 0 and repetition((1, 2, 3, 4, 5)) == 0
    assert repetition((7,) * 8) == pytest.approx(4 / 5)
    assert repetition((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 / 5)


@given(rollout_lists(), st.floats(-2, 2, width=32))
def test_the_engine_gap_compares_each_trained_token_with_its_own_behaviour_log_prob(rollouts, shift):
    tokens = Tokens(rollouts, CPU)
    tokens.columns["logp"] = tokens.columns["behaviour_logp"] + shift * tokens.rollout_N
    expected = [abs(shift) * index for index, rollout in enumerate(rollouts) for _ in rollout.trained]
    assert torch.allclose(engine_gap(tokens), torch.tensor(expected), atol=1e-3)


def test_step_metrics_are_means_over_trained_tokens_and_over_whole_rollouts():
    rollouts = [
        rollout_of((3,), (4, 1), logp=[-4.0, -5.0]),
        rollout_of((3, 4), (7, 7, 7, 7, 7), FinishReason.length, mask=(*HOLES, True), logp=[-1.0, -9.0, -2.0, -9.0, -3.0]),
    ]
    tokens = scored(rollouts, logp=[-4.0, -7.0, -1.5, -2.0, -3.0], teacher_logp=[-5, -6, -2, -3, -4], reverse_kl=[4, 5, 1, 2, 3])
    assert tokens.rollout_N.tolist() == [1, 1, 1, 0, 0]  # rows are not in the order of the rollouts
    tokens.means.add("loss", 6.0, 5.0)
    tokens.seconds.update(sample=1.0, score=2.0, update=2.0)
    metrics, positions = step_metrics(tokens, Accelerator(cpu=True), max_new_tokens=8)
    assert metrics["engine_gap"] == pytest.approx(2.5 / 5)
    assert (metrics["reverse_kl"], metrics["teacher_nll"], metrics["loss"]) == (3, 4, 1.2)
    assert (metrics["tokens"], metrics["tokens_per_second"], metrics["time/step"]) == (5, 1.0, 5.0)
    assert (metrics["length"], metrics["truncated"], metrics["repetition"]) == (3.5, 0.5, 0.25)
    assert (metrics["finish/stop"], metrics["finish/length"]) == (1, 1)
    assert 4.9 < metrics["reverse_kl_p99"] <= 5 and 1.9 < metrics["engine_gap_p99"] <= 2
    assert positions["tokens"] == [2, 1, 1, 0, 1, 0, 0, 0] and positions["ends"] == [0, 1, 0, 0, 1, 0, 0, 0]
    assert positions["reverse_kl"] == [2.5, 5, 2, None, 3, None, None, None]


def test_shares_of_the_device_count_operations_and_bytes_by_hand():
    """Two prompts of 3 and 1 ids, completions of 4 and 2 tokens, decoded together; two inner steps."""
    tokens = Tokens([rollout_of((3, 4, 5), (7, 7, 7, 7)), rollout_of((3,), (7, 7))], CPU)
    tokens.inner = 2
    tokens.seconds.update(sample=2.0, wait=0.0, score=1.0, update=1.0)
    speed = Speed(copy_rate=1e4, product_rate=1e5, student=100, teacher=300, passes=3, weight_bytes=400, cache_bytes=10, batch_size=2)
    # The first new token comes from the pass over the prompt, which reads no cache.
    cached = (3 + 1) + (3 + 2) + (3 + 3) + (1 + 1)
    assert speed.metrics(tokens) == {
        "perf/mfu": pytest.approx(2 * (7 + 3) * (100 + 300 + 2 * 3 * 100) / 4 / 1e5),
        "perf/decode_bandwidth": pytest.approx((4 * 400 + cached * 10) / 2 / 1e4),
    }
    alone = replace(speed, batch_size=1).metrics(tokens)
    assert alone["perf/decode_bandwidth"] == pytest.approx(((4 + 2) * 400 + cached * 10) / 2 / 1e4)
    served = replace(speed, weight_bytes=0).metrics(tokens)
    assert served == {"perf/mfu": pytest.approx(2 * (7 + 3) * (300 + 2 * 3 * 100) / 4 / 1e5)}


def test_gpu_is_waited_for_after_several_calls_which_share_the_time(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr("time.perf_counter", iter(range(100)).__next__)
    count = CALLS["cuda"]
    assert fastest(lambda: calls.append("work"), torch.device("cuda")) == 1 / count
    assert calls == ([*["work"] * count, "wait"] * RUNS)


def test_speed_of_a_model_counts_the_weights_in_its_products():
    student, teacher = random_model(16, seed=1), random_model(16, seed=2, hidden=24)
    speed = measure_speed(config(), student, teacher, bf16=False, decodes_in=torch.float32)
    looked_up = 0 if student.config.tie_word_embeddings else student.get_input_embeddings().weight.numel()
    assert speed.student == sum(weight.numel() for weight in student.parameters()) - looked_up
    assert speed.weight_bytes == 4 * speed.student and speed.passes == 3 and speed.copy_rate > 0 < speed.product_rate
    assert measure_speed(config(), student, teacher, bf16=True, decodes_in=None).weight_bytes == 0


# By token position.


@pytest.mark.parametrize("most", [1, 8, 16, 17, 256, 1000])
def test_buckets_cover_every_position_and_no_more(most):
    assert (bucket_count(most) - 1) * bucket_width(most) < most <= bucket_count(most) * bucket_width(most) and bucket_count(most) <= 16


def test_each_bucket_has_the_mean_of_its_positions():
    """The values are of trained tokens only; the ends are of whole completions, also of one without a trained token."""
    rollouts = [completion(4, (True, True, False, False)), completion(3), completion(5, (False,) * 5)]
    positions = by_position(rollouts, torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]), 32)
    assert positions["width"] == 2
    assert positions["tokens"][:3] == [4, 1, 0] and sum(positions["tokens"]) == 5
    assert positions["reverse_kl"][:3] == [(1 + 2 + 3 + 5) / 4, 7.0, None] and positions["entropy"][:2] == [5.5, 14.0]
    assert positions["ends"][:3] == [0, 2, 1] and sum(positions["ends"]) == 3


def test_tokens_after_a_hole_in_the_mask_count_at_their_position_in_the_completion():
    positions = by_position([completion(4, (False, True, False, True))], torch.tensor([1.0, 2.0]), 4)
    assert positions["tokens"] == [0, 1, 0, 1] and positions["reverse_kl"] == [None, 1.0, None, 2.0]


def test_a_bucket_that_is_not_finite_is_null():
    positions = by_position([completion(2)], torch.tensor([1.0, math.nan]), 8)
    assert positions["reverse_kl"][:2] == [1.0, None]


def test_metrics_by_position_sum_over_processes():
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    parts = [Means(), Means()]
    for means, part, length in zip(parts, values.split([2, 3]), [2, 3], strict=True):
        add_by_position(means, {"reverse_kl": part, "entropy": 2 * part}, [completion(length)], 32)
    reduced = over_two_processes(*parts)
    assert take_by_position(reduced, 32) == by_position([completion(2), completion(3)], values, 32)


def test_metrics_by_position_sum_to_those_of_the_step(tmp_path):
    done = make_trainer(tmp_path, ppo__loss_prefix=5).train_step()
    parts = [done.metrics[f"time/{part}"] for part in ("sample", "wait", "score", "update")]
    assert min(parts) >= 0 and done.metrics["time/step"] == pytest.approx(sum(parts)) and done.metrics["memory/peak_bytes"] > 0
    positions = done.by_position
    assert sum(positions["tokens"]) == done.metrics["tokens"] and sum(positions["ends"]) == len(done.tokens.rollouts)
    sums = [tokens * (kl or 0.0) for tokens, kl in zip(positions["tokens"], positions["reverse_kl"], strict=True)]
    assert sum(sums) / done.metrics["tokens"] == pytest.approx(done.metrics["reverse_kl"], rel=1e-5)


# Stored rollouts.

TOKENIZER = SimpleNamespace(
    decode=lambda ids, skip_special_tokens, **_: " ".join(str(i) for i in ids if not (skip_special_tokens and i == 1))
)


def test_a_stored_rollout_has_a_value_for_each_trained_token_and_null_for_the_others():
    rollouts = [
        rollout_of((9,), (1,), index=9, logp=[-0.5]),
        rollout_of((3, 4), (5, 6, 7, 1), index=8, mask=HOLES, logp=[-1.0, -2.0, -3.0, -4.123456]),
    ]
    columns = {"logp": [-3.5, -1.5, -2.5], "teacher_logp": [-3, -1, -2], "entropy": [0, 0.5, 0.25], "clipped": [1, 1, 0], "cut": [0, 0, 1]}
    full, holes = rollout_records(TOKENIZER, scored(rollouts, **columns), 5, [0.2, 0.2], {})
    assert (holes["sample_id"], holes["prompt"], holes["completion"], holes["tokens"]) == (8, "3 4", "5 6 7 1", ["5", "6", "7", "1"])
    assert holes["ids"] == [5, 6, 7, 1] and holes["finish_reason"] == "stop" and holes["learnt"] == 2
    assert holes["behaviour_logp"] == [-1.0, -2.0, -3.0, -4.12346]  # of all tokens, trained or not
    assert holes["student_logp"] == [-1.5, None, -2.5, None] and holes["teacher_logp"] == [-1.0, None, -2.0, None]
    assert holes["entropy"] == [0.5, None, 0.25, None]
    assert holes["clipped"] == [True, None, False, None] and holes["cut"] == [False, None, True, None]
    assert full["student_logp"] == [-3.5] and full["clipped"] == [True] and full["learnt"] == 1


def test_a_stored_rollout_has_null_for_a_number_that_is_not_finite():
    columns = {"logp": [math.nan, -2.0, -1.0], "teacher_logp": [-1.0, -math.inf, -1.0], "entropy": [math.nan, 1.0, 1.0]}
    alternatives = torch.tensor([[5]] * 3), torch.tensor([[-0.5], [-math.inf], [math.nan]])
    tokens = scored([rollout_of((3,), (5, 6, 1), logp=[-1.0, math.nan, -1.0])], **columns)
    (record,) = rollout_records(TOKENIZER, tokens, 1, [1.0], {0: alternatives})
    assert record["student_logp"] == [None, -2.0, -1.0] and record["teacher_logp"] == [-1.0, None, -1.0]
    assert record["entropy"] == [None, 1.0, 1.0] and record["behaviour_logp"] == [-1.0, None, -1.0]
    assert [best["logp"] for (best,) in record["alternatives"]] == [-0.5, None, None]
    spans = scored([rollout_of((3,), (5, 6, 1))], logp=[-1.0] * 3, reverse_kl=[0.5, math.nan, 0.25], span=[1, 0, 0])
    (record,) = rollout_records(TOKENIZER, spans, 1, [1.0], {})
    assert record["teacher_logp"] == [None, None, -1.25]


def test_a_stored_rollout_of_weight_zero_has_scores_and_no_trained_token():
    tokens = scored([rollout_of((3,), (5, 1))], logp=[-1.0, -2.0])
    (record,) = rollout_records(TOKENIZER, tokens, 1, [0.0], {})
    assert record["learnt"] == 0 and record["student_logp"] == [-1.0, -2.0]


def test_only_so_many_rollouts_are_stored_and_none_has_clips_without_advantages():
    tokens = scored([rollout_of((3,), (5, 1)), rollout_of((3,), (1,))])
    del tokens.columns["clipped"], tokens.columns["cut"]
    records = rollout_records(TOKENIZER, tokens, 1, [1.0, 1.0], {})
    assert len(records) == 1 and records[0]["clipped"] is None and records[0]["cut"] is None
    assert rollout_records(TOKENIZER, tokens, 0, [1.0, 1.0], {}) == []


def test_a_sample_is_shown_on_one_line_without_special_tokens():
    rollout = Rollout(Request(Prompt(0, (3,), "a\nb")), (5, 6, 1), torch.zeros(3), FinishReason.stop)
    assert sample_text(TOKENIZER, rollout) == "a b → 5 6"
