"""The distribution a token is drawn from: temperature, then top-k, then top-p, and nothing else.

Shapes: `B` sequences, `V` vocabulary, `K` blocks of `W` ids.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 512  # ids


def behaviour_logp(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities (B, V) of the sampling distribution; −inf where truncation leaves no mass.

    top_k = 0 and top_p = 1 are off. top-p keeps the smallest set of most probable tokens whose mass reaches top_p (after top-k), always
    one at least. Tokens tied with the k-th are kept.
    """
    logits_BV = logits_BV.float() / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        mass_BV = sorted_BV.softmax(-1)
        outside_BV = mass_BV.cumsum(-1) - mass_BV >= top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(outside_BV).scatter(-1, order_BV, outside_BV), -torch.inf)
    return logits_BV.log_softmax(-1)


def draw(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token ids (B,) that the uniform numbers in [0, 1) select by inverting the cumulative distribution, summed in float64.

    A token's id depends on its own row and number alone, so what is sampled does not depend on the batch it falls into. Whole blocks of ids
    are added up first, and then the ids of one block: on a CPU a running sum over all ids takes several times as long.
    """
    blocks_BKW = functional.pad(logp_BV.exp(), (0, -logp_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass_BK = blocks_BKW.sum(-1, dtype=torch.float64)
    block_B1, rest_B1 = find(mass_BK, uniform_B.to(mass_BK)[:, None] * mass_BK.sum(-1, keepdim=True))
    place_B1, _ = find(blocks_BKW[torch.arange(len(block_B1), device=block_B1.device), block_B1[:, 0]].double(), rest_B1)
    return (block_B1 * BLOCK + place_B1)[:, 0]


def find(mass_BX: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Where (B, 1) the running sum of masses passes the target, and how much of the target is left there. Never where there is no mass."""
    end_BX = mass_BX.cumsum(-1)
    last_B1 = (end_BX < end_BX[:, -1:]).sum(-1, keepdim=True)  # rounding may put the target behind it
    place_B1 = torch.minimum(torch.searchsorted(end_BX, target_B1, right=True), last_B1)
    return place_B1, target_B1 - (end_BX - mass_BX).gather(-1, place_B1)
