"""An anchor: the KL to the student's start, added to a divergence between whole distributions.

`sampled` has it in the advantage, which gives the same gradient in expectation: `opd.objective.losses.Sampled.reference_logp_N`.

Shapes: `N` trained tokens, `C` tokens of a chunk, `V` vocabulary.
"""

import torch
from torch import Tensor

from opd.objective.divergences import reverse_kl
from opd.objective.head import TokenLoss, TokenStats
from opd.objective.logp import scaled_logp
from opd.objective.teacher import TeacherStates


def anchored(loss: TokenLoss, reference: TeacherStates, temperature: float, coefficient: float, given_N: Tensor | None = None) -> TokenLoss:
    """Return the loss plus `coefficient` times KL(student‖reference) over the vocabulary, which becomes the statistic `reference_kl`.

    Args:
        loss: May not overwrite the logits.
        reference: The student's start.
        given_N: Tokens of given completions, which have no anchor: it is about what the student itself says.
    """

    def with_anchor(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        loss_C, stats = loss(logits_CV, part)
        student_CV = scaled_logp(logits_CV, temperature)
        kl_C = reverse_kl(student_CV, reference.logp(part, temperature).to(student_CV))
        if given_N is not None:
            kl_C = torch.where(given_N[part], 0.0, kl_C)
        return loss_C + coefficient * kl_C, stats | {"reference_kl": kl_C.detach()}

    return with_anchor
