"""The mathematics: pure functions of tensors, usable and tested without the rest of `opd`."""

from opd.objective.divergences import forward_kl, jsd, kl, reverse_kl, with_tail
from opd.objective.head import Head, chunk_rows, chunked_loss, chunked_stats
from opd.objective.logp import token_logp
from opd.objective.lookahead import Longer
from opd.objective.losses import Clips, Sampled, anchored, clipped_surrogate, discounted, exact, group_normalised, sampled, topk
from opd.objective.masked import masked_mass, masked_stats
from opd.objective.sampling import behaviour_logp, draw
from opd.objective.spans import ScoredSpans, sum_over_spans
from opd.objective.teacher import TeacherStates, TeacherTop

__all__ = [
    "Clips", "Head", "Longer", "Sampled", "ScoredSpans", "TeacherStates", "TeacherTop", "anchored", "behaviour_logp", "chunk_rows",
    "chunked_loss", "chunked_stats", "clipped_surrogate", "discounted", "draw", "exact", "forward_kl", "group_normalised", "jsd", "kl",
    "masked_mass", "masked_stats", "reverse_kl", "sampled", "sum_over_spans", "token_logp", "topk", "with_tail",
]  # fmt: skip
