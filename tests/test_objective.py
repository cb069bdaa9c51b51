"""The mathematics: against float64, against enumeration, at its limits."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.objective import (
    Clips,
    Head,
    Sampled,
    TeacherStates,
    TeacherTop,
    anchored,
    behaviour_logp,
    chunked_loss,
    chunked_stats,
    clipped_surrogate,
    discounted,
    draw,
    exact,
    forward_kl,
    group_normalised,
    jsd,
    reverse_kl,
    sampled,
    topk,
    with_tail,
)
from opd.objective.losses import importance_weights

N, V, H, HT = 37, 29, 12, 20
TEMPERATURE = 0.7
UNBOUNDED = Clips(math.inf, math.inf, None, None)


def problem(dtype: torch.dtype = torch.float64, seed: int = 0):
    """Student hidden states and head (with gradient), teacher hidden states and head, and targets."""
    generator = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden, weight, bias = (make(*shape).to(dtype).requires_grad_() for shape in ((N, H), (V, H), (V,)))
    teacher = Head(make(V, HT).to(dtype))
    return hidden, weight, bias, make(N, HT).to(dtype), teacher, torch.randint(V, (N,), generator=generator)


def logps(hidden, weight, bias, temperature=TEMPERATURE):
    return ((hidden @ weight.T + bias) / temperature).log_softmax(-1)


def objective(name, divergence, targets, teacher_hidden, teacher, old=None, clips=None):
    if name == "sampled":
        teacher_logp = (teacher.logits(teacher_hidden) / TEMPERATURE).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        tokens = Sampled(target_N=targets, teacher_logp_N=teacher_logp, behaviour_logp_N=teacher_logp, old_logp_N=old)
        return sampled(tokens, TEMPERATURE, clips or Clips(0.2, 0.2, 1.0, None), overwrite=True)
    if name == "topk":
        return topk(targets, TeacherStates(teacher_hidden, teacher), TEMPERATURE, divergence, 5)
    return exact(targets, TeacherStates(teacher_hidden, teacher), TEMPERATURE, divergence)


DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": partial(jsd, beta=0.3),
}
CASES = [("sampled", reverse_kl), *((estimator, d) for estimator in ("exact", "topk") for d in DIVERGENCES.values())]


@pytest.mark.parametrize(("name", "divergence"), CASES)
@pytest.mark.parametrize(("rows", "piece"), [(1, 1), (5, 2), (1000, 1000), (1000, 3)])
def test_chunked_float32_matches_unchunked_float64_autograd(name, divergence, rows, piece, monkeypatch):
    monkeypatch.setattr("opd.objective.head.PIECE_BYTES", 4 * V * piece)
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    old = (
        logps(hidden, weight, bias).gather(-1, targets[:, None])[:, 0]
        + 0.3 * torch.randn(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ).detach()
    loss64, _ = objective(name, divergence, targets, teacher_hidden, teacher, old)(hidden @ weight.T + bias, slice(0, N))
    expected = torch.autograd.grad(loss64.sum(), (hidden, weight, bias))
    h, w, b, th, t, _ = problem(torch.float32)
    loss, stats = chunked_loss(h, Head(w, b, rows=rows), objective(name, divergence, targets, th, t, old.float()))
    found = torch.autograd.grad(loss, (h, w, b))
    assert abs(loss.item() - loss64.sum().item()) <= 1e-6 * max(1.0, loss64.abs().sum().item())
    for mine, reference in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), reference, atol=1e-5 * float(reference.abs().max()), rtol=1e-5)
    assert all(value.shape == (N,) for value in stats.values())


def test_softcap_scale_and_a_narrower_vocabulary_are_part_of_the_gradient():
    hidden, weight, bias, *_ = problem()
    head = Head(weight, bias, size=V - 4, scale=0.5, softcap=3.0, rows=7)
    logits = 3.0 * torch.tanh(0.5 * (hidden @ weight[: V - 4].T + bias[: V - 4]) / 3.0)
    expected = torch.autograd.grad(logits.logsumexp(-1).sum(), (hidden, weight, bias))

    def token_loss(logits_CV, part):
        return logits_CV.logsumexp(-1), {"one": torch.ones(len(logits_CV))}

    loss, _ = chunked_loss(hidden, head, token_loss)
    for mine, reference in zip(torch.autograd.grad(loss, (hidden, weight, bias)), expected, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12, atol=1e-12)
    assert not torch.autograd.grad(chunked_loss(hidden, head, token_loss)[0], weight)[0][V - 4 :].any()


@pytest.mark.parametrize("baseline", [False, True])
def test_expected_gradient_of_sampled_is_the_gradient_of_the_reverse_kl(baseline):
    """By enumeration over the vocabulary, at ratio 1 and without clips: Σ_y p(y)·∇loss(y) = ∇KL = p·(log(p/q) − KL), in scaled logits."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, V, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, hidden = (
        torch.randn(V, HT, generator=generator, dtype=torch.float64),
        torch.randn(1, HT, generator=generator, dtype=torch.float64),
    )
    teacher = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
    states = TeacherStates(hidden, Head(weight))
    logp = (logits / TEMPERATURE).log_softmax(-1)
    expected = torch.zeros(1, V, dtype=torch.float64)
    for token in range(V):
        target = torch.tensor([token])
        tokens = Sampled(
            target_N=target, teacher_logp_N=teacher[:, token], behaviour_logp_N=teacher[:, token], teacher=states, baseline=baseline
        )
        loss, _ = sampled(tokens, TEMPERATURE, UNBOUNDED)(logits, slice(0, 1))
        expected += logp[0, token].exp().item() * torch.autograd.grad(loss.sum(), logits)[0]
    of_kl = torch.autograd.grad(reverse_kl((logits / TEMPERATURE).log_softmax(-1), teacher).sum(), logits)[0]
    p = logp.exp().detach()
    closed_form = p * (logp.detach() - teacher - (p * (logp.detach() - teacher)).sum()) / TEMPERATURE
    assert torch.allclose(expected, of_kl, atol=1e-12)
    assert torch.allclose(of_kl, closed_form, atol=1e-12)


def test_expected_gradient_of_the_anchor_is_the_gradient_of_the_kl_to_the_start():
    """By enumeration: sampled, with the advantage clip at 0, which leaves the anchor alone, and as a part of `exact`."""
    generator = torch.Generator().manual_seed(5)
    make = partial(torch.randn, generator=generator, dtype=torch.float64)
    logits, hidden, head = make(1, V).requires_grad_(), make(1, HT), Head(make(V, HT))
    teacher, start = TeacherStates(make(1, HT), Head(make(V, HT))), TeacherStates(hidden, head)
    teacher_logp, start_logp = (states.logp(slice(0, 1), TEMPERATURE) for states in (teacher, start))
    student = (logits / TEMPERATURE).log_softmax(-1)
    (of_kl,) = torch.autograd.grad(reverse_kl(student, start_logp).sum(), logits, retain_graph=True)
    (of_teacher,) = torch.autograd.grad(reverse_kl(student, teacher_logp).sum(), logits)
    expected, kl = torch.zeros_like(logits), 0.0
    for token in range(V):
        tokens = Sampled(
            target_N=torch.tensor([token]),
            teacher_logp_N=teacher_logp[:, token],
            behaviour_logp_N=teacher_logp[:, token],
            reference_logp_N=start_logp[:, token],
            reference_coef=0.3,
        )
        loss, stats = sampled(tokens, TEMPERATURE, Clips(math.inf, math.inf, 0.0, None))(logits, slice(0, 1))
        expected += student[0, token].exp().item() * torch.autograd.grad(loss.sum(), logits)[0]
        kl += student[0, token].exp().item() * stats["reference_kl"].item()
    assert torch.allclose(expected, 0.3 * of_kl, atol=1e-12)
    assert math.isclose(kl, reverse_kl(student, start_logp).item(), rel_tol=1e-12)
    whole = anchored(exact(torch.tensor([0]), teacher, TEMPERATURE, reverse_kl), start, TEMPERATURE, 0.3)
    loss, stats = whole(logits, slice(0, 1))
    assert torch.allclose(torch.autograd.grad(loss.sum(), logits)[0], of_teacher + 0.3 * of_kl, atol=1e-12)
    assert math.isclose(stats["reference_kl"].item(), kl, rel_tol=1e-12)


def test_expected_gradient_of_the_teachers_texts_is_that_of_the_forward_kl_and_mixes_by_the_share():
    """By enumeration: given tokens drawn from the teacher, sampled ones from the student, with a share of 0.25 given (GKD's lambda)."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(1, V, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    student = (logits / TEMPERATURE).log_softmax(-1)
    (of_forward,) = torch.autograd.grad(forward_kl(student, teacher).sum(), logits, retain_graph=True)
    (of_reverse,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), logits)
    found = torch.zeros_like(logits)
    for given, drawn_from, share in ((True, teacher, 0.25), (False, student.detach(), 0.75)):
        for token in range(V):
            tokens = Sampled(
                target_N=torch.tensor([token]),
                teacher_logp_N=teacher[:, token],
                behaviour_logp_N=student[:, token].detach(),
                given_N=torch.tensor([given]),
            )
            loss, _ = sampled(tokens, TEMPERATURE, UNBOUNDED)(logits, slice(0, 1))
            found += share * drawn_from[0, token].exp() * torch.autograd.grad(loss.sum(), logits)[0]
    assert torch.allclose(found, 0.25 * of_forward + 0.75 * of_reverse, atol=1e-12)


def test_expected_gradient_with_a_contrast_is_that_of_the_reverse_kl_to_the_student_moved_along_it():
    """By enumeration: Σ_y p(y)·∇loss(y) with A = log t − log c is ∇KL(p‖q), q ∝ p·t/c held constant; and A = 0 moves nothing."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, V, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher, contrast = (torch.randn(1, V, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    own = (logits.detach() / TEMPERATURE).log_softmax(-1)
    found = {}
    for name, second in (("contrast", contrast), ("same", teacher)):
        found[name] = torch.zeros_like(logits)
        for token in range(V):
            facts = {"target_N": torch.tensor([token]), "teacher_logp_N": teacher[:, token], "behaviour_logp_N": own[:, token]}
            loss, _ = sampled(Sampled(**facts, advantage_N=(teacher - second)[:, token]), TEMPERATURE, UNBOUNDED)(logits, slice(0, 1))
            found[name] += own[0, token].exp() * torch.autograd.grad(loss.sum(), logits)[0]
    target = (own + teacher - contrast).log_softmax(-1)
    (of_kl,) = torch.autograd.grad(reverse_kl((logits / TEMPERATURE).log_softmax(-1), target).sum(), logits)
    assert torch.allclose(found["contrast"], of_kl, rtol=1e-12, atol=1e-14) and of_kl.abs().max() > 1e-3
    assert found["same"].abs().max() == 0


def test_a_teacher_that_sends_its_top_has_the_forward_kl_on_given_tokens_too():
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    states, given_N = TeacherStates(teacher_hidden, teacher), torch.arange(N) % 3 == 0
    sent = TeacherTop(*states.top(5, TEMPERATURE), states.token_logp(targets, TEMPERATURE))
    logits = hidden @ weight.T + bias
    reverse, forward = (topk(targets, states, TEMPERATURE, each, 5)(logits, slice(0, N))[0] for each in (reverse_kl, forward_kl))
    for source in (sent, states):
        found, _ = topk(targets, source, TEMPERATURE, reverse_kl, 5, given_N)(logits, slice(0, N))
        assert torch.allclose(found, torch.where(given_N, forward, reverse), atol=1e-9)


@pytest.mark.parametrize("drawn_at", [0.5, 1.6])
def test_importance_weights_correct_for_another_sampling_temperature(drawn_at):
    """By enumeration, with samples of b at another temperature than the loss: Σ_y b(y)·w(y)·∇loss(y) = ∇KL; not without w."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(1, V, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    drawn = (logits.detach() / drawn_at).log_softmax(-1)
    found = {}
    for cap in (math.inf, None):
        found[cap] = torch.zeros_like(logits)
        for token in range(V):
            tokens = Sampled(target_N=torch.tensor([token]), teacher_logp_N=teacher[:, token], behaviour_logp_N=drawn[:, token])
            loss, _ = sampled(tokens, 1.0, Clips(math.inf, math.inf, None, cap))(logits, slice(0, 1))
            found[cap] += drawn[0, token].exp() * torch.autograd.grad(loss.sum(), logits)[0]
    (of_kl,) = torch.autograd.grad(reverse_kl(logits.log_softmax(-1), teacher).sum(), logits)
    assert torch.allclose(found[math.inf], of_kl, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found[None], of_kl, rtol=0.1)


def test_gradient_carries_the_teacher():
    """mean(logp_s − logp_t) back-propagated has a gradient that no teacher changes; ours changes with it."""
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    other = Head(teacher.weight_VH.flip(0))
    first, second = (
        torch.autograd.grad(chunked_loss(hidden, Head(weight, bias), objective("sampled", None, targets, teacher_hidden, t))[0], weight)[0]
        for t in (teacher, other)
    )
    assert not torch.allclose(first, second, rtol=0.1)


def test_advantage_is_a_constant_to_the_gradient_and_bounded():
    logits = torch.randn(2, V, dtype=torch.float64, requires_grad=True)
    logp = (logits / TEMPERATURE).log_softmax(-1)
    own, target = logp[:, 3], torch.tensor([3, 3])
    teacher = own.detach() + torch.tensor([0.5, -3.0], dtype=torch.float64)
    tokens = Sampled(target_N=target, teacher_logp_N=teacher, behaviour_logp_N=teacher)
    loss, stats = sampled(tokens, TEMPERATURE, Clips(0.2, 0.2, 1.0, None))(logits, slice(0, 2))
    assert torch.allclose(stats["advantage"], torch.tensor([0.5, -1.0], dtype=torch.float64)) and stats["cut"].tolist() == [0, 1]
    (expected,) = torch.autograd.grad(-(0.5 * own[0] - 1.0 * own[1]), logits, retain_graph=True)
    assert torch.allclose(torch.autograd.grad(loss.sum(), logits)[0], expected)


def test_the_baseline_takes_noise_out_of_the_gradient():
    """The variance of the sampled gradient over the vocabulary, summed exactly, falls."""
    hidden, weight, bias, teacher_hidden, teacher, _ = problem()
    logits = (hidden @ weight.T + bias).detach()[:1]
    p = (logits / TEMPERATURE).softmax(-1)[0]
    spread = {}
    states = TeacherStates(teacher_hidden[:1], teacher)
    for baseline in (False, True):
        gradients = []
        for token in range(V):
            leaf = logits.clone().requires_grad_()
            teacher_logp = (teacher.logits(teacher_hidden[:1]) / TEMPERATURE).log_softmax(-1)[:, token]
            tokens = Sampled(
                target_N=torch.tensor([token]),
                teacher_logp_N=teacher_logp,
                behaviour_logp_N=teacher_logp,
                teacher=states,
                baseline=baseline,
            )
            loss, _ = sampled(tokens, TEMPERATURE, UNBOUNDED)(leaf, slice(0, 1))
            gradients.append(torch.autograd.grad(loss.sum(), leaf)[0][0])
        gradient_VV = torch.stack(gradients)
        mean_V = p @ gradient_VV
        spread[baseline] = float(p @ (gradient_VV - mean_V).square().sum(-1))
    assert spread[True] < 0.8 * spread[False]


def test_discounted_sums_stay_within_their_sequence():
    advantage, sequence = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([5, 5, 5, 2])
    assert discounted(advantage, sequence, 0.5).tolist() == [1 + 0.5 * (2 + 0.5 * 4), 4.0, 4.0, 8.0]
    assert torch.equal(discounted(advantage, sequence, 0.0), advantage)
    assert discounted(advantage, sequence, 1.0).tolist() == [7.0, 6.0, 4.0, 8.0]


def test_rewards_are_normalised_within_their_group():
    found = group_normalised(torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0]), torch.tensor([7, 7, 3, 3, 9]))
    assert found.tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]


def test_surrogate_matches_a_written_out_reference_token_by_token():
    generator = torch.Generator().manual_seed(1)
    logp, old, advantage = (torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(3))
    logp.requires_grad_()
    loss, clipped = clipped_surrogate(logp, old, advantage, 0.2, 0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    for i in range(200):
        ratio, a = math.exp(logp[i].item() - float(old[i])), float(advantage[i])
        held_back = (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.8)
        bound = 1.3 if ratio > 1.3 else 0.8
        assert bool(clipped[i]) is held_back
        assert math.isclose(loss[i].item(), -(bound if held_back else ratio) * a, rel_tol=1e-12)
        assert math.isclose(gradient[i].item(), 0.0 if held_back else -ratio * a, rel_tol=1e-12)
    assert clipped.any() and not clipped.all()


def test_ratio_is_one_and_nothing_is_clipped_at_the_first_inner_step():
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    _, stats = chunked_loss(hidden, Head(weight, bias), objective("sampled", None, targets, teacher_hidden, teacher))
    assert stats["ratio"].eq(1).all() and not stats["clipped"].any()


@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_a_teacher_that_is_the_student_gives_no_loss_and_no_gradient(name, divergence):
    hidden, weight, _, _, _, targets = problem()
    same = Head(weight.detach())
    loss, _ = chunked_loss(hidden, Head(weight), objective(name, divergence, targets, hidden.detach(), same))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert abs(loss.item()) < 1e-10
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients)


@pytest.mark.parametrize("divergence", DIVERGENCES.values())
def test_topk_with_the_whole_vocabulary_is_exact(divergence):
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    results = []
    for token_loss in (
        topk(targets, TeacherStates(teacher_hidden, teacher), TEMPERATURE, divergence, V),
        exact(targets, TeacherStates(teacher_hidden, teacher), TEMPERATURE, divergence),
    ):
        loss, _ = chunked_loss(hidden, Head(weight, bias), token_loss)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-10)


def test_no_mass_can_be_drained_out_of_the_top_k():
    """Moving the student's mass from the top k to the tail must cost; without a tail bucket it would pay."""
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    top = torch.tensor([[0, 1]])
    losses = []
    for tail in (0.2, 0.6, 0.96):
        student = torch.tensor([[0.6 * (1 - tail), 0.4 * (1 - tail), tail / 2, tail / 2]]).log()
        losses.append(float(reverse_kl(with_tail(student, top), with_tail(teacher, top))))
    assert losses == sorted(losses) and losses[2] > 1


def test_jsd_at_its_ends_and_in_the_middle():
    a, b = (torch.randn(5, V, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    assert torch.equal(jsd(a, b, 0.0), forward_kl(a, b))
    assert torch.equal(jsd(a, b, 1.0), reverse_kl(a, b))
    assert torch.allclose(jsd(a, b, 0.5), jsd(b, a, 0.5))
    assert torch.allclose(jsd(a, b, 1e-7) / 1e-7, forward_kl(a, b), rtol=1e-4)
    assert torch.allclose(jsd(a, b, 1 - 1e-7) / 1e-7, reverse_kl(a, b), rtol=1e-4)


def test_without_a_tail_there_is_no_bucket_and_no_nan():
    logits = torch.randn(3, V, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, V, dtype=torch.float64).log_softmax(-1)
    everything = torch.arange(V).expand(3, V)
    loss = reverse_kl(with_tail(logits.log_softmax(-1), everything), with_tail(teacher, everything))
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logits)[0]).all()


class WidestLogits(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary that was made within."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.ndim == 2 and made.shape[1] == V and made.is_contiguous():  # no transposed weight
                self.rows = max(self.rows, made.shape[0])
        return result


@pytest.mark.parametrize("name", ["sampled", "exact", "topk"])
def test_no_tensor_of_all_logits_exists(name):
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    token_loss = objective(name, reverse_kl, targets, teacher_hidden, teacher)
    head = Head(weight, bias, rows=5)
    with WidestLogits() as seen:
        loss, _ = chunked_loss(hidden, head, token_loss)
        loss.backward()
        chunked_stats(hidden, head, lambda logits, part: {"x": logits[:, 0]})
    assert seen.rows == 5


def test_token_weights_weigh_the_loss():
    hidden, weight, bias, teacher_hidden, teacher, targets = problem()
    token_loss = exact(targets, TeacherStates(teacher_hidden, teacher), TEMPERATURE, reverse_kl)
    weights = torch.rand(N, dtype=torch.float64)
    loss, stats = chunked_loss(hidden, Head(weight, bias, rows=5), token_loss, weights)
    assert torch.isclose(loss, (stats["reverse_kl"] * weights).sum())


def test_importance_weights_correct_and_are_bounded():
    old, behaviour = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.5, -9.0])
    assert torch.allclose(importance_weights(old, behaviour, 2.0), torch.tensor([1.0, math.exp(0.5), 2.0]))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8), (1, 1.0), (0, 1e-9)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_behaviour_policy_is_what_transformers_samples_from(top_k, top_p, temperature):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(6, V)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.allclose(behaviour_logp(logits, temperature, top_k, top_p).exp(), expected.softmax(-1), atol=1e-6)


def test_draws_follow_the_distribution():
    """Chi-square over 200,000 draws; 1e-6 is the chance of a false alarm (the seed is fixed)."""
    logp = behaviour_logp(torch.randn(1, 12, generator=torch.Generator().manual_seed(5)) * 2, 0.8, top_p=0.95)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    counts = torch.bincount(draw(logp.expand(len(uniform), -1), uniform), minlength=12).double()
    expected = logp[0].double().exp() * len(uniform)
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 12 + 8 * math.sqrt(12)


# The kernels, in Triton's interpreter: they need no GPU there, but Triton.


IN_INTERPRETER = """
import sys
import torch
from opd.objective import kernels
from opd.objective.logp import token_logp

torch.manual_seed(0)
for dtype, value, gradient in ((torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-5, 2**-7)):  # 2**-7: the interpreter does not round
    for vocabulary in (7, kernels.BLOCK, kernels.BLOCK + 5):
        logits = (3 * torch.randn(5, vocabulary)).to(dtype)
        target, grad = torch.randint(vocabulary, (5,)), torch.randn(5)
        plain = logits.double().requires_grad_()
        expected = token_logp(plain, target, 0.7)
        expected[0].backward(grad.double())
        *computed, normaliser = kernels.forward(logits, target, 0.7)
        kernels.backward(logits, target, normaliser, grad, 0.7)
        for name, one, other in (*zip(("logp", "entropy"), computed, expected), ("gradient", logits, plain.grad)):
            error = float((one.double() - other.detach()).abs().max() / other.detach().abs().max())
            assert error <= (gradient if name == "gradient" else value), (name, dtype, vocabulary, error)
print("checked")
"""


def test_kernels_give_log_prob_entropy_and_gradient_in_float32_and_bf16():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IN_INTERPRETER], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "checked", done.stderr
