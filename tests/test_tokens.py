"""The token table: its rows are the trained tokens of the rollouts, its slices the micro-batches, and it survives storage."""

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from training_helpers import UNEVEN, make_trainer, rollout_lists, rollout_of, trained_ids, trained_logp

from opd.data.rollouts import Rollout, micro_batches
from opd.training.tokens import Tokens, concatenate, load_tokens

CPU = torch.device("cpu")


def table(rollouts: list[Rollout]) -> Tokens:
    """Return a table with a second column of numbers that tell its rows apart."""
    tokens = Tokens(rollouts, CPU, bonus_R=torch.arange(len(rollouts)) / 2)
    tokens.columns["logp"] = tokens.columns["behaviour_logp"] / 3
    return tokens


def load(stored: dict[str, torch.Tensor], tokens: Tokens, rank: int, processes: int) -> Tokens:
    prompts = {rollout.request.prompt.sample_id: rollout.request.prompt for rollout in tokens.rollouts}
    return load_tokens(stored, json.loads(json.dumps(tokens.numbers())), prompts, rank, processes, CPU)


@given(rollout_lists())
def test_rows_are_the_trained_tokens_grouped_by_rollout_the_longest_first(rollouts):
    tokens = table(rollouts)
    order = list(dict.fromkeys(tokens.rollout_N.tolist()))
    assert sorted(order) == [index for index, rollout in enumerate(rollouts) if rollout.trained]
    assert tokens.rollout_N.tolist() == [index for index in order for _ in rollouts[index].trained]
    lengths = [rollouts[index].length for index in order]
    assert lengths == sorted(lengths, reverse=True)
    assert tokens.columns["behaviour_logp"].tolist() == [logp for index in order for logp in trained_logp(rollouts[index])]


@given(rollout_lists(), st.integers(1, 60), st.booleans(), st.sampled_from([0, 5, math.inf]))
def test_slices_of_the_table_are_the_micro_batches_of_the_rollouts(rollouts, budget, packed, padding):
    tokens = table(rollouts)
    tokens.split(budget, 0, packed, padding)
    expected = micro_batches(rollouts, budget, 0, packed, padding)
    assert [part.batch.rollouts for part in tokens.slices] == [batch.rollouts for batch in expected]
    stops = [0, *(part.rows.stop for part in tokens.slices)]
    assert [part.rows.start for part in tokens.slices] == stops[:-1] and stops[-1] == len(tokens.rollout_N)
    for part, batch in zip(tokens.slices, expected, strict=True):
        assert torch.equal(part.batch.inputs.ids_BT, batch.inputs.ids_BT)
        assert torch.equal(part.batch.inputs.predicting_N, batch.inputs.predicting_N)
        assert part.batch.ids_N.tolist() == [token for index in batch.rollouts for token in trained_ids(rollouts[index])]
        assert tokens.rollout_N[part.rows].tolist() == [index for index in batch.rollouts for _ in rollouts[index].trained]
        logp = [logp for index in batch.rollouts for logp in trained_logp(rollouts[index])]
        assert tokens.columns["behaviour_logp"][part.rows].tolist() == logp


@given(rollout_lists(), st.integers(1, 60))
def test_a_column_filled_by_micro_batch_can_be_read_as_sampled_and_by_rollout(rollouts, budget):
    tokens = table(rollouts)
    tokens.split(budget, 0, packed=False, max_padding=math.inf)
    assume(tokens.slices)
    tokens.fill("id", [part.batch.ids_N for part in tokens.slices])
    assert tokens.as_sampled("id").tolist() == [token for rollout in rollouts for token in trained_ids(rollout)]
    assert tokens.as_sampled("behaviour_logp").tolist() == [logp for rollout in rollouts for logp in trained_logp(rollout)]
    for index, rollout in enumerate(rollouts):
        rows = tokens.of_rollout(index)
        assert rows["id"].tolist() == trained_ids(rollout) and rows["behaviour_logp"].tolist() == trained_logp(rollout)


@given(rollout_lists(), st.sampled_from([1, 2, 3]))
def test_a_stored_table_loads_in_any_number_of_processes(rollouts, processes):
    """Masks with holes, unequal lengths and columns come back; the parts together are the whole."""
    rollouts = rollouts[: len(rollouts) // processes * processes]
    assume(rollouts)
    tokens = table(rollouts)
    stored = tokens.to_tensors()
    parts = [load(stored, tokens, rank, processes) for rank in range(processes)]
    loaded = [rollout for part in parts for rollout in part.rollouts]
    assert [len(part.rollouts) for part in parts] == [len(rollouts) // processes] * processes
    for before, after in zip(rollouts, loaded, strict=True):
        assert (after.request, after.completion, after.finish_reason) == (before.request, before.completion, before.finish_reason)
        assert after.trained == before.trained and torch.equal(after.behaviour_logp, before.behaviour_logp)
    for name in tokens.columns:
        assert torch.equal(torch.cat([part.as_sampled(name) for part in parts]), tokens.as_sampled(name))
    assert torch.equal(torch.cat([part.bonus_R for part in parts]), tokens.bonus_R)
    again = concatenate([part.to_tensors() for part in parts])
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


def test_a_loaded_table_keeps_its_progress_and_counts_its_metrics_once_over_processes():
    tokens = table([rollout_of((3,), (4, 1)), rollout_of((5,), (6, 1), index=1)])
    tokens.means.add("loss", 3.0, 2.0)
    tokens.inner, tokens.seconds["update"] = 2, 1.5
    first, second = (load(tokens.to_tensors(), tokens, rank, 2) for rank in range(2))
    assert first.inner == second.inner == 2 and first.seconds == second.seconds == tokens.seconds
    assert (first.means.sums, first.means.counts) == ({"loss": 3.0}, {"loss": 2.0})
    assert (second.means.sums, second.means.counts) == ({"loss": 0.0}, {"loss": 0.0})


@pytest.mark.parametrize("options", [{"ppo__loss_prefix": 12, "teacher__contrast": "x"}, {"sampling__truncated": "drop"}])
def test_the_table_of_a_step_is_shared_by_another_number_of_processes(tmp_path, options):
    trainer = make_trainer(tmp_path, train__batch_size=4, **UNEVEN, **options)
    tokens = trainer.begin_step()
    trainer.inner_step(tokens)
    assert len({len(rollout.trained) for rollout in tokens.rollouts}) > 1
    stored, prompts = tokens.to_tensors(), {prompt.sample_id: prompt for prompt in trainer.prompts}
    parts = [load_tokens(stored, tokens.numbers(), prompts, rank, 2, CPU) for rank in range(2)]
    assert [r.completion for part in parts for r in part.rollouts] == [r.completion for r in tokens.rollouts]
    assert [r.trained for part in parts for r in part.rollouts] == [r.trained for r in tokens.rollouts]
    assert {"behaviour_logp", "teacher_logp", "logp", "entropy", "reverse_kl", "advantage"} <= tokens.columns.keys()
    for name in tokens.columns:
        assert torch.equal(torch.cat([part.as_sampled(name) for part in parts]), tokens.as_sampled(name))
    assert parts[0].means.sums == tokens.means.sums and set(parts[1].means.sums.values()) == {0.0}
