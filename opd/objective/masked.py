"""The probability of ids that are masked because only one of two models has them: how much of its distribution a model loses.

Shapes: `N` tokens, `C` tokens of a chunk, `M` ids outside the shared vocabulary, `H` hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor

from opd.objective.head import Head, TokenStats, at_least_float32, chunks, matmul_dtype

ROWS = 1024  # tokens at a time


@torch.no_grad()
def masked_mass(hidden_NH: Tensor, head: Head, target_N: Tensor, logp_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the probability (N,) of all ids outside the shared vocabulary without the mask, and the most probable of them (N,).

    The shared ids' normaliser follows from one of their log-probs, log z = logit / temperature - logp: apart from it only the logits of the
    few ids outside are computed. Ids are -1 where the head has a row for shared ids only.

    Args:
        hidden_NH: Final hidden states that predict the tokens.
        head: The model's head, with `masked`.
        target_N, logp_N: An id that is not masked, and its log-prob at the temperature under the mask.
    """
    assert head.masked is not None
    weight_VH, bias_V, device = head.weight_VH, head.bias_V, hidden_NH.device
    outside_M = torch.cat((head.masked, torch.arange(head.vocabulary, len(weight_VH), device=device)))
    mass_N, id_N = torch.zeros_like(logp_N), torch.full_like(target_N, -1)
    if len(outside_M) == 0:
        return mass_N, id_N
    dtype = head.dtype or matmul_dtype(weight_VH)
    bias_M = None if bias_V is None else bias_V[outside_M]
    outside = replace(head, weight_VH=weight_VH[outside_M], bias_V=bias_M, size=None, masked=None, product=None, dtype=dtype)
    plain = replace(head, masked=None)
    with torch.autocast(device.type, enabled=False):
        for part in chunks(len(hidden_NH), ROWS):
            target_C, hidden_CH = target_N[part], hidden_NH[part].to(dtype)
            raw_C = (at_least_float32(hidden_CH) * at_least_float32(weight_VH[target_C].to(dtype))).sum(-1)
            if bias_V is not None:
                raw_C = raw_C + bias_V[target_C].to(dtype)
            normaliser_C = at_least_float32(plain.shape(raw_C.to(dtype))) / temperature - logp_N[part]
            logits_CM = outside.logits(hidden_CH) / temperature
            mass_N[part] = torch.sigmoid(logits_CM.logsumexp(-1) - normaliser_C).to(mass_N)
            id_N[part] = outside_M[logits_CM.argmax(-1)]
    return mass_N, id_N


def masked_stats(role: str, hidden_NH: Tensor, head: Head, target_N: Tensor, logp_N: Tensor, temperature: float) -> TokenStats:
    """Return both results of `masked_mass` as statistics of "student" or "teacher"; nothing for a head without a mask."""
    if head.masked is None:
        return {}
    mass_N, id_N = masked_mass(hidden_NH, head, target_N, logp_N, temperature)
    return {f"{role}_masked": mass_N, f"{role}_masked_id": id_N}
