"""Collation, packing and token counts, for any rollouts."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, collate, micro_batches, split_by_tokens

token = st.integers(0, 50)
completion = st.lists(token, min_size=1, max_size=9)
prompt = st.lists(token, min_size=1, max_size=9)


@st.composite
def rollouts(draw):
    made = []
    for index in range(draw(st.integers(1, 7))):
        own = draw(st.none() | prompt)
        request = Request(Prompt(index, tuple(draw(prompt)), "", teacher_ids=None if own is None else tuple(own)))
        ids = draw(completion)
        made.append(Rollout(request, tuple(ids), torch.arange(len(ids)) + 100.0 * index, FinishReason.stop))
    return made


@given(rollouts(), st.integers(0, 50), st.booleans())
def test_each_kept_position_predicts_its_target(made, pad, packed):
    batch = collate(made, range(len(made)), pad, packed)
    for inputs in (batch.inputs, batch.teacher_inputs):
        flatten = inputs.ids_BT.flatten()
        assert flatten[inputs.kept_N + 1].tolist() == batch.target_N.tolist()
        assert len(inputs.kept_N) == sum(len(rollout.completion) for rollout in made)


@given(rollouts(), st.booleans())
def test_before_each_completion_stands_its_own_prompt(made, packed):
    batch = collate(made, range(len(made)), 0, packed)
    for index, rollout in enumerate(made):
        for inputs, ids in ((batch.inputs, rollout.request.prompt.ids), (batch.teacher_inputs, rollout.request.prompt.seen_by_teacher)):
            first = int(inputs.kept_N[batch.sequence_N == index][0])
            assert inputs.ids_BT.flatten()[first + 1 - len(ids) : first + 1].tolist() == list(ids)
            if inputs.positions_BT is not None:
                assert int(inputs.positions_BT[0, first]) == len(ids) - 1


@given(rollouts(), st.integers(1, 60), st.booleans())
def test_micro_batches_hold_every_token_once_with_its_own_log_prob(made, budget, packed):
    batches = micro_batches(made, budget, 0, packed)
    seen = {}
    for batch in batches:
        for index, target, logp in zip(batch.sequence_N.tolist(), batch.target_N.tolist(), batch.behaviour_logp_N.tolist(), strict=True):
            seen.setdefault(index, []).append((target, logp))
    assert seen == {i: list(zip(rollout.completion, rollout.behaviour_logp.tolist(), strict=True)) for i, rollout in enumerate(made)}
    assert all(batch.inputs.ids_BT.numel() <= budget or len(batch.sequence_N.unique()) == 1 for batch in batches)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 80), st.booleans(), st.integers(0, 60))
def test_splits_are_longest_first_and_within_the_budget_and_the_padding(lengths, budget, packed, padding):
    groups = split_by_tokens(lengths, budget, packed, padding)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    flatten = [lengths[index] for group in groups for index in group]
    assert flatten == sorted(flatten, reverse=True)
    for group in groups:
        size = sum(lengths[i] for i in group) if packed else len(group) * lengths[group[0]]
        assert size <= budget or len(group) == 1
        assert size - sum(lengths[i] for i in group) <= padding
    # No group could have taken the row that the next begins with.
    for group, following in itertools.pairwise(groups):
        longest, joined = lengths[group[0]], [*group, following[0]]
        own = sum(lengths[i] for i in joined)
        size = own if packed else len(joined) * longest
        assert size > budget or size - own > padding


@given(rollouts(), st.integers(1, 10))
def test_a_prefix_keeps_the_first_tokens_and_their_log_probs(made, limit):
    for rollout in made:
        cut = rollout.first(limit)
        assert cut.completion == rollout.completion[:limit]
        assert cut.behaviour_logp.tolist() == rollout.behaviour_logp[:limit].tolist()
