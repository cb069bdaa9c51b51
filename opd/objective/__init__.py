"""Floor 1: the mathematics, pure functions of tensors. Usable and tested without the rest of `opd`."""

from opd.objective.behaviour import behaviour_logp, draw
from opd.objective.divergences import forward_kl, jsd, kl, reverse_kl, skew, with_tail
from opd.objective.head import Head, chunk_rows, chunked_loss, chunked_stats
from opd.objective.surrogate import advantages, clipped_surrogate

__all__ = [
    "Head",
    "advantages",
    "behaviour_logp",
    "chunk_rows",
    "chunked_loss",
    "chunked_stats",
    "clipped_surrogate",
    "draw",
    "forward_kl",
    "jsd",
    "kl",
    "reverse_kl",
    "skew",
    "with_tail",
]
