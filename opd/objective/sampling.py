"""The behaviour policy, from which tokens are drawn: temperature, then top-k, then top-p, and nothing else.

Shapes: `B` sequences, `V` vocabulary, `K` blocks of `W` ids.
"""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 512  # ids


def behaviour_logp(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the log-probs (B, V) of the behaviour policy; -inf where truncation leaves no mass.

    Args:
        logits_BV: The model's logits.
        temperature: Divides the logits.
        top_k: Tokens kept; tokens tied with the k-th are kept too; 0 is off.
        top_p: Keep the smallest set of most probable tokens whose mass (after top-k) reaches it, at least one; 1 is off.
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
    """Return the ids (B,) that uniform numbers in [0, 1) select by inverting the cumulative distribution, in float64.

    An id depends on its own row and number only, so samples do not depend on the batch. Blocks of ids are summed first, then the ids of
    one block: on a CPU a running sum over all ids takes several times as long.
    """
    blocks_BKW = functional.pad(logp_BV.exp(), (0, -logp_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    mass_BK = blocks_BKW.sum(-1, dtype=torch.float64)
    block_B1, rest_B1 = find(mass_BK, uniform_B.to(mass_BK)[:, None] * mass_BK.sum(-1, keepdim=True))
    place_B1, _ = find(blocks_BKW[torch.arange(len(block_B1), device=block_B1.device), block_B1[:, 0]].double(), rest_B1)
    return (block_B1 * BLOCK + place_B1)[:, 0]


def find(mass_BX: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index (B, 1) at which the running sum of masses passes the target, never one without mass, and the rest of the target."""
    end_BX = mass_BX.cumsum(-1)
    last_B1 = (end_BX < end_BX[:, -1:]).sum(-1, keepdim=True)  # rounding may put the target beyond it
    place_B1 = torch.minimum(torch.searchsorted(end_BX, target_B1, right=True), last_B1)
    return place_B1, target_B1 - (end_BX - mass_BX).gather(-1, place_B1)
