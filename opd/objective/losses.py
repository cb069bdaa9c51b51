"""The per-token losses that `chunked_loss` is called with, one function for each `ppo.estimator`.

Each takes what is known of the N kept tokens and returns a `TokenLoss`: from a chunk's logits (C, V) to losses (C,) in nats and
detached statistics (C,). These are `logp` and `teacher_logp` of the token at the sampling temperature, the student's `entropy`,
`reverse_kl` (KL(student‖teacher) at that position, estimated from the token by `sampled`), and for `sampled` also `ratio`, `clipped`
(0 or 1), `advantage` and `cut` (0 or 1: the advantage clip changed it).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.objective.divergences import reverse_kl, with_tail
from opd.objective.head import Head, TokenLoss, TokenStats, chunked_stats, chunks
from opd.objective.surrogate import clipped_surrogate

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
    return -logp_CV.exp().mul_(logp_CV).sum(-1)


def token_logp(logits_CV: Tensor, target_C: Tensor, temperature: float, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of the given ids at the temperature, differentiable, and the entropy in nats, detached; (C,) each.

    overwrite: the backward pass may put the gradient of the logits where the logits are, which nobody may need any more.
    """
    logp_C, entropy_C = _TokenLogp.apply(logits_CV, target_C, temperature, overwrite)  # type: ignore[no-untyped-call]
    return logp_C, entropy_C


class _TokenLogp(torch.autograd.Function):
    """Written out because autograd would make many copies of the logits. This makes one of some rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, target_C: Tensor, temperature: float, overwrite: bool) -> tuple[Tensor, Tensor]:
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
        ctx.temperature, ctx.overwrite = temperature, overwrite
        ctx.mark_non_differentiable(entropy_C)
        return logp_C, entropy_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """∂logp/∂logits = (one-hot − p) / temperature."""
        logits_CV, target_C, normaliser_C = ctx.saved_tensors
        grad_C1 = grad_outputs[0][:, None] / ctx.temperature
        grad_CV = logits_CV.detach() if ctx.overwrite else logits_CV.clone()
        grad_CV.div_(ctx.temperature).sub_(normaliser_C[:, None]).exp_().mul_(-grad_C1)
        return grad_CV.scatter_add_(-1, target_C[:, None], grad_C1), None, None, None


def importance_weights(old_logp_N: Tensor, behaviour_logp_N: Tensor, cap: float) -> Tensor:
    """exp(old_logp − behaviour_logp), detached and cut at `cap`: 1 where the sampler drew from the distribution that is scored."""
    return (old_logp_N - behaviour_logp_N).detach().exp().clamp_max(cap)


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """The teacher's final hidden states (N, H) at the kept positions and its output head: its whole distributions, made chunk by chunk."""

    hidden_NH: Tensor
    head: Head

    @torch.no_grad()
    def logp(self, part: slice, temperature: float) -> Tensor:
        """Log-probabilities (C, V) at the temperature, for a chunk of the kept tokens."""
        return scaled_logp(self.head.logits(self.hidden_NH[part]), temperature)

    def token_logp(self, target_N: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (N,) of the given ids at the temperature."""

        def pick(logits_CV: Tensor, part: slice) -> TokenStats:
            return {"logp": token_logp(logits_CV, target_N[part], temperature)[0]}

        return chunked_stats(self.hidden_NH, self.head, pick)["logp"]

    def top(self, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The k most probable ids of each position and their log-probabilities at the temperature, (N, k) each, the best first."""

        def best(logits_CV: Tensor, part: slice) -> TokenStats:
            logp_CK, id_CK = scaled_logp(logits_CV, temperature).topk(min(k, logits_CV.shape[-1]), -1)
            return {"id": id_CK, "logp": logp_CK}

        found = chunked_stats(self.hidden_NH, self.head, best)
        return found["id"], found["logp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the sampled objective knows of N tokens.

    target_N: the tokens. teacher_logp_N, behaviour_logp_N: their log-probs under the teacher and the sampler. old_logp_N: under the student
    before the update; None at the first inner step, where it is what is being computed. advantage_N: takes the place of
    teacher_logp − old_logp, for example discounted sums of it; None otherwise. bonus_N: added to the advantage after its clip, for example
    a task reward. baseline: the exact KL(student‖teacher) of each position is subtracted as the expectation of −advantage, which leaves the
    expected gradient as it is and takes noise out of it; None for no baseline.
    """

    target_N: Tensor
    teacher_logp_N: Tensor
    behaviour_logp_N: Tensor
    old_logp_N: Tensor | None = None
    advantage_N: Tensor | None = None
    bonus_N: Tensor | None = None
    baseline: TeacherStates | None = None


def sampled(tokens: Sampled, temperature: float, clips: Clips, overwrite: bool = False) -> TokenLoss:
    """The clipped surrogate on the token that was written. overwrite: as in `token_logp`, right within `chunked_loss`."""

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        logp_C, entropy_C = token_logp(logits_CV, tokens.target_N[part], temperature, overwrite)
        old_C = logp_C.detach() if tokens.old_logp_N is None else tokens.old_logp_N[part]
        teacher_C = tokens.teacher_logp_N[part]
        with torch.no_grad():
            gap_C = teacher_C - old_C if tokens.advantage_N is None else tokens.advantage_N[part]
            if tokens.baseline is not None:
                student_CV = scaled_logp(logits_CV, temperature)
                gap_C = gap_C + reverse_kl(student_CV, tokens.baseline.logp(part, temperature).to(student_CV))
            advantage_C = gap_C if clips.advantage is None else gap_C.clamp(-clips.advantage, clips.advantage)
            stats = {"cut": (advantage_C != gap_C).float()}
            if tokens.bonus_N is not None:
                advantage_C = advantage_C + tokens.bonus_N[part]
        loss_C, clipped_C = clipped_surrogate(logp_C, old_C, advantage_C, clips.low, clips.high)
        if clips.importance is not None:
            loss_C = loss_C * importance_weights(old_C, tokens.behaviour_logp_N[part], clips.importance)
        stats |= {
            "logp": logp_C.detach(),
            "teacher_logp": teacher_C,
            "entropy": entropy_C,
            "reverse_kl": old_C - teacher_C,
            "ratio": (logp_C - old_C).detach().exp(),
            "clipped": clipped_C.float(),
            "advantage": advantage_C,
        }
        return loss_C, stats

    return loss


def exact(target_N: Tensor, teacher: TeacherStates, temperature: float, divergence: Divergence) -> TokenLoss:
    """The divergence over the whole vocabulary at each position: the sampled objective without its sampling noise."""

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        student_CV = scaled_logp(logits_CV, temperature)
        teacher_CV = teacher.logp(part, temperature).to(student_CV)
        loss_C = divergence(student_CV, teacher_CV)
        with torch.no_grad():
            stats = {
                "logp": student_CV.gather(-1, target_N[part][:, None])[:, 0],
                "teacher_logp": teacher_CV.gather(-1, target_N[part][:, None])[:, 0],
                "entropy": entropy(student_CV),
                "reverse_kl": loss_C.detach() if divergence is reverse_kl else reverse_kl(student_CV, teacher_CV),
            }
        return loss_C, stats

    return loss


def topk(target_N: Tensor, teacher: TeacherStates, temperature: float, divergence: Divergence, k: int) -> TokenLoss:
    """The divergence over the teacher's k most probable ids and one bucket for the rest; k = V is `exact`."""

    def on_top(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        top_CK = teacher_CV.topk(min(k, teacher_CV.shape[-1]), -1).indices
        return divergence(with_tail(student_CV, top_CK), with_tail(teacher_CV, top_CK))

    return exact(target_N, teacher, temperature, on_top)


def discounted(advantage_N: Tensor, sequence_N: Tensor, discount: float) -> Tensor:
    """Σₖ discountᵏ · advantage of the token k places further on in the same sequence, (N,).

    advantage_N holds the tokens of each sequence in order, side by side. discount 0 returns it unchanged.
    """
    result, sequence = advantage_N.tolist(), sequence_N.tolist()
    for index in range(len(result) - 2, -1, -1):
        if sequence[index] == sequence[index + 1]:
            result[index] += discount * result[index + 1]
    return torch.tensor(result, dtype=advantage_N.dtype, device=advantage_N.device)


def group_normalised(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """(reward − mean) / standard deviation within each group of completions of one prompt, (B,); 0 in a group of equal rewards (GRPO)."""
    result_B = torch.zeros_like(reward_B)
    for group in group_B.unique():
        member_B = group_B == group
        centred = reward_B[member_B] - reward_B[member_B].mean()
        spread = centred.square().mean().sqrt()
        result_B[member_B] = centred / spread if spread > 0 else 0.0
    return result_B
