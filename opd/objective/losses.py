"""The per-token losses that `chunked_loss` is called with, one function for each `ppo.estimator`.

Each returns a `TokenLoss`: from a chunk's logits (C, V) to losses (C,) in nats and detached statistics (C,). These are `logp` and
`teacher_logp` of the token at `ppo.temperature`, the student's `entropy`, `reverse_kl` (KL(student‖teacher) at that position, which
`sampled` estimates from the token, or as a share of its span), `overlap/share` and `overlap/mass` where the teacher's distributions are
known, and for `sampled` also `ratio`, `clipped` (0 or 1), `advantage` and `cut` (0 or 1: the advantage clip changed it).

Shapes: `N` trained tokens, `C` tokens of a chunk, `V` vocabulary, `B` sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objective.divergences import forward_kl, reverse_kl, with_tail
from opd.objective.head import TokenLoss, TokenStats
from opd.objective.logp import entropy, scaled_logp, token_logp
from opd.objective.overlap import OVERLAP_K, overlap, overlap_of_distributions
from opd.objective.spans import ScoredSpans
from opd.objective.teacher import TeacherStates, TeacherTop

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Clips:
    """Bounds of the sampled objective: ratio in [1 - low, 1 + high], |advantage| <= advantage, importance weight <= importance."""

    low: float = 0.2
    high: float = 0.2
    advantage: float | None = None
    importance: float | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The inputs of the sampled objective.

    Args:
        target_N: The sampled tokens.
        teacher_logp_N, behaviour_logp_N: Their log-probs under the teacher and under the sampler. With `spans`, the teacher's log-prob of
            a span is at its last token, and 0 elsewhere.
        old_logp_N: Their log-probs under the student before the update; None at the first inner step, which computes them.
        advantage_N: Replaces teacher_logp - old_logp, for example by discounted sums of it.
        score_N: Takes the place of teacher_logp in the advantage.
        spans: Of a teacher with another tokenizer.
        bonus_N: Added to the advantage after its clip, for example a task reward.
        teacher: The teacher's distributions, where they are known: to measure the overlap with the student's.
        baseline: Whether their exact KL(student‖teacher) at each position, which is the expectation of -advantage, is added to the
            advantage. It leaves the expected gradient unchanged and removes noise.
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
    spans: ScoredSpans | None = None
    bonus_N: Tensor | None = None
    teacher: TeacherStates | None = None
    baseline: bool = False
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
        stats = advantages(tokens, logits_CV, old_C, part, temperature, clips.advantage)
        loss_C, clipped_C = clipped_surrogate(logp_C, old_C, stats["advantage"], clips.low, clips.high)
        if clips.importance is not None:
            loss_C = loss_C * importance_weights(old_C, tokens.behaviour_logp_N[part], clips.importance)
        if given_C is not None:
            loss_C = torch.where(given_C, -logp_C, loss_C)
        stats |= {"logp": logp_C.detach(), "entropy": entropy_C, "ratio": (logp_C - old_C).detach().exp(), "clipped": clipped_C.float()}
        return loss_C, stats

    return loss


@torch.no_grad()
def advantages(tokens: Sampled, logits_CV: Tensor, old_C: Tensor, part: slice, temperature: float, clip: float | None) -> TokenStats:
    """Return `advantage`, and the statistics that come with it: `cut`, `teacher_logp`, `reverse_kl`, and what `tokens` asks for besides."""
    stats = {"teacher_logp": tokens.teacher_logp_N[part], "reverse_kl": old_C - tokens.teacher_logp_N[part]}
    score_N = tokens.teacher_logp_N if tokens.score_N is None else tokens.score_N
    gap_C = score_N[part] - old_C if tokens.advantage_N is None else tokens.advantage_N[part]
    if (spans := tokens.spans) is not None:
        gap_C, size_C = spans.sums(gap_C, logits_CV, tokens.target_N[part], part, temperature)
        stats["reverse_kl"] = -gap_C / size_C
        if spans.lookahead_N is not None:
            stats["lookahead"] = spans.lookahead_N[part]
    if tokens.teacher is not None:
        student_CV = scaled_logp(logits_CV, temperature)
        teacher_CV = tokens.teacher.logp(part, temperature).to(student_CV)
        stats |= overlap_of_distributions(student_CV, teacher_CV)
        gap_C = gap_C + reverse_kl(student_CV, teacher_CV) if tokens.baseline else gap_C
    advantage_C = gap_C if clip is None else gap_C.clamp(-clip, clip)
    stats["cut"] = (advantage_C != gap_C).float()
    if spans is not None:
        advantage_C = advantage_C.masked_fill(spans.span_N[part] < 0, spans.unscored)
    if tokens.bonus_N is not None:
        advantage_C = advantage_C + tokens.bonus_N[part]
    if tokens.reference_logp_N is not None:
        stats["reference_kl"] = old_C - tokens.reference_logp_N[part]
        advantage_C = advantage_C - tokens.reference_coef * stats["reference_kl"]
    return stats | {"advantage": advantage_C}


def exact(
    target_N: Tensor, teacher: TeacherStates | TeacherTop, temperature: float, divergence: Divergence, given_N: Tensor | None = None
) -> TokenLoss:
    """Return the loss of whole distributions: the divergence over the vocabulary at each position, without sampling noise.

    Args:
        given_N: Tokens that have the forward KL instead.
    """
    return topk(target_N, teacher, temperature, divergence, None, given_N)


def topk(
    target_N: Tensor,
    teacher: TeacherStates | TeacherTop,
    temperature: float,
    divergence: Divergence,
    k: int | None,
    given_N: Tensor | None = None,
) -> TokenLoss:
    """Return the divergence over the teacher's k most probable ids and one bucket for the rest; k = V or None is `exact`.

    The statistic `reverse_kl` is over the whole vocabulary, or where the teacher sent only its most probable ids over them and the bucket,
    which is less.

    Args:
        given_N: Tokens that have the forward KL instead.
    """

    def loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, TokenStats]:
        student_CV, target_C1 = scaled_logp(logits_CV, temperature), target_N[part][:, None]
        stats: TokenStats = {}
        if isinstance(teacher, TeacherTop):
            compared = known = with_tail(student_CV, teacher.id_NK[part]), teacher.with_tail(part).to(student_CV)
            teacher_C = teacher.token_logp_N[part]
            if teacher.id_NK.shape[-1] >= OVERLAP_K:
                stats = overlap(student_CV, teacher.id_NK[part, :OVERLAP_K], teacher.logp_NK[part, :OVERLAP_K])
        else:
            compared = known = student_CV, teacher.logp(part, temperature).to(student_CV)
            teacher_C, stats = known[1].gather(-1, target_C1)[:, 0], overlap_of_distributions(*known)
            if k is not None:
                top_CK = known[1].topk(min(k, known[1].shape[-1]), -1).indices
                compared = with_tail(known[0], top_CK), with_tail(known[1], top_CK)
        loss_C = own_C = divergence(*compared)
        if given_N is not None:
            loss_C = torch.where(given_N[part], forward_kl(*compared), own_C)
        with torch.no_grad():
            stats["logp"], stats["teacher_logp"] = student_CV.gather(-1, target_C1)[:, 0], teacher_C
            stats["entropy"] = entropy(student_CV)
            stats["reverse_kl"] = own_C.detach() if divergence is reverse_kl and compared is known else reverse_kl(*known)
        return loss_C, stats

    return loss


def anchored(loss: TokenLoss, reference: TeacherStates, temperature: float, coefficient: float, given_N: Tensor | None = None) -> TokenLoss:
    """Return the loss plus `coefficient` times KL(student‖reference) over the vocabulary, which becomes the statistic `reference_kl`.

    `sampled` has this anchor in the advantage, which gives the same gradient in expectation.

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
