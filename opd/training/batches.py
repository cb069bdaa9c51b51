"""What a step trains on: its prompts, which completions are given, which tokens are trained, and what the task's rewards add.

Prompts and given completions follow from the seed and the number of the step, so that a resumed run continues with the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.config.options import Truncated
from opd.config.schema import Config
from opd.data.given import given_rollout, takes_given
from opd.data.order import Order
from opd.data.prompts import Prompt
from opd.data.rollouts import Request, Rollout
from opd.objective import group_normalised
from opd.training.evaluator import Evaluator

Batch = tuple[list[Request], dict[int, Rollout]]


def make_batch(config: Config, prompts: Sequence[Prompt], order: Order, positions: Sequence[int], step: int) -> Batch:
    """Return a step's requests, `sampling.n` for each position, and the given rollouts of some, by their place among the requests."""
    n, limit, share = config.sampling.n, config.sampling.max_new_tokens, config.train.given_share_at(step)
    requests, given = list[Request](), dict[int, Rollout]()
    for position in positions:
        epoch, index = order.at(position)
        for attempt in range(n):
            request = Request(prompts[index], epoch, attempt)
            # Each dataset counts its own rows, so that the share holds in each, in whatever order they take turns.
            if request.prompt.given and takes_given(config.seed, n * order.turn(position) + attempt, share):
                given[len(requests)] = given_rollout(request, limit)
            requests.append(request)
    return requests, given


def with_masks(config: Config, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Mask the tokens that are not scored: those after `ppo.loss_prefix`, and all of a dropped rollout.

    Where all would be dropped, the shortest stays, with a weight of 0: other processes wait for this one's gradients.
    """
    drops = config.sampling.truncated is Truncated.drop
    dropped = {index for index, rollout in enumerate(rollouts) if drops and rollout.truncated}
    if len(dropped) == len(rollouts):
        dropped.remove(min(dropped, key=lambda index: len(rollouts[index].completion)))
    masked = []
    for index, rollout in enumerate(rollouts):
        length = len(rollout.completion)
        count = 0 if index in dropped else min(length, config.ppo.loss_prefix or length)
        mask = rollout.mask or (True,) * length
        masked.append(rollout if count == length else rollout.masked(mask[:count] + (False,) * (length - count)))
    return masked


def task_bonus(config: Config, evaluator: Evaluator, rollouts: Sequence[Rollout], device: torch.device) -> Tensor | None:
    """Return `ppo.reward_coef` times each rollout's reward, normalised among its prompt's completions (R,); None where it is off.

    Given completions, and those that were not judged, get 0 and are not compared with.
    """
    if config.ppo.reward_coef == 0:
        return None
    sampled = torch.tensor([row for row, rollout in enumerate(rollouts) if not rollout.given], dtype=torch.long)
    rewards = evaluator.judge([rollouts[row] for row in sampled.tolist()])
    judged = torch.tensor([reward is not None for reward in rewards], dtype=torch.bool)
    values = torch.tensor([reward for reward in rewards if reward is not None])
    bonus_R = torch.zeros(len(rollouts))
    bonus_R[sampled[judged]] = config.ppo.reward_coef * group_normalised(values, sampled[judged] // config.sampling.n)
    return bonus_R.to(device)
