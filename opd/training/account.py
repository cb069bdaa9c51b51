"""What there is to tell of a step: means over its tokens, and what is known of the rollouts that are stored.

Shapes: `N` tokens that are learnt from, of all rollouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.data.rollouts import Rollout, repetition
from opd.training.positions import add_by_position
from opd.training.round import Round


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with what is known of its tokens that were scored, the first (scored,) of its completion, before the update.

    logp, teacher_logp, entropy: at the sampling temperature, in nats. learnt: how many of the scored tokens had a weight: all or none.
    clipped: whether the clip held the token back in some inner step; cut: whether the bound changed its advantage; both None where there
    are no advantages. top_ids, top_logp: the teacher's most probable ids (scored, k); None in most steps (see `looked_into`).
    """

    rollout: Rollout
    logp: Tensor
    teacher_logp: Tensor
    entropy: Tensor
    learnt: int
    clipped: Tensor | None = None
    cut: Tensor | None = None
    top_ids: Tensor | None = None
    top_logp: Tensor | None = None


def engine_gap(current: Round) -> Tensor:
    """|behaviour_logp − logp| of each token (N,); with top-p and top-k what they leave out is in it."""
    behaviour_N = torch.cat([rollout.behaviour_logp for rollout in current.learnt])
    return (behaviour_N.to(current.seen["logp"].device) - current.seen["logp"]).abs()


def describe(current: Round, gap_N: Tensor, max_new_tokens: int) -> None:
    """Adds what is known of the rollouts before the update to the round's means. gap_N: as `engine_gap`."""
    seen, means, rollouts = current.seen, current.means, current.written
    means.add_tensors({name: seen[name] for name in ("reverse_kl", "entropy", "advantage", "cut") if name in seen})
    means.add_tensors({"teacher_nll": -seen["teacher_logp"], "engine_gap": gap_N})
    means.add("length", float(sum(len(rollout.completion) for rollout in rollouts)), len(rollouts))
    means.add("truncated", float(sum(rollout.truncated for rollout in rollouts)), len(rollouts))
    means.add("repetition", sum(repetition(rollout.completion) for rollout in rollouts), len(rollouts))
    add_by_position(means, seen, current.learnt, rollouts, max_new_tokens)


def scored(current: Round, stored: int, weights: Sequence[float], top: Mapping[int, tuple[Tensor, Tensor]]) -> list[Scored]:
    """The first `stored` rollouts. weights: of each rollout's tokens. top: the teacher's ids and log-probs, by rollout, where asked for."""
    sequence_N = current.sequence_N()
    seen = {name: values.cpu() for name, values in current.seen.items()}
    found = []
    for index, rollout in enumerate(current.written[:stored]):
        own = {name: values[sequence_N == index] for name, values in seen.items()}
        learnt = len(own["logp"]) if weights[index] > 0 else 0
        ids, logp = top.get(index, (None, None))
        found.append(
            Scored(rollout, own["logp"], own["teacher_logp"], own["entropy"], learnt, own.get("clipped"), own.get("cut"), ids, logp)
        )
    return found
