"""From hidden states to per-token losses without ever holding the logits of a whole batch.

Shapes: `N` trained tokens, `C` tokens of a chunk, `V` vocabulary, `H` hidden.

A language-model head computes (N, V) logits, of which a loss needs one number per token. Here the logits exist for one chunk at a time:
while a chunk's logits exist, the gradient of its loss is computed as well and added to the gradients of the hidden states (N, H) and of
the head (V, H). The backward pass only scales them. This takes as many matrix products as plain autograd, and memory that does not grow
with N V.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TokenStats = dict[str, Tensor]
# (logits_CV in any dtype, the rows of the chunk) -> (loss_C, per-token statistics of shape C). It may overwrite the logits.
TokenLoss = Callable[[Tensor, slice], tuple[Tensor, TokenStats]]

# Of a float32 copy of the logits on a CPU. The C library maps more than 32 MiB again for each tensor, and clearing these pages takes longer
# than the arithmetic; less makes the operations short.
PIECE_BYTES = 16 * 2**20
MASKED = -1e30  # the logit of a masked id: of probability 0 at any temperature, and finite, so that 0 log 0 is 0


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer of a causal language model: softcap tanh(scale (hidden weight^T + bias) / softcap), masked.

    Args:
        size: Only the first so many ids count: student and teacher may pad the same vocabulary to different widths.
        rows: How many tokens' logits exist at a time; None for a modest number.
        dtype: Of the matrix product; None for autocast's, else the weight's.
        product: Computes the matrix product with all rows of the weight.
        masked: Ids below `size` that get no probability, because only one of student and teacher has them. None where both have the same
            vocabulary; with an empty tensor they differ in rows beyond `size`.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    size: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None
    dtype: torch.dtype | None = None
    product: Callable[[Tensor], Tensor] | None = None
    masked: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        return self.size if self.size is not None else self.weight_VH.shape[0]

    @property
    def chunk(self) -> int:
        return self.rows or chunk_rows(self.vocabulary)

    def raw(self, hidden_NH: Tensor) -> Tensor:
        """Return the matrix product (N, V)."""
        if self.product is not None:
            return self.product(hidden_NH)[:, : self.size]
        weight_VH, bias_V = self.weight_VH[: self.size], None if self.bias_V is None else self.bias_V[: self.size]
        dtype = self.dtype or matmul_dtype(weight_VH)
        with torch.autocast(weight_VH.device.type, enabled=False):
            return F.linear(hidden_NH.to(dtype), weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype))

    def shape(self, raw_NV: Tensor) -> Tensor:
        """Apply scale and soft cap, in float32 at least, and the mask; without any of them, the product is returned as it is."""
        logits_NV = raw_NV
        if self.scale != 1.0 or self.softcap is not None:
            logits_NV = at_least_float32(raw_NV) * self.scale
            logits_NV = logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV if self.masked is None or len(self.masked) == 0 else logits_NV.index_fill(-1, self.masked, MASKED)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits (N, V) as the model itself computes them, in float32 at least."""
        return at_least_float32(self.shape(self.raw(hidden_NH)))


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype for matrix products where it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def chunks(total: int, size: int, ends: Sequence[int] | None = None) -> list[slice]:
    """Return slices of at most `size` that cover `total`.

    Args:
        ends: Where a slice may end, ascending, with `total` last; one is longer than `size` where it may not end before. None: anywhere.
    """
    if ends is None:
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]
    result, start = [], 0
    while start < total:
        fitting = bisect_right(ends, start + size) - 1
        stop = ends[fitting] if fitting >= 0 and ends[fitting] > start else ends[fitting + 1]
        result.append(slice(start, stop))
        start = stop
    return result


def pieces(part: slice, vocabulary: int, device: torch.device, ends: Sequence[int] | None = None) -> list[slice]:
    """Return the slices of a chunk of which the losses are computed, one after the other; a GPU takes a chunk as a whole."""
    if device.type != "cpu":
        return [part]
    own = None if ends is None else [end - part.start for end in ends if part.start < end <= part.stop]
    small = chunks(part.stop - part.start, max(1, PIECE_BYTES // (4 * vocabulary)), own)
    return [slice(part.start + piece.start, part.start + piece.stop) for piece in small]


def chunk_rows(vocabulary: int, budget_bytes: int = 304 * 2**20) -> int:
    """Return how many tokens, at least 16, fit in the budget with three float32 copies of their logits: `exact` makes three on a GPU."""
    return max(16, budget_bytes // (3 * 4 * vocabulary))


def chunked_loss(
    hidden_NH: Tensor, head: Head, token_loss: TokenLoss, weight_N: Tensor | None = None, ends: Sequence[int] | None = None
) -> tuple[Tensor, TokenStats]:
    """Return the sum over tokens of `weight * token_loss`, differentiable in hidden states, head weight and bias, and the statistics.

    Args:
        hidden_NH: Final hidden states at the positions that predict the trained tokens.
        head: The output layer.
        token_loss: Called once per chunk with its logits; returns losses and detached statistics, each of shape (C,).
        weight_N: Weight of each token's loss, 1 if omitted.
        ends: Where a chunk may end, as in `chunks`: the loss of a span needs all of its tokens.

    Returns:
        A scalar, and statistics as (N,) tensors.
    """
    seen: list[TokenStats] = []
    if hidden_NH.shape[0] == 0:
        return hidden_NH.sum() + 0.0 * head.weight_VH[0, 0], {}
    parts = [pieces(part, head.vocabulary, hidden_NH.device, ends) for part in chunks(hidden_NH.shape[0], head.chunk, ends)]
    loss = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head.weight_VH, head.bias_V, head, token_loss, weight_N, parts, seen
    )
    return loss, {name: torch.cat([stats[name] for stats in seen]) for name in seen[0]}


@torch.no_grad()
def chunked_stats(hidden_NH: Tensor, head: Head, token_stats: Callable[[Tensor, slice], TokenStats]) -> TokenStats:
    """Return per-token statistics of the logits, (N,) each, a chunk at a time and without gradient."""
    parts = [piece for part in chunks(len(hidden_NH), head.chunk) for piece in pieces(part, head.vocabulary, hidden_NH.device)]
    seen = [token_stats(head.shape(head.raw(hidden_NH[part])), part) for part in parts]
    return {name: torch.cat([stats[name] for stats in seen]) for name in seen[0]} if seen else {}


def _chunk_gradient(
    head: Head, token_loss: TokenLoss, raw_CV: Tensor, part: slice, weight_C: Tensor | None
) -> tuple[Tensor, Tensor, TokenStats]:
    """Return a chunk's loss, its gradient with respect to the matrix product, and its statistics. The graph does not outlive the call."""
    with torch.enable_grad():
        raw_CV = raw_CV.detach().requires_grad_()
        loss_C, stats = token_loss(head.shape(raw_CV), part)
        loss = (loss_C if weight_C is None else loss_C * weight_C).sum()
        (grad_CV,) = torch.autograd.grad(loss, raw_CV)
    return loss.detach(), grad_CV, stats


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        token_loss: TokenLoss,
        weight_N: Tensor | None,
        parts: list[list[slice]],
        seen: list[TokenStats],
    ) -> Tensor:
        size, dtype = head.vocabulary, head.dtype or matmul_dtype(weight_VH)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        # The sum over chunks is float32: rounding it to bf16 at each chunk would bias training.
        grad_weight_VH = torch.empty_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32)) if needs_weight else None
        if grad_weight_VH is not None:
            grad_weight_VH[size:].zero_()
        grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None and needs_bias else None
        weight_cast_VH = weight_VH[:size].to(dtype)
        bias_cast_V = None if bias_V is None else bias_V[:size].to(dtype)
        total = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        rows = max(part[-1].stop - part[0].start for part in parts)
        room_CV = weight_cast_VH.new_empty(rows, size)  # allocating it for each chunk would cost time
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for part_pieces in parts:
                part = slice(part_pieces[0].start, part_pieces[-1].stop)
                hidden_CH = hidden_NH[part].to(dtype)
                raw_CV = torch.mm(hidden_CH, weight_cast_VH.T, out=room_CV[: len(hidden_CH)])
                if bias_cast_V is not None:
                    raw_CV += bias_cast_V
                grad_CV = raw_CV
                for piece in part_pieces:
                    own = slice(piece.start - part.start, piece.stop - part.start)
                    weight = None if weight_N is None else weight_N[piece]
                    loss, gradient, stats = _chunk_gradient(head, token_loss, raw_CV[own], piece, weight)
                    total += loss
                    seen.append(stats)
                    if len(part_pieces) == 1:
                        grad_CV = gradient
                    else:  # a piece's logits have served: its gradient takes their place
                        grad_CV[own] = gradient
                if grad_hidden_NH is not None:
                    grad_hidden_NH[part] = grad_CV @ weight_cast_VH
                if grad_weight_VH is not None:
                    first = part.start == 0  # overwrites; the others add
                    if dtype == grad_weight_VH.dtype:
                        grad_weight_VH[:size].addmm_(grad_CV.T, hidden_CH, beta=0 if first else 1)
                    elif grad_CV.is_cuda and not first:
                        torch.addmm(grad_weight_VH[:size], grad_CV.T, hidden_CH, out_dtype=torch.float32, out=grad_weight_VH[:size])
                    elif first:
                        grad_weight_VH[:size] = grad_CV.T @ hidden_CH
                    else:
                        grad_weight_VH[:size] += grad_CV.T @ hidden_CH
                if grad_bias_V is not None:
                    grad_bias_V[:size] += grad_CV.sum(0)
                del grad_CV
        ctx.gradients = (grad_hidden_NH, grad_weight_VH, grad_bias_V)
        return total.to(torch.promote_types(hidden_NH.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden, weight, bias = (None if gradient is None else gradient.mul_(scale) for gradient in ctx.gradients)
        ctx.gradients = None  # scaled in place: a second backward pass must fail rather than scale again
        return hidden, weight, bias, None, None, None, None, None
