"""The distribution a token is drawn from: temperature, then top-k, then top-p, and nothing else.

Shapes: `B` sequences, `V` vocabulary.
"""

import torch
from torch import Tensor


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

    A token's id depends on its own row and number alone, so what is sampled does not depend on the batch it falls into.
    """
    mass_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B.to(mass_BV)[:, None] * mass_BV[:, -1:]
    ids_B = torch.searchsorted(mass_BV, target_B1, right=True)[:, 0]
    return ids_B.clamp_max(logp_BV.shape[-1] - 1)
