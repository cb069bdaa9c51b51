"""The per-token losses that `chunked_loss` is called with, one function for each `ppo.estimator`.

Each returns a `TokenLoss`: from a chunk's logits (C, V) to losses (C,) in nats and detached statistics (C,). These are `logp` and
`teacher_logp` of the token at `ppo.temperature`, the student's `entropy`, `reverse_kl` (KL(student‖teacher) at that position, which
`sampled` estimates from the token, or as a share of its span), `overlap/share` and `overlap/mass` where the teacher's distributions are
known, and for `sampled` also `ratio`, `clipped` (0 or 1), `advantage` and `cut` (0 or 1: the advantage clip changed it).

Shapes: `N` trained tokens, `C` tokens of a chunk, `R` rows, `V` vocabulary, `H` hidden, `B` sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from opd.objective.divergences import forward_kl, reverse_kl, with_tail
from opd.objective.head import Head, TokenLoss, TokenStats, at_least_float32, chunked_stats, chunks
from opd.objective.lookahead import Longer
from opd.objective.masked import masked_stats
from opd.objective.overlap import OVERLAP_K, overlap, overlap_of_distributions

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Clips:
    """Bounds of the sampled objective: ratio in [1 - low, 1 + high], |advantage| <= advantage, importance weight <= importance."""

    low: float = 0.2
    high: float = 0.2
    advantage: float | None = None
    importance: float | None = None


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


def importance_weights(old_logp_N: Tensor, behaviour_logp_N: Tensor, cap: float) -> Tensor:
    """Return exp(old_logp - behaviour_logp), detached, at most `cap`: 1 where the sampler drew from the scored distribution."""
    return (old_logp_N - behaviour_logp_N).detach().exp().clamp_max(cap)


def clipped_surrogate(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347), token by token, and whether the clip is active.

    -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logp - old_logp). At the first inner step r = 1: the value is -A and the gradient
    that of -A logp.

    Args:
        logp_N, old_logp_N: Log-probs (N,) in nats now and before the update.
        advantage_N: Advantages (N,) in nats.
        low, high: Bounds of the ratio below and above 1.
    """
    ratio_N = (logp_N - old_logp_N.detach()).exp()
    advantage_N = advantage_N.detach()
    free_N, clipped_N = ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N
    return -torch.minimum(free_N, clipped_N), (clipped_N < free_N).detach()


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

    def token_logp(self, target_N: Tensor, temperature: float) -> Tensor:
        """Return the log-probs (N,) of the sampled tokens."""
        return self.token_logp_N

    def with_tail(self, part: slice) -> Tensor:
        """Return the log-probs (C, K + 1) of the ids and of one bucket for all others, at least float32's rounding."""
        logp_CK = self.logp_NK[part]
        rest_C1 = (1 - logp_CK.double().exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)
        return torch.cat((logp_CK, rest_C1.log().to(logp_CK)), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The inputs of the sampled objective.

    Args:
        target_N: The sampled tokens.
        teacher_logp_N, behaviour_logp_N: Their log-probs under the teacher and under the sampler.
        old_logp_N: Their log-probs under the student before the update; None at the first inner step, which computes them.
        advantage_N: Replaces teacher_logp - old_logp, for example by discounted sums of it.
        score_N: Takes the place of teacher_logp in the advantage.
        span_N: For a teacher with another tokenizer, how many tokens of its span follow each token, -1 for one that is not scored. Every
            token of a span gets the advantage of the whole span. `teacher_logp_N` then has the log-prob of a span at its last token and 0
            elsewhere. A chunk has all tokens of a span.
        unscored: The advantage of tokens that are not scored.
        previous_N: The last token of the span before, as in `SpanTokens`.
        longer: The student's longer tokens, for the lookahead of its spans; None without it.
        lookahead_N: The lookahead of the student's tokens before the update at the ends of spans: filled at the first inner step, chunk by
            chunk, and known at later ones.
        bonus_N: Added to the advantage after its clip, for example a task reward.
        whole: The teacher's distributions, to measure the overlap with the student's.
        baseline: The teacher's distributions: the exact KL(student‖teacher) of each position, which is the expectation of -advantage, is
            added to the advantage. It leaves the expected gradient unchanged and removes noise.
        reference_logp_N: Their log-probs under the student's start: `reference_coef` times reference_logp - old_logp, whose expectation is
            -KL(student‖start), is added to the advantage after its clip.
        given_N: Which tokens were not sampled but are a given text's: their loss is -logp, without weights and clips.
    """

    target_N: Tensor
    teacher_logp_N: Tensor
    behaviour_logp_N: Tensor
    old_logp_N: Tensor | None = None
    advantage_N: Tensor | None = None
    score_N: Tensor | None = None
    span_N: Tensor | None = None
    unscored: float = 0.0
    previous_N: Tensor | None = None
    longer: Longer | None = None
    lookahead_N: Tensor | None = None
    bonus_N: Tensor | None = None
    whole: TeacherStates | None = None
    baseline: TeacherStates | None = None
    reference_logp_N: Tensor | None = None
    reference_coef: float = 0.0
    given_N: Tensor | None = None


def sampled(tokens: Sampled, temperature: float, clips: Clips, overwrite: bool = False) -> TokenLoss:
    """Return the loss of the sampled tokens: the clipped surrogate times the importance weight.

    Args:
        overwrite: As in `token_logp`; safe within `chunked_loss`.
    """

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        logp_C, entropy_C = token_logp(logits_CV, tokens.target_N[part], temperature, overwrite)
        old_C = logp_C.detach() if tokens.old_logp_N is None else tokens.old_logp_N[part]
        given_C = None if tokens.given_N is None else tokens.given_N[part]
        if given_C is not None:  # a ratio of 1 there, whose gradient is finite
            old_C = torch.where(given_C, logp_C.detach(), old_C)
        teacher_C = tokens.teacher_logp_N[part]
        with torch.no_grad():
            lookahead_C = own_lookahead(tokens, logits_CV, part, temperature)
            score_C = teacher_C if tokens.score_N is None else tokens.score_N[part]
            gap_C = score_C - old_C if tokens.advantage_N is None else tokens.advantage_N[part]
            kl_C = old_C - teacher_C
            if tokens.span_N is not None:
                gap_C = gap_C if lookahead_C is None else gap_C - lookahead_C
                gap_C, size_C = sum_over_spans(gap_C, tokens.span_N[part])
                kl_C = -gap_C / size_C
            stats: TokenStats = {}
            if tokens.lookahead_N is not None:
                stats["lookahead"] = tokens.lookahead_N[part]
            teacher = tokens.baseline or tokens.whole
            if teacher is not None:
                student_CV = scaled_logp(logits_CV, temperature)
                teacher_CV = teacher.logp(part, temperature).to(student_CV)
                stats |= overlap_of_distributions(student_CV, teacher_CV)
                if tokens.baseline is not None:
                    gap_C = gap_C + reverse_kl(student_CV, teacher_CV)
            advantage_C = gap_C if clips.advantage is None else gap_C.clamp(-clips.advantage, clips.advantage)
            stats["cut"] = (advantage_C != gap_C).float()
            if tokens.span_N is not None:
                advantage_C = advantage_C.masked_fill(tokens.span_N[part] < 0, tokens.unscored)
            if tokens.bonus_N is not None:
                advantage_C = advantage_C + tokens.bonus_N[part]
            if tokens.reference_logp_N is not None:
                stats["reference_kl"] = old_C - tokens.reference_logp_N[part]
                advantage_C = advantage_C - tokens.reference_coef * stats["reference_kl"]
        loss_C, clipped_C = clipped_surrogate(logp_C, old_C, advantage_C, clips.low, clips.high)
        if clips.importance is not None:
            loss_C = loss_C * importance_weights(old_C, tokens.behaviour_logp_N[part], clips.importance)
        if given_C is not None:
            loss_C = torch.where(given_C, -logp_C, loss_C)
        stats |= {
            "logp": logp_C.detach(),
            "teacher_logp": teacher_C,
            "entropy": entropy_C,
            "reverse_kl": kl_C,
            "ratio": (logp_C - old_C).detach().exp(),
            "clipped": clipped_C.float(),
            "advantage": advantage_C,
        }
        return loss_C, stats

    return loss


def own_lookahead(tokens: Sampled, logits_CV: Tensor, part: slice, temperature: float) -> Tensor | None:
    """Return what is subtracted at the last token of each span for the lookahead of the student's tokens, (C,); None without it."""
    if tokens.longer is None or tokens.lookahead_N is None or tokens.span_N is None or tokens.previous_N is None:
        return None
    if tokens.old_logp_N is None:
        lookahead_C = tokens.longer.lookahead(logits_CV, tokens.target_N[part], temperature)
        tokens.lookahead_N[part] = lookahead_C.where(tokens.span_N[part] == 0, 0.0)
    previous_C = tokens.previous_N[part]
    before_C = torch.where(previous_C >= 0, tokens.lookahead_N[previous_C.clamp_min(0)], 0.0)
    return tokens.lookahead_N[part] - before_C


def exact(
    target_N: Tensor,
    teacher: TeacherStates,
    temperature: float,
    divergence: Divergence,
    given_N: Tensor | None = None,
    of_given: Divergence = forward_kl,
) -> TokenLoss:
    """Return the loss of whole distributions: the divergence over the vocabulary at each position, without sampling noise.

    Args:
        given_N: Tokens that have the divergence `of_given` instead.
    """

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        student_CV = scaled_logp(logits_CV, temperature)
        teacher_CV = teacher.logp(part, temperature).to(student_CV)
        loss_C = own_C = divergence(student_CV, teacher_CV)
        if given_N is not None:
            loss_C = torch.where(given_N[part], of_given(student_CV, teacher_CV), own_C)
        with torch.no_grad():
            stats = {
                "logp": student_CV.gather(-1, target_N[part][:, None])[:, 0],
                "teacher_logp": teacher_CV.gather(-1, target_N[part][:, None])[:, 0],
                "entropy": entropy(student_CV),
                "reverse_kl": own_C.detach() if divergence is reverse_kl else reverse_kl(student_CV, teacher_CV),
                **overlap_of_distributions(student_CV, teacher_CV),
            }
        return loss_C, stats

    return loss


def topk(
    target_N: Tensor,
    teacher: TeacherStates | TeacherTop,
    temperature: float,
    divergence: Divergence,
    k: int,
    given_N: Tensor | None = None,
) -> TokenLoss:
    """Return the divergence over the teacher's k most probable ids and one bucket for the rest; k = V is `exact`.

    The statistic `reverse_kl` is over the whole vocabulary, or where the teacher sent only its most probable ids over them and the bucket,
    which is less.

    Args:
        given_N: Tokens that have the forward KL instead.
    """
    if isinstance(teacher, TeacherTop):
        return sent_top(target_N, teacher, temperature, divergence, given_N)

    def on_top(student_CV: Tensor, teacher_CV: Tensor, divergence: Divergence = divergence) -> Tensor:
        top_CK = teacher_CV.topk(min(k, teacher_CV.shape[-1]), -1).indices
        return divergence(with_tail(student_CV, top_CK), with_tail(teacher_CV, top_CK))

    return exact(target_N, teacher, temperature, on_top, given_N, partial(on_top, divergence=forward_kl))


def sent_top(target_N: Tensor, teacher: TeacherTop, temperature: float, divergence: Divergence, given_N: Tensor | None = None) -> TokenLoss:
    """Return `topk` for a teacher of which only the most probable ids are known."""

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        student_CV = scaled_logp(logits_CV, temperature)
        student_top, teacher_top = with_tail(student_CV, teacher.id_NK[part]), teacher.with_tail(part).to(student_CV)
        loss_C = divergence(student_top, teacher_top)
        if given_N is not None:
            loss_C = torch.where(given_N[part], forward_kl(student_top, teacher_top), loss_C)
        with torch.no_grad():
            stats = {
                "logp": student_CV.gather(-1, target_N[part][:, None])[:, 0],
                "teacher_logp": teacher.token_logp_N[part],
                "entropy": entropy(student_CV),
                "reverse_kl": reverse_kl(student_top, teacher_top),
            }
            if teacher.id_NK.shape[-1] >= OVERLAP_K:
                stats |= overlap(student_CV, teacher.id_NK[part, :OVERLAP_K], teacher.logp_NK[part, :OVERLAP_K])
        return loss_C, stats

    return loss


def sum_over_spans(value_C: Tensor, span_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token the sum of the values of its span and the number of its tokens, (C,) each; 0 and 1 where it is not scored.

    Args:
        value_C: Of whole spans, in order.
        span_C: How many tokens of its span follow each token; -1 for one that is not scored.
    """
    is_end_C = (span_C <= 0).long()
    number_C = is_end_C.cumsum(0) - is_end_C  # of the span, counted from 0
    empty_C = torch.zeros(len(span_C), dtype=torch.float64, device=value_C.device)
    # In float64 the order of the additions, which varies on a GPU, does not show; the sum of one value is the value.
    sum_C = empty_C.index_add(0, number_C, value_C.double())[number_C].to(value_C.dtype)
    size_C = empty_C.index_add(0, number_C, torch.ones_like(empty_C))[number_C].to(value_C.dtype)
    return torch.where(span_C < 0, 0.0, sum_C), size_C


def discounted(advantage_N: Tensor, sequence_N: Tensor, discount: float) -> Tensor:
    """Return sum over k of discount^k times the advantage of the token k positions later in the same sequence, (N,).

    Args:
        advantage_N: The tokens of each sequence, in order and contiguous.
        sequence_N: The sequence of each token.
        discount: 0 returns the advantages unchanged.
    """
    result, sequence = advantage_N.tolist(), sequence_N.tolist()
    for index in range(len(result) - 2, -1, -1):
        if sequence[index] == sequence[index + 1]:
            result[index] += discount * result[index + 1]
    return torch.tensor(result, dtype=advantage_N.dtype, device=advantage_N.device)


def group_normalised(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """Return (reward - mean) / standard deviation within each group, 0 in a group of equal rewards (GRPO, arXiv 2402.03300).

    Args:
        reward_B: Rewards of completions.
        group_B: The group of each: the completions of one prompt.
    """
    result_B = torch.zeros_like(reward_B)
    for group in group_B.unique():
        member_B = group_B == group
        centred = reward_B[member_B] - reward_B[member_B].mean()
        spread = centred.square().mean().sqrt()
        result_B[member_B] = centred / spread if spread > 0 else 0.0
    return result_B
