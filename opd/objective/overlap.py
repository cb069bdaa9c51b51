"""Top-k overlap: how much of what the teacher would say next is also among what the student would.

Where it is small, the teacher scores tokens that it would not have chosen itself, and its advantages say little about better ones.
Shapes: `C` tokens of a chunk, `K` ids, `V` vocabulary.
"""

import torch
from torch import Tensor

OVERLAP_K = 16  # most of the probability of both models is on so many ids
SHARE, MASS = "overlap/share", "overlap/mass"
OVERLAP = (SHARE, MASS)


@torch.no_grad()
def overlap(student_CV: Tensor, teacher_id_CK: Tensor, teacher_logp_CK: Tensor) -> dict[str, Tensor]:
    """Return which part of the teacher's K most probable ids is among the student's K: their share, and that of their probability, (C,).

    Args:
        student_CV: The student's log-probs or logits.
        teacher_id_CK: The teacher's most probable ids.
        teacher_logp_CK: Their log-probs.
    """
    student_id_CK = student_CV.topk(teacher_id_CK.shape[-1], -1).indices
    is_common_CK = (teacher_id_CK[:, :, None] == student_id_CK[:, None, :]).any(-1)
    probability_CK = teacher_logp_CK.softmax(-1)
    return {SHARE: is_common_CK.to(probability_CK).mean(-1), MASS: (probability_CK * is_common_CK).sum(-1)}


@torch.no_grad()
def overlap_of_distributions(student_CV: Tensor, teacher_CV: Tensor) -> dict[str, Tensor]:
    """Return the overlap of the `OVERLAP_K` most probable ids."""
    logp_CK, id_CK = teacher_CV.topk(min(OVERLAP_K, teacher_CV.shape[-1]), -1)
    return overlap(student_CV, id_CK, logp_CK)
