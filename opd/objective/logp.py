"""Log-probs of whole distributions, and of given ids without a copy of the logits.

Shapes: `C` tokens of a chunk, `R` rows, `V` vocabulary.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from opd.objective.head import at_least_float32, chunks


def scaled_logp(logits_CV: Tensor, temperature: float) -> Tensor:
    """Return log-probs (C, V) at the temperature, in float32 at least."""
    return (at_least_float32(logits_CV) / temperature).log_softmax(-1)


def entropy(logp_CV: Tensor) -> Tensor:
    """Return the entropy (C,) in nats."""
    return -logp_CV.exp().mul_(logp_CV).sum(-1)


def token_logp(logits_CV: Tensor, target_C: Tensor, temperature: float, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Return the log-prob of the given ids at the temperature, differentiable, and the entropy in nats, detached; (C,) each.

    Args:
        overwrite: Let the backward pass write the gradient over the logits, which nothing else may need.
    """
    fused = logits_CV.is_cuda and has_kernels()
    logits_CV = logits_CV if fused else at_least_float32(logits_CV)
    logp_C, entropy_C = _TokenLogp.apply(logits_CV, target_C, temperature, overwrite, fused)  # type: ignore[no-untyped-call]
    return logp_C, entropy_C


@cache
def has_kernels() -> bool:
    """Return whether Triton is installed, as it is with every CUDA build of torch."""
    return find_spec("triton") is not None


class _TokenLogp(torch.autograd.Function):
    """Autograd would make many copies of the logits; this makes one of a few rows at a time, or none with the kernels."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, target_C: Tensor, temperature: float, overwrite: bool, fused: bool) -> tuple[Tensor, Tensor]:
        if fused:
            from opd.objective import kernels

            logp_C, entropy_C, normaliser_C = kernels.forward(logits_CV, target_C, temperature)
        else:
            rows = max(1, len(logits_CV) // 16)
            work_RV = torch.empty_like(logits_CV[:rows])
            highest_C, total_C, sum_C = logits_CV.amax(-1), *logits_CV.new_empty(2, len(logits_CV))
            for part in chunks(len(logits_CV), rows):
                exps_RV = torch.sub(logits_CV[part], highest_C[part, None], out=work_RV[: part.stop - part.start]).div_(temperature).exp_()
                total_C[part] = exps_RV.sum(-1)
                sum_C[part] = torch.einsum("rv,rv->r", exps_RV, logits_CV[part])
            normaliser_C = highest_C / temperature + total_C.log()
            logp_C = logits_CV.gather(-1, target_C[:, None])[:, 0] / temperature - normaliser_C
            entropy_C = normaliser_C - sum_C / total_C / temperature
        ctx.save_for_backward(logits_CV, target_C, normaliser_C)
        ctx.temperature, ctx.overwrite, ctx.fused = temperature, overwrite, fused
        ctx.mark_non_differentiable(entropy_C)
        return logp_C, entropy_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """d logp / d logits = (one-hot - p) / temperature."""
        logits_CV, target_C, normaliser_C = ctx.saved_tensors
        grad_CV = logits_CV.detach() if ctx.overwrite else logits_CV.clone()
        if ctx.fused:
            from opd.objective import kernels

            kernels.backward(grad_CV, target_C, normaliser_C, grad_outputs[0].contiguous(), ctx.temperature)
        else:
            grad_C1 = grad_outputs[0][:, None] / ctx.temperature
            grad_CV.div_(ctx.temperature).sub_(normaliser_C[:, None]).exp_().mul_(-grad_C1)
            grad_CV.scatter_add_(-1, target_C[:, None], grad_C1)
        return grad_CV, None, None, None, None
