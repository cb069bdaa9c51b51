"""Divergences between two next-token distributions over the same vocabulary, position by position, in nats.

All take finite log-probabilities of shape (N, V) and return (N,). `student` carries the gradient.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def kl(p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
    """Return KL(p‖q) = sum of p (log p - log q), differentiable in both."""
    result: Tensor = _KL.apply(p_logp_NV, q_logp_NV)  # type: ignore[no-untyped-call]
    return result


class _KL(torch.autograd.Function):
    """Autograd would keep three more copies of the distributions."""

    @staticmethod
    def forward(ctx: Any, p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
        ctx.save_for_backward(p_logp_NV, q_logp_NV)
        return (p_logp_NV - q_logp_NV).mul_(p_logp_NV.exp()).sum(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """dKL/dlog p = p (log p - log q + 1) and dKL/dlog q = -p."""
        p_logp_NV, q_logp_NV = ctx.saved_tensors
        grad_N1 = grad_outputs[0][:, None]
        p_NV = p_logp_NV.exp()
        grad_p = (p_logp_NV - q_logp_NV).add_(1.0).mul_(p_NV).mul_(grad_N1) if ctx.needs_input_grad[0] else None
        return grad_p, p_NV.mul_(-grad_N1) if ctx.needs_input_grad[1] else None


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return KL(student‖teacher). Its gradient in the student's logits is p (log(p/q) - KL)."""
    return kl(student_NV, teacher_NV)


def forward_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return KL(teacher‖student). Its gradient in the student's logits is p - q."""
    return kl(teacher_NV, student_NV)


def jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """Return the generalised Jensen-Shannon divergence with m = beta teacher + (1 - beta) student.

    beta KL(teacher‖m) + (1 - beta) KL(student‖m), as in GKD (Agarwal et al. 2024, arXiv 2306.13649). It vanishes at both ends, which are
    therefore defined as its limits divided by beta and 1 - beta: 0 is the forward KL, 1 the reverse KL; 0.5 is symmetric.
    """
    if beta == 0:
        return forward_kl(student_NV, teacher_NV)
    if beta == 1:
        return reverse_kl(student_NV, teacher_NV)
    mixture_NV = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
    return beta * kl(teacher_NV, mixture_NV) + (1 - beta) * kl(student_NV, mixture_NV)


def with_tail(logp_NV: Tensor, top_NK: Tensor) -> Tensor:
    """Return the log-probs (N, K + 1) of the ids `top_NK` and of one bucket for all other ids.

    Without the bucket, a divergence over the K ids would be lowered by moving mass out of them. With K = V there is no bucket: (N, V).
    """
    kept_NK = logp_NV.gather(-1, top_NK)
    if top_NK.shape[-1] == logp_NV.shape[-1]:
        return kept_NK
    rest_NV = logp_NV.scatter(-1, top_NK, -torch.inf)
    return torch.cat((kept_NK, rest_NV.logsumexp(-1, keepdim=True)), -1)


def named_divergence(name: str, beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the divergence called `name`, a function of the student's and the teacher's log-probs."""
    known: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "jsd": partial(jsd, beta=beta),
    }
    return known[name]
