"""What is known of a teacher's next-token distributions.

Shapes: `N` trained tokens, `C` tokens of a chunk, `K` ids, `V` vocabulary, `H` hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objective.head import Head, TokenStats, chunked_stats
from opd.objective.logp import scaled_logp, token_logp
from opd.objective.masked import masked_stats


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """The teacher's final hidden states (N, H) and its output head: its next-token distributions, computed a chunk at a time."""

    hidden_NH: Tensor
    head: Head

    @torch.no_grad()
    def logp(self, part: slice, temperature: float) -> Tensor:
        """Return the log-probs (C, V) at the temperature for a chunk of the tokens."""
        return scaled_logp(self.head.logits(self.hidden_NH[part]), temperature)

    def token_logp(self, target_N: Tensor, temperature: float) -> Tensor:
        """Return the log-probs (N,) of the given ids at the temperature."""

        def pick(logits_CV: Tensor, part: slice) -> TokenStats:
            return {"logp": token_logp(logits_CV, target_N[part], temperature)[0]}

        return chunked_stats(self.hidden_NH, self.head, pick)["logp"]

    def columns(self, target_N: Tensor, temperature: float) -> TokenStats:
        """Return `teacher_logp` of the given ids and, where the head has a mask, what `masked_stats` returns; (N,) each."""
        logp_N = self.token_logp(target_N, temperature)
        return {"teacher_logp": logp_N, **masked_stats("teacher", self.hidden_NH, self.head, target_N, logp_N, temperature)}

    def top(self, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the k most probable ids of each position and their log-probs at the temperature, (N, k) each, best first."""

        def best(logits_CV: Tensor, part: slice) -> TokenStats:
            logp_CK, id_CK = scaled_logp(logits_CV, temperature).topk(min(k, logits_CV.shape[-1]), -1)
            return {"id": id_CK, "logp": logp_CK}

        top = chunked_stats(self.hidden_NH, self.head, best)
        return top["id"], top["logp"]


@dataclass(frozen=True, slots=True)
class TeacherTop:
    """The teacher's most probable ids at each position: all that a server sends of its distributions.

    Args:
        id_NK: The k most probable ids.
        logp_NK: Their log-probs at the temperature of the objective.
        token_logp_N: The log-prob of the sampled token, which need not be among them.
    """

    id_NK: Tensor
    logp_NK: Tensor
    token_logp_N: Tensor

    def with_tail(self, part: slice) -> Tensor:
        """Return the log-probs (C, K + 1) of the ids and of one bucket for all others, at least float32's rounding."""
        logp_CK = self.logp_NK[part]
        rest_C1 = (1 - logp_CK.double().exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)
        return torch.cat((logp_CK, rest_C1.log().to(logp_CK)), -1)
