"""The per-token losses that `chunked_loss` is called with, one function for each `ppo.estimator`.

Each takes what is known of the N kept tokens and returns a `TokenLoss`: from a chunk's logits (C, V) to losses (C,) in nats and
detached statistics (C,): `logp` and `teacher_logp` of the token at the sampling temperature, the student's `entropy`, `reverse_kl`
(KL(student‖teacher) at that position, estimated from the token by `sampled`), and for `sampled` also `ratio`, `clipped` (0 or 1), `advantage` and `cut` (0 or 1: the advantage
clip changed it).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objective.divergences import reverse_kl, with_tail
from opd.objective.head import Head, TokenLoss, TokenStats
from opd.objective.surrogate import advantages, clipped_surrogate

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Clips:
    """Bounds of the sampled objective: the ratio within 1 − low … 1 + high, |advantage| ≤ advantage, importance weight ≤ importance."""

    low: float = 0.2
    high: float = 0.2
    advantage: float | None = None
    importance: float | None = None


def scaled_logp(logits_CV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (C, V) at the temperature."""
    return (logits_CV / temperature).log_softmax(-1)


def entropy(logp_CV: Tensor) -> Tensor:
    """In nats, (C,)."""
    return -(logp_CV.exp() * logp_CV).sum(-1)


def token_logp(logits_CV: Tensor, target_C: Tensor, temperature: float) -> Tensor:
    """log-probability (C,) of the given ids at the temperature, without the log-probabilities of all others."""
    logits_CV = logits_CV / temperature
    return logits_CV.gather(-1, target_C[:, None])[:, 0] - logits_CV.logsumexp(-1)


def importance_weights(old_logp_N: Tensor, behaviour_logp_N: Tensor, cap: float) -> Tensor:
    """exp(old_logp − behaviour_logp), detached and cut at `cap`: 1 where the sampler drew from the distribution that is scored."""
    return (old_logp_N - behaviour_logp_N).detach().exp().clamp_max(cap)


def sampled(
    target_N: Tensor,
    teacher_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    old_logp_N: Tensor | None,
    temperature: float,
    clips: Clips,
) -> TokenLoss:
    """The clipped surrogate on the token that was written.

    old_logp_N: the student's log-probs before the update, or None at the first inner step, where they are the ones being computed.
    """

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        logp_C = token_logp(logits_CV, target_N[part], temperature)
        old_C = logp_C.detach() if old_logp_N is None else old_logp_N[part]
        gap_C = teacher_logp_N[part] - old_C
        advantage_C = advantages(teacher_logp_N[part], old_C, clips.advantage)
        loss_C, clipped_C = clipped_surrogate(logp_C, old_C, advantage_C, clips.low, clips.high)
        if clips.importance is not None:
            loss_C = loss_C * importance_weights(old_C, behaviour_logp_N[part], clips.importance)
        with torch.no_grad():
            stats = {
                "logp": logp_C.detach(),
                "teacher_logp": teacher_logp_N[part],
                "entropy": entropy(scaled_logp(logits_CV, temperature)),
                "reverse_kl": -gap_C,
                "ratio": (logp_C - old_C).exp(),
                "clipped": clipped_C.float(),
                "advantage": advantage_C,
                "cut": (advantage_C != gap_C).float(),
            }
        return loss_C, stats

    return loss


def exact(target_N: Tensor, teacher_hidden_NH: Tensor, teacher_head: Head, temperature: float, divergence: Divergence) -> TokenLoss:
    """The divergence over the whole vocabulary at each position: the sampled objective without its sampling noise."""

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        student_CV = scaled_logp(logits_CV, temperature)
        with torch.no_grad():
            teacher_CV = scaled_logp(teacher_head.logits(teacher_hidden_NH[part]), temperature).to(student_CV)
        loss_C = divergence(student_CV, teacher_CV)
        with torch.no_grad():
            stats = {
                "logp": student_CV.gather(-1, target_N[part][:, None])[:, 0],
                "teacher_logp": teacher_CV.gather(-1, target_N[part][:, None])[:, 0],
                "entropy": entropy(student_CV),
                "reverse_kl": reverse_kl(student_CV, teacher_CV),
            }
        return loss_C, stats

    return loss


def topk(
    target_N: Tensor, teacher_hidden_NH: Tensor, teacher_head: Head, temperature: float, divergence: Divergence, k: int
) -> TokenLoss:
    """The divergence over the teacher's k most probable ids and one bucket for the rest; k = V is `exact`."""

    def on_top(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        top_CK = teacher_CV.topk(min(k, teacher_CV.shape[-1]), -1).indices
        return divergence(with_tail(student_CV, top_CK), with_tail(teacher_CV, top_CK))

    return exact(target_N, teacher_hidden_NH, teacher_head, temperature, on_top)
