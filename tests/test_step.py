"""One step: gradients against the objective over all tokens at once, clipping, micro-batches, masks, rewards, memory, numerics."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import Waits, random_model
from training_helpers import (
    UNEVEN,
    VOCABULARY,
    FixedSampler,
    NoEvaluator,
    PoisonedTeacher,
    make_trainer,
    optimizer_state,
    rollout_of,
    weights,
    weights_after,
)

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, collate
from opd.models.policy import Policy, prepare_student
from opd.objective import Clips, Sampled, chunked_loss, sampled
from opd.teachers import LocalTeacher
from opd.training.batches import with_masks
from opd.training.loop import Trainer
from opd.training.step import Step, default_rate
from opd.training.tokens import Tokens

PROMPTS = ((3, 4), (6,), (6, 2))
LONG = (7, 8, 9, 10, 11, 12, 1)
HOLES = (True, False, True, True, False, True, True)


@pytest.fixture(autouse=True)
def no_detailed_steps(monkeypatch):
    """Let the teacher score by `logp`, which tests watch; steps that measure the overlap are in test_overlap.py."""
    monkeypatch.setattr("opd.training.loop.is_detailed_step", lambda step, total: False)


def old_logp(trainer: Trainer, model: torch.nn.Module, rollout: Rollout, temperature: float | None = None) -> torch.Tensor:
    """Return the log-probs of the trained tokens by a plain forward pass over the rollout alone."""
    prompt = rollout.request.prompt.ids
    ids = torch.tensor([prompt + rollout.completion])
    logits = model(ids).logits[0, len(prompt) - 1 : -1, :VOCABULARY] / (temperature or trainer.config.temperature)
    logp = logits.log_softmax(-1).gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
    return logp[rollout.trained]


# The gradient.


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("mask", [None, HOLES])
def test_the_gradient_is_that_of_one_mean_over_all_trained_tokens(tmp_path, reduction, mask):
    """Unequal lengths in two micro-batches, so that a mean of their means differs."""
    options = {"ppo__advantage_clip": None, "ppo__importance_cap": None, "ppo__reduction": reduction}
    trainer = make_trainer(tmp_path, train__max_tokens_per_micro_batch=9, **options)
    rollouts = [rollout_of(PROMPTS[0], (5,)), rollout_of(PROMPTS[1], LONG, index=1, mask=mask)]
    trainer.sampler = FixedSampler(rollouts)
    tokens = trainer.begin_step()
    assert len(tokens.slices) == 2
    weight_R, total = trainer.scoring.token_weights(tokens.rollouts)
    trainer.scoring.gradients(tokens, weight_R[tokens.rollout_N], total)
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.student.named_parameters()}
    trainer.student.zero_grad()
    losses = []
    for rollout in rollouts:
        logp = old_logp(trainer, trainer.student, rollout)
        losses.append(-(old_logp(trainer, trainer.scoring.teacher.model, rollout) - logp).detach() * logp)
    loss = torch.cat(losses).mean() if reduction == "token" else torch.stack([each.mean() for each in losses]).mean()
    loss.backward()
    for name, parameter in trainer.student.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4), name


def test_another_temperature_than_the_samplers_scores_at_it_and_weighs_by_it(tmp_path):
    options = {"sampling__temperature": 0.6, "ppo__temperature": 1.0, "ppo__importance_cap": 50.0, "ppo__advantage_clip": None}
    trainer = make_trainer(tmp_path, **options)
    tokens = trainer.begin_step()
    weight_R, total = trainer.scoring.token_weights(tokens.rollouts)
    trainer.scoring.gradients(tokens, weight_R[tokens.rollout_N], total)
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.student.named_parameters()}
    trainer.student.zero_grad()
    losses = []
    for rollout in tokens.rollouts:
        logp, teacher = (old_logp(trainer, model, rollout) for model in (trainer.student, trainer.scoring.teacher.model))
        drawn = old_logp(trainer, trainer.student, rollout, temperature=0.6).detach()
        assert torch.allclose(drawn, rollout.behaviour_logp, atol=1e-5)
        losses.append(-(logp.detach() - drawn).exp() * (teacher - logp).detach() * logp)
    torch.cat(losses).mean().backward()
    for name, parameter in trainer.student.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_reported_loss_is_the_one_that_is_minimised(tmp_path, reduction):
    trainer = make_trainer(tmp_path, ppo__reduction=reduction, ppo__advantage_clip=None, ppo__importance_cap=None, **UNEVEN)
    rollouts = trainer.sample()
    with torch.no_grad():
        gaps = [
            old_logp(trainer, trainer.student, rollout) - old_logp(trainer, trainer.scoring.teacher.model, rollout) for rollout in rollouts
        ]
    expected = torch.cat(gaps).mean() if reduction == "token" else torch.stack([gap.mean() for gap in gaps]).mean()
    assert math.isclose(trainer.train_step().metrics["loss"], expected, rel_tol=1e-4)


@pytest.mark.parametrize(("size", "adapters", "rate"), [(135, False, 5e-5), (540, False, 2.5e-5), (540, True, 2.5e-4), (0.1, False, 3e-4)])
def test_the_learning_rate_follows_from_the_number_of_parameters(size: float, adapters: bool, rate: float) -> None:
    assert default_rate(int(size * 1e6), adapters) == pytest.approx(rate)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    trainer = make_trainer(tmp_path, optim__max_grad_norm=1e-3)
    norms, optimizer = [], trainer.strategy.optimizer
    step = optimizer.step
    optimizer.step = lambda: norms.append(torch.cat([p.grad.flatten() for p in trainer.student.parameters()]).norm()) or step()
    assert trainer.train_step().metrics["optim/grad_norm"] > 1e-2
    assert len(norms) == 1 and 0.9e-3 < norms[0] <= 1.001e-3


def test_ratio_clipping_binds_from_the_second_inner_step_on(tmp_path):
    one = make_trainer(tmp_path, optim__lr=5e-2).train_step().metrics
    two = make_trainer(tmp_path, ppo__steps=2, ppo__clip_eps=0.01, optim__lr=5e-2).train_step().metrics
    assert one["clipped"] == 0 and one["ratio"] == 1
    assert two["clipped"] > 0.02 and two["ratio"] != 1


def test_old_logp_and_metrics_are_those_before_the_first_inner_step(tmp_path):
    trainer = make_trainer(tmp_path, ppo__steps=3, optim__lr=5e-2)
    done = trainer.train_step()
    assert done.metrics["engine_gap"] < 1e-5 and torch.allclose(
        done.tokens.columns["logp"], done.tokens.columns["behaviour_logp"], atol=1e-5
    )
    assert trainer.train_step().metrics["engine_gap"] < 1e-5


def test_a_teacher_equal_to_the_student_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, teacher=random_model(VOCABULARY, seed=1))
    before = weights(trainer)
    metrics = trainer.train_step().metrics
    assert abs(metrics["reverse_kl"]) < 1e-5 and metrics["optim/grad_norm"] < 1e-4
    assert metrics["engine_gap"] < 1e-5
    assert torch.allclose(before, weights(trainer), atol=1e-4)


def test_exact_distillation_brings_the_student_to_the_teacher(tmp_path):
    options = {"ppo__estimator": "exact", "train__max_steps": 60, "train__batch_size": 10, "optim__lr": 1e-2, "optim__eps": 1e-8}
    trainer = make_trainer(tmp_path, student=random_model(VOCABULARY, seed=1, hidden=32), **options)
    kl = [trainer.train_step().metrics["reverse_kl"] for _ in range(60)]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_dropout_is_off_in_every_pass(tmp_path):
    trainer = make_trainer(tmp_path, student=random_model(VOCABULARY, seed=1, attention_dropout=0.5))
    assert trainer.train_step().metrics["engine_gap"] < 1e-5
    assert not trainer.student.training


def test_master_weights_are_float32():
    student = prepare_student(random_model().to(torch.bfloat16), torch.device("cpu"))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


# What models read.


@pytest.mark.parametrize("teacher_prompt", [False, True])
def test_the_ids_that_were_sampled_are_the_ids_that_student_and_teacher_score(tmp_path, monkeypatch, teacher_prompt):
    """Completions are never decoded and tokenized again: their ids, random here, reach both models unchanged after the prompt of each."""
    trainer = make_trainer(tmp_path, train__max_tokens_per_micro_batch=50, **UNEVEN)
    if teacher_prompt:
        trainer.prompts = [replace(prompt, teacher_ids=(9, *prompt.ids)) for prompt in trainer.prompts]
    calls = {"sample": [], "student": [], "teacher": []}
    sample, logp, forward = trainer.sampler.sample, trainer.scoring.teacher.logp, Policy.forward
    monkeypatch.setattr(trainer.sampler, "sample", lambda *args: calls["sample"].append(sample(*args)) or calls["sample"][0])
    monkeypatch.setattr(trainer.scoring.teacher, "logp", lambda *args: calls["teacher"].append(args) or logp(*args))
    monkeypatch.setattr(Policy, "forward", lambda self, inputs, loss: calls["student"].append(inputs) or forward(self, inputs, loss))
    done = trainer.train_step()
    rollouts, slices = calls["sample"][0], done.tokens.slices
    assert len(slices) == len(calls["student"]) == len(calls["teacher"]) > 1
    scored = []
    for part, student_inputs, (teacher_inputs, ids_N, _) in zip(slices, calls["student"], calls["teacher"], strict=True):
        expected = [token for index in part.batch.rollouts for token in rollouts[index].completion]
        assert ids_N.tolist() == expected
        for inputs in (student_inputs, teacher_inputs):
            assert inputs.ids_BT.flatten()[inputs.predicting_N + 1].tolist() == expected
        for row, index in enumerate(part.batch.rollouts):
            prompt, completion = rollouts[index].request.prompt, rollouts[index].completion
            assert tuple(student_inputs.ids_BT[row, : len(prompt.ids + completion)].tolist()) == prompt.ids + completion
            assert (
                tuple(teacher_inputs.ids_BT[row, : len(prompt.seen_by_teacher + completion)].tolist())
                == prompt.seen_by_teacher + completion
            )
        scored += part.batch.rollouts
    assert sorted(scored) == list(range(12))


@pytest.mark.parametrize("pad", [0, 1, 22])
def test_padding_and_its_id_change_no_log_prob(pad):
    teacher = LocalTeacher(random_model(), VOCABULARY)
    short, long = rollout_of((3, 4), (5, 1)), rollout_of((6, 7, 8, 9), (10, 11, 12, 13, 14, 1), index=1)
    alone, together = collate([short], [0], pad), collate([long, short], [0, 1], pad)
    expected = teacher.logp(alone.inputs, alone.ids_N, 0.7)
    assert torch.allclose(teacher.logp(together.inputs, together.ids_N, 0.7)[-2:], expected, atol=1e-5)


def test_tokens_in_a_hole_of_the_mask_are_context_of_later_tokens():
    teacher = LocalTeacher(random_model(), VOCABULARY)
    everything, holes = (collate([rollout_of((3, 4), LONG, mask=mask)], [0], 0) for mask in (None, HOLES))
    logp_N = teacher.logp(everything.inputs, everything.ids_N, 0.7)
    assert torch.allclose(teacher.logp(holes.inputs, holes.ids_N, 0.7), logp_N[list(HOLES)], atol=1e-5)


def test_a_teacher_with_its_own_prompt_scores_the_same_completion(tmp_path):
    teacher = LocalTeacher(random_model(), VOCABULARY)
    plain = rollout_of((3, 4), (5, 6, 1))
    prompted = replace(plain, request=Request(Prompt(0, (3, 4), "", teacher_ids=(9, 10, 11, 3, 4))))
    batch = collate([prompted, plain], [0, 1], pad_id=0)
    assert batch.inputs.ids_BT.shape[1] == 5 and batch.teacher_inputs.ids_BT.shape[1] == 8
    logp_N = teacher.logp(batch.teacher_inputs, batch.ids_N, 0.7)
    for rows, alone in ((slice(3), rollout_of((9, 10, 11, 3, 4), (5, 6, 1))), (slice(3, 6), plain)):
        expected = collate([alone], [0], 0)
        assert torch.allclose(logp_N[rows], teacher.logp(expected.inputs, expected.ids_N, 0.7), atol=1e-5)
    trainer = make_trainer(tmp_path)
    trainer.sampler = FixedSampler([prompted, plain])
    assert torch.allclose(
        trainer.begin_step().as_sampled("teacher_logp"), trainer.scoring.teacher.logp(batch.teacher_inputs, batch.ids_N, 0.7)
    )


def test_masked_positions_cannot_matter_even_as_nan():
    """NaN in the final hidden states of prompt and padding reaches neither loss nor gradient: they are left out before any product."""
    model = random_model()
    batch = collate([rollout_of((3, 4, 5), (7, 8, 1), mask=(True, False, True)), rollout_of((6,), (1,))], [0, 1], pad_id=0)
    others = torch.ones(batch.inputs.ids_BT.numel(), dtype=torch.bool).index_fill(0, batch.inputs.predicting_N, False)

    def poison(module, args, output):
        output.last_hidden_state = output.last_hidden_state.masked_fill(others.view(*batch.inputs.ids_BT.shape, 1), math.nan)

    model.base_model.register_forward_hook(poison)
    zeros = torch.zeros(len(batch.ids_N))
    tokens = Sampled(target_N=batch.ids_N, teacher_logp_N=zeros, behaviour_logp_N=zeros)
    loss, _ = Policy(model, VOCABULARY)(batch.inputs, lambda hidden, head: chunked_loss(hidden, head, sampled(tokens, 1.0, Clips())))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Which tokens are trained.


def test_loss_prefix_masks_later_tokens(tmp_path):
    done = make_trainer(tmp_path, ppo__loss_prefix=12, **UNEVEN).train_step()
    lengths = [len(rollout.completion) for rollout in done.tokens.rollouts]
    assert min(lengths) < 12 < max(lengths)
    assert [rollout.trained for rollout in done.tokens.rollouts] == [list(range(min(12, length))) for length in lengths]
    assert done.metrics["tokens"] == sum(min(12, length) for length in lengths)
    assert done.metrics["length"] == sum(lengths) / len(lengths)  # of the whole completions


def test_loss_prefix_trains_as_if_completions_ended_there(tmp_path):
    def step(rollouts, **options):
        trainer = make_trainer(tmp_path, ppo__importance_cap=None, **options)
        trainer.sampler = FixedSampler(rollouts)
        trainer.train_step()
        return weights(trainer)

    whole = [rollout_of(PROMPTS[0], (5,)), rollout_of(PROMPTS[1], LONG, index=1)]
    cut = [whole[0], rollout_of(PROMPTS[1], LONG[:3], index=1)]
    assert torch.allclose(step(whole, ppo__loss_prefix=3), step(cut), atol=1e-5)
    assert not torch.allclose(step(whole), step(cut), atol=1e-4)


def test_loss_prefix_trains_no_token_that_was_masked_before(tmp_path):
    trainer = make_trainer(tmp_path, ppo__loss_prefix=4)
    (masked,) = with_masks(trainer.config, [rollout_of((6,), LONG, mask=HOLES)])
    assert masked.trained == [0, 2, 3]


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("truncated", ["keep", "mask", "drop"])
def test_truncated_completions_are_left_out_of_the_gradient_unless_kept(tmp_path, truncated, reduction):
    """Against the same step with the complete completions alone."""
    complete = [rollout_of(PROMPTS[0], (5, 6, 1), index=0), rollout_of(PROMPTS[2], (7, 1), index=2)]
    cut_off = rollout_of(PROMPTS[1], (7, 8, 9, 10, 11), FinishReason.length, index=1)
    rollouts = [complete[0], cut_off, complete[1]]

    def step(rollouts, truncated="keep"):
        trainer = make_trainer(tmp_path, ppo__reduction=reduction, ppo__importance_cap=None, sampling__truncated=truncated)
        trainer.sampler = FixedSampler(rollouts)
        done = trainer.train_step()
        return done, weights(trainer), trainer.scoring.token_weights(done.tokens.rollouts)[0].tolist()

    done, trained, loss_weights = step(rollouts, truncated)
    _, without, _ = step(complete)
    assert torch.allclose(trained, without, atol=1e-5) == (truncated != "keep")
    assert done.metrics["tokens"] == (5 if truncated == "drop" else 10)
    assert (done.metrics["finish/stop"], done.metrics["finish/length"]) == (2, 1)
    assert [weight > 0 for weight in loss_weights] == [True, truncated == "keep", True]


@pytest.mark.parametrize("truncated", ["mask", "drop"])
def test_a_step_of_truncated_completions_only_changes_nothing(tmp_path, truncated):
    trainer = make_trainer(tmp_path, sampling__truncated=truncated, sampling__max_new_tokens=2)
    before = weights(trainer)
    trainer.sampler.eos = torch.tensor([999])
    metrics = trainer.train_step().metrics
    assert torch.equal(weights(trainer), before) and metrics["optim/skipped"] == 1 and metrics["truncated"] == 1
    assert trainer.trouble.steps == 0  # no number was wrong
    assert not optimizer_state(trainer)


def test_task_rewards_are_normalised_among_a_prompts_completions_and_added_to_advantages(tmp_path):
    class Judge(NoEvaluator):
        def judge(self, rollouts):
            return [1.0, 0.0, None, None, 1.0, 1.0]

    plain = make_trainer(tmp_path).train_step().tokens
    trainer = make_trainer(tmp_path, ppo__reward_coef=0.5)
    trainer.evaluator = Judge()
    rewarded = trainer.train_step().tokens
    assert rewarded.bonus_R.tolist() == [0.5, -0.5, 0, 0, 0, 0]
    gain_N = rewarded.as_sampled("advantage") - plain.as_sampled("advantage")
    expected = [rewarded.bonus_R[index] for index, rollout in enumerate(rewarded.rollouts) for _ in rollout.trained]
    assert torch.allclose(gain_N, torch.stack(expected), atol=1e-5)


def test_the_sampler_is_refreshed_after_every_update(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, ppo__steps=2)
    seen = []
    monkeypatch.setattr(trainer.sampler, "refresh", lambda: seen.append(weights(trainer)))
    trainer.train_step()
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], weights(trainer))


# Micro-batches, packing and memory.


@pytest.mark.parametrize("estimator", ["sampled", "baseline", "exact", "topk"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("max_tokens", [1, 20, 45])
def test_micro_batches_do_not_change_the_result(tmp_path, estimator, reduction, max_tokens):
    options = {"ppo__estimator": estimator, "ppo__reduction": reduction, "ppo__steps": 2}
    if estimator == "topk":
        options |= {"ppo__k": 4}
    if estimator == "baseline":
        options |= {"ppo__estimator": "sampled", "ppo__baseline": True, "ppo__discount": 0.5}
    whole = weights_after(tmp_path, train__max_tokens_per_micro_batch=10_000, **options)
    split = weights_after(tmp_path, train__max_tokens_per_micro_batch=max_tokens, **options)
    assert torch.allclose(whole, split, atol=2e-5)
    assert not torch.allclose(whole, weights(make_trainer(tmp_path)), atol=1e-3)  # something was trained


def test_sampling_batches_do_not_change_the_result(tmp_path):
    assert torch.allclose(weights_after(tmp_path, sampling__batch_size=1), weights_after(tmp_path), atol=2e-5)


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_does_not_change_the_result(tmp_path, estimator, attention):
    options = {"ppo__estimator": estimator, "ppo__steps": 2}
    models = [random_model(VOCABULARY, seed=1, attn_implementation=attention) for _ in range(2)]
    padded = weights_after(tmp_path, student=models[0], **options)
    packed = weights_after(tmp_path, student=models[1], train__packing=True, train__max_tokens_per_micro_batch=40, **options)
    assert torch.allclose(padded, packed, atol=2e-5)


def test_packed_micro_batches_have_no_padding(tmp_path):
    tokens = make_trainer(tmp_path, train__packing=True, **UNEVEN).begin_step()
    assert len(tokens.slices) == 1
    assert tokens.slices[0].batch.inputs.ids_BT.shape == (1, sum(rollout.length for rollout in tokens.rollouts))


def test_a_short_completion_is_not_padded_to_a_long_one(tmp_path):
    trainer = make_trainer(tmp_path, train__packing=False, train__max_tokens_per_micro_batch=4096)
    long, short = rollout_of((2,) * 200, (3,)), rollout_of((2,) * 10, (3,))
    for rollouts, slices in (([long, short], 2), ([long, long], 1)):
        tokens = Tokens(rollouts, trainer.device)
        trainer.scoring.score(tokens)
        assert len(tokens.slices) == slices


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("packing", [False, True])
def test_out_of_memory_in_the_update_makes_smaller_micro_batches_and_the_same_step(tmp_path, monkeypatch, packing):
    options = {"ppo__steps": 2, "train__packing": packing, "train__max_tokens_per_micro_batch": 120}
    plenty = weights_after(tmp_path, **options)
    trainer = make_trainer(tmp_path, **options)
    forward, logp, refused, scored = Policy.forward, trainer.scoring.teacher.logp, [], []

    def tight(self, inputs, loss):
        if inputs.ids_BT.numel() > 30:
            refused.append(inputs.ids_BT.numel())
            out_of_memory()
        return forward(self, inputs, loss)

    monkeypatch.setattr(Policy, "forward", tight)
    monkeypatch.setattr(trainer.scoring.teacher, "logp", lambda *args: scored.append(len(args[1])) or logp(*args))
    tokens = [trainer.train_step().metrics["tokens"] for _ in range(2)]
    max_tokens = trainer.scoring.choices["max_tokens"]
    assert refused and max_tokens <= 60 and trainer.saved_state["choices"]["max_tokens"] == max_tokens
    assert torch.allclose(weights(trainer), plenty, atol=2e-5)
    assert sum(scored) == sum(tokens)  # the teacher scored each token once
    monkeypatch.setattr(Policy, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):  # also with one rollout in a micro-batch
        trainer.train_step()


def test_out_of_memory_in_the_teacher_makes_smaller_micro_batches_and_the_same_step(tmp_path, monkeypatch):
    plenty = weights_after(tmp_path, train__max_tokens_per_micro_batch=120)
    trainer = make_trainer(tmp_path, train__max_tokens_per_micro_batch=120)
    logp = trainer.scoring.teacher.logp
    tight = lambda inputs, *args: out_of_memory() if inputs.ids_BT.numel() > 30 else logp(inputs, *args)  # noqa: E731
    monkeypatch.setattr(trainer.scoring.teacher, "logp", tight)
    for _ in range(2):
        trainer.train_step()
    assert trainer.scoring.choices["max_tokens"] <= 60
    assert torch.allclose(weights(trainer), plenty, atol=2e-5)


def test_activation_checkpointing_recomputes_and_changes_nothing(tmp_path):
    plain = weights_after(tmp_path, student=random_model(VOCABULARY, seed=1, attention_dropout=0.5))
    student = random_model(VOCABULARY, seed=1, attention_dropout=0.5)
    calls = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert torch.allclose(plain, weights_after(tmp_path, student=student, train__activation_checkpointing=True), atol=1e-6)
    assert sum(calls) == 2 * 2  # with gradient twice a step: forward, and again in the backward pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile uses parts of torch that torch deprecates
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])  # without and with compiled kernels
def test_compiled_layers_change_nothing(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    assert torch.allclose(weights_after(tmp_path), weights_after(tmp_path, train__compile=True), atol=2e-5)


# Numerics.


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_unchanged(tmp_path):
    trainer = make_trainer(tmp_path, train__max_steps=9, ppo__steps=2)
    trainer.train_step()
    before, state = weights(trainer), optimizer_state(trainer)
    teacher = trainer.scoring.teacher
    trainer.scoring.teacher = PoisonedTeacher(teacher)
    done = trainer.train_step()
    assert done.metrics["optim/skipped"] == 1 and not math.isfinite(done.metrics["loss"])
    assert done.tokens.inner == 1  # no second inner step on the same tokens
    assert torch.equal(before, weights(trainer)) and trainer.trouble.steps == 1
    assert state.keys() == optimizer_state(trainer).keys()
    assert all(torch.equal(value, optimizer_state(trainer)[name]) for name, value in state.items())
    trainer.scoring.teacher = teacher
    assert trainer.train_step().metrics["optim/skipped"] == 0
    assert not torch.equal(before, weights(trainer)) and trainer.trouble.steps == 0


def test_a_gradient_that_is_not_finite_skips_the_update(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    before, gradients = weights(trainer), Step.gradients

    def overflow(self, *args):
        result = gradients(self, *args)
        trainer.student.model.norm.weight.grad[0] = math.inf
        return result

    monkeypatch.setattr(Step, "gradients", overflow)
    metrics = trainer.train_step().metrics
    assert metrics["optim/skipped"] == 1 and math.isfinite(metrics["loss"]) and "optim/grad_norm" not in metrics
    assert torch.equal(before, weights(trainer)) and trainer.trouble.steps == 1


def test_the_samples_with_scores_that_are_not_finite_are_the_suspects(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.scoring.teacher = PoisonedTeacher(trainer.scoring.teacher)
    done = trainer.train_step()
    longest = max(range(6), key=lambda index: done.tokens.rollouts[index].length)
    assert trainer.trouble.places == [longest // 2]  # the first row is of the longest rollout; two rollouts for each prompt


# The device is not waited for.


@pytest.mark.parametrize("estimator", ["sampled", "exact", "topk"])
def test_a_micro_batch_adds_no_wait_for_the_device(tmp_path, estimator):
    """But one of transformers, which looks whether the positions are those of packed sequences."""
    own = []
    for max_tokens in (4096, 12):
        trainer = make_trainer(tmp_path / str(max_tokens), train__max_tokens_per_micro_batch=max_tokens, ppo__estimator=estimator, **UNEVEN)
        tokens = trainer.begin_step()
        with Waits() as scoring:
            trainer.scoring.score(tokens)
        with Waits() as updating:
            trainer.scoring.update(tokens)
        assert scoring.count in (0, len(tokens.slices))
        own.append(updating.count - len(tokens.slices))
    assert len(tokens.slices) > 5 and own[0] == own[1] <= 5
