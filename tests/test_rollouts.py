"""Collation, packing and micro-batches, for any rollouts."""

import itertools

from hypothesis import assume, given
from hypothesis import strategies as st
from training_helpers import rollout_lists, rollout_of, trained_ids

from opd.data.rollouts import FinishReason, collate, micro_batches, split_by_tokens


@given(rollout_lists(), st.integers(0, 50), st.booleans())
def test_each_predicting_position_stands_before_its_trained_token(rollouts, pad, packed):
    batch = collate(rollouts, range(len(rollouts)), pad, packed)
    assert batch.ids_N.tolist() == [token for rollout in rollouts for token in trained_ids(rollout)]
    for inputs in (batch.inputs, batch.teacher_inputs):
        assert inputs.ids_BT.flatten()[inputs.predicting_N + 1].tolist() == batch.ids_N.tolist()


@given(rollout_lists(), st.integers(0, 50), st.booleans())
def test_models_read_each_prompt_with_its_completion_up_to_the_last_trained_token(rollouts, pad, packed):
    batch = collate(rollouts, range(len(rollouts)), pad, packed)
    for inputs, prompts in (
        (batch.inputs, [rollout.request.prompt.ids for rollout in rollouts]),
        (batch.teacher_inputs, [rollout.request.prompt.seen_by_teacher for rollout in rollouts]),
    ):
        sequences = [list(prompt + rollout.read) for prompt, rollout in zip(prompts, rollouts, strict=True)]
        if packed:
            assert inputs.ids_BT.tolist() == [[token for sequence in sequences for token in sequence]]
            assert inputs.positions_BT.tolist() == [[position for sequence in sequences for position in range(len(sequence))]]
        else:
            width = max(map(len, sequences))
            assert inputs.ids_BT.tolist() == [sequence + [pad] * (width - len(sequence)) for sequence in sequences]
            assert inputs.positions_BT is None


def test_the_answer_is_without_its_end_whichever_token_that_is():
    assert rollout_of((2,), (5, 7)).answer == (5,)
    assert rollout_of((2,), (5, 7), FinishReason.length).answer == (5, 7)


@given(rollout_lists(), st.booleans())
def test_a_prompt_boundary_belongs_to_its_row(rollouts, packed):
    """The position that predicts a completion's first token is the last of its own prompt, in the student's and the teacher's view."""
    rollouts = [rollout for rollout in rollouts if rollout.trained[:1] == [0]]
    assume(rollouts)
    batch = collate(rollouts, range(len(rollouts)), 0, packed)
    for inputs, prompts in (
        (batch.inputs, [rollout.request.prompt.ids for rollout in rollouts]),
        (batch.teacher_inputs, [rollout.request.prompt.seen_by_teacher for rollout in rollouts]),
    ):
        counts = [len(rollout.trained) for rollout in rollouts]
        first = [int(part[0]) for part in inputs.predicting_N.split(counts)]
        flat, width = inputs.ids_BT.flatten(), inputs.ids_BT.shape[1]
        for row, (position, prompt) in enumerate(zip(first, prompts, strict=True)):
            assert flat[position + 1 - len(prompt) : position + 1].tolist() == list(prompt)
            if packed:
                assert int(inputs.positions_BT[0, position]) == len(prompt) - 1
            else:
                assert position == row * width + len(prompt) - 1


def test_the_end_of_sequence_token_is_trained_and_the_prompt_is_not():
    rollouts = [rollout_of((3, 4, 5), (7, 8, 1)), rollout_of((6,), (1,))]
    padded, packed = collate(rollouts, [0, 1], pad_id=1), collate(rollouts, [0, 1], pad_id=1, packed=True)
    assert padded.inputs.ids_BT.tolist() == [[3, 4, 5, 7, 8, 1], [6, 1, 1, 1, 1, 1]]
    assert padded.inputs.predicting_N.tolist() == [2, 3, 4, 6]
    assert packed.inputs.ids_BT.tolist() == [[3, 4, 5, 7, 8, 1, 6, 1]]
    assert packed.inputs.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert packed.inputs.predicting_N.tolist() == [2, 3, 4, 6]
    assert padded.ids_N.tolist() == packed.ids_N.tolist() == [7, 8, 1, 1]


def test_a_mask_with_holes_leaves_tokens_out_of_the_targets_and_in_the_context():
    rollout = rollout_of((3, 4), (5, 6, 7, 8, 1), mask=(True, False, False, True, False))
    batch = collate([rollout], [0], pad_id=0)
    assert batch.inputs.ids_BT.tolist() == [[3, 4, 5, 6, 7, 8]]
    assert batch.inputs.predicting_N.tolist() == [1, 4] and batch.ids_N.tolist() == [5, 8]
    assert rollout.trained == [0, 3] and rollout.read == (5, 6, 7, 8) and rollout.length == 6


@given(rollout_lists(), st.integers(1, 60), st.booleans())
def test_micro_batches_hold_every_rollout_with_trained_tokens_once_and_keep_to_their_budget(rollouts, budget, packed):
    batches = micro_batches(rollouts, budget, 0, packed)
    indices = [index for batch in batches for index in batch.rollouts]
    assert sorted(indices) == [index for index, rollout in enumerate(rollouts) if rollout.trained]
    for batch in batches:
        assert batch.ids_N.tolist() == [token for index in batch.rollouts for token in trained_ids(rollouts[index])]
        largest = max(batch.inputs.ids_BT.numel(), batch.teacher_inputs.ids_BT.numel())
        assert largest <= budget or len(batch.rollouts) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 80), st.booleans(), st.integers(0, 60))
def test_splits_are_longest_first_and_within_the_budget_and_the_padding_limit(lengths, budget, packed, padding):
    groups = split_by_tokens(lengths, budget, packed, padding)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    flat = [lengths[index] for group in groups for index in group]
    assert flat == sorted(flat, reverse=True)
    for group in groups:
        size = sum(lengths[i] for i in group) if packed else len(group) * lengths[group[0]]
        assert size <= budget or len(group) == 1
        assert size - sum(lengths[i] for i in group) <= padding
    # No group has room for the first row of the next one.
    for group, following in itertools.pairwise(groups):
        longest, joined = lengths[group[0]], [*group, following[0]]
        unpadded = sum(lengths[i] for i in joined)
        size = unpadded if packed else len(joined) * longest
        assert size > budget or size - unpadded > padding
