"""The method's own objective: a token-level advantage in a clipped surrogate (PPO, Schulman et al. 2017, arXiv 1707.06347).

All tensors are (N,): one entry for each kept completion token, log-probabilities in nats at the sampling temperature.
"""

import torch
from torch import Tensor


def clipped_surrogate(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """−min(ratio·A, clip(ratio, 1 − low, 1 + high)·A) and whether the clip holds the token back, with ratio = exp(logp − old_logp).

    At the first inner step the ratio is 1: the value is −A and the gradient that of −A·logp.
    """
    ratio_N = (logp_N - old_logp_N.detach()).exp()
    advantage_N = advantage_N.detach()
    free_N, held_N = ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N
    return -torch.minimum(free_N, held_N), (held_N < free_N).detach()
