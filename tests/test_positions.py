"""What is told by position adds up to what is told of the whole step."""

import math

import pytest
import torch

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.objective.means import Means
from opd.training.positions import add_by_position, by_position, pieces, width


def rollout(tokens: int) -> Rollout:
    return Rollout(Request(Prompt(0, (3,), "")), tuple(range(tokens)), torch.zeros(tokens), FinishReason.stop)


def described(lengths: list[int], learnt: list[int], values: torch.Tensor, most: int) -> dict:
    means = Means()
    written = [rollout(length) for length in lengths]
    part = [rollout(length) for length in learnt]
    add_by_position(means, {"reverse_kl": values, "entropy": 2 * values}, part, written, most)
    means.add("loss", 1.0, 1.0)
    found = by_position(means, most)
    assert means.means() == {"loss": 1.0}  # all of it is taken out
    return found


@pytest.mark.parametrize("most", [1, 8, 16, 17, 256, 1000])
def test_pieces_cover_every_position_and_no_more(most):
    assert (pieces(most) - 1) * width(most) < most <= pieces(most) * width(most) and pieces(most) <= 16


def test_each_piece_holds_the_mean_of_its_positions():
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    found = described([4, 3, 0], [2, 3, 0], values, 32)
    assert found["width"] == 2
    assert found["tokens"][:3] == [4, 1, 0] and sum(found["tokens"]) == 5
    assert found["reverse_kl"][:3] == [(1 + 2 + 3 + 5) / 4, 7.0, None] and found["entropy"][:2] == [5.5, 14.0]
    assert found["ends"][:3] == [1, 2, 0] and sum(found["ends"]) == 3  # of the completions as written, the empty one among them


def test_what_is_no_number_is_null():
    found = described([2], [2], torch.tensor([1.0, math.nan]), 8)
    assert found["reverse_kl"][:2] == [1.0, None]


def test_processes_add_up():
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    parts = [Means(), Means()]
    for means, own, length in zip(parts, values.split([2, 3]), [2, 3], strict=True):
        add_by_position(means, {"reverse_kl": own, "entropy": 2 * own}, [rollout(length)], [rollout(length)], 32)
    summed = parts[0].from_tensor(parts[0].to_tensor(torch.device("cpu")) + parts[1].to_tensor(torch.device("cpu")))
    assert by_position(summed, 32) == described([2, 3], [2, 3], values, 32)
