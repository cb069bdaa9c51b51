"""Control arms: the same run without what the teacher knows, by another advantage of the sampled tokens (`control`).

With the first two, sampling, scoring, evaluation and the metric `reverse_kl` stay those of the real teacher, so that two runs differ in the
advantage alone. With `self` the student's start is the teacher everywhere, as with `teacher.weights=base` (`opd.teachers.student`).

    constant    A = CONSTANT where the student's probability of the token was below UNLIKELY, else 0
    shuffled    A = log-prob that the teacher gave to the token at the same place of another completion, minus old_logp
                (with `teacher.contrast` the advantage of that token)
    self        A = log-prob under the student's start, minus old_logp

Shapes: `N` rows of the token table, of this process.
"""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from opd.data.order import derive_seed
from opd.training.tokens import Tokens

SHUFFLED = "shuffled_logp"  # the column of the token table
# arXiv 2608.31046 reports that a constant matches teachers. -1 nat is well within the usual ppo.advantage_clip, and AdamW's steps hardly
# depend on its size. Unlikely: what the student generates less than one time in ten.
CONSTANT = -1.0
UNLIKELY = 0.1


def constant_advantage(behaviour_logp_N: Tensor) -> Tensor:
    """Return `CONSTANT` for tokens that were drawn with a probability below `UNLIKELY`, 0 for others, (N,)."""
    return CONSTANT * (behaviour_logp_N < math.log(UNLIKELY)).to(behaviour_logp_N)


def shuffled_scores(tokens: Tokens, accelerator: Accelerator, seed: int, step: int) -> Tensor:
    """Return for each token the teacher's log-prob of the token at the same place of its completion's partner, (N,). Collective.

    With the column `contrast_logp` it is minus that one. Partners are drawn among the sampled completions of all processes. Places count
    trained tokens, and those of a shorter partner are repeated. Where a step has only one completion with trained tokens, its tokens get
    what makes their advantage 0.
    """
    counts = [len(rollout.trained) for rollout in tokens.rollouts]
    scores_N, alone_N = tokens.as_sampled("teacher_logp"), tokens.as_sampled("behaviour_logp")
    if "contrast_logp" in tokens.columns:
        scores_N, alone_N = scores_N - tokens.as_sampled("contrast_logp"), torch.zeros_like(alone_N)
    scores = scores_N.cpu().split(counts)
    prompts = [None if rollout.given else rollout.request.prompt.sample_id for rollout in tokens.rollouts]
    rows = [(prompt, own.tolist()) for prompt, own in zip(prompts, scores, strict=True)]
    first = sum(gather_object([len(rows)])[: accelerator.process_index])
    everyone = gather_object(rows)
    partner_of = partners([sample_id if own else None for sample_id, own in everyone], derive_seed("shuffled", seed, step))
    taken = alone_N.cpu().split(counts)
    shuffled = []
    for index, own in enumerate(taken, first):
        if index in partner_of:
            partner = torch.tensor(everyone[partner_of[index]][1], dtype=own.dtype)
            own = partner[torch.arange(len(own)) % len(partner)]
        shuffled.append(own)
    values = torch.cat(shuffled).to(tokens.columns["teacher_logp"])
    return torch.empty_like(values).index_copy_(0, tokens.sampling_order_N, values)


def partners(groups: Sequence[int | None], seed: int) -> dict[int, int]:
    """Return a random partner of each index: a permutation without fixed points, between groups as long as none has more than half.

    Args:
        groups: Of each index, the prompts of completions: those of one prompt resemble each other. None takes no part.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=generator).tolist()
    members: dict[int, list[int]] = {}
    for index in order:
        if (group := groups[index]) is not None:
            members.setdefault(group, []).append(index)
    ring = [index for group in members.values() for index in group]  # the groups one after the other: so many places on is another one
    largest = max(map(len, members.values()), default=0)
    distance = largest if largest < len(ring) else 1
    return {index: ring[(place + distance) % len(ring)] for place, index in enumerate(ring)} if len(ring) > 1 else {}
