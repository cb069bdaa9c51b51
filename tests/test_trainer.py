"""The step and the loop: one global token count, masks, clipping, numerics, and runs that must share a trajectory."""

import copy
import math
import signal
import threading
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from opd import signals
from opd.config.compose import to_config
from opd.config.schema import Config, OptimConfig, Schedule
from opd.data.order import nth_position, take
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, collate, micro_batches, repetition, split_by_tokens
from opd.errors import ConfigError, NumericError, Preempted
from opd.models.policy import Policy
from opd.objective import Clips, Sampled, chunked_loss, sampled
from opd.objective.means import Means
from opd.samplers import GenerateSampler
from opd.teachers import LocalTeacher
from opd.training.batches import Batches
from opd.training.build import make_optimizer
from opd.training.checkpoint import Checkpoints, read
from opd.training.evaluate import Evaluation
from opd.training.loop import Evaluated, Saved, StepDone, Trainer
from opd.training.round import Round, joined, share
from opd.training.schedule import lr_factor
from opd.training.update import Update

VOCABULARY = 23


@pytest.fixture(autouse=True)
def large_eps(monkeypatch):
    """At its default eps Adam answers a gradient that is all rounding error with a full step."""
    monkeypatch.setattr("opd.training.build.ADAM_EPS", 1e-3)


class NoEvaluator:
    """Stands in where a test has nothing to evaluate."""

    def student(self, step, *_):
        return Evaluation(step, None, None)


def config(**options) -> Config:
    base = OmegaConf.structured(Config)
    values = {
        "sampling.max_new_tokens": 8,
        "train.batch_size": 3,
        "sampling.n": 2,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 0,
        "train.max_steps": 4,
    }
    for key, value in {**values, **{name.replace("__", "."): value for name, value in options.items()}}.items():
        OmegaConf.update(base, key, value)
    return to_config(base)


def make_trainer(make_model, tmp_path: Path, student=None, teacher=None, overlaps=False, **options) -> Trainer:
    settings = config(**options)
    accelerator = Accelerator(cpu=True)
    student = student or make_model(VOCABULARY, seed=1)
    teacher = (teacher or make_model(VOCABULARY, seed=2, hidden=24)).requires_grad_(False)
    policy, optimizer = accelerator.prepare(
        Policy(student, VOCABULARY, 7, settings.train.activation_checkpointing, settings.train.compile), make_optimizer(settings, student)
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(i, tuple(torch.randint(2, VOCABULARY, (2 + i % 4,), generator=generator).tolist()), "") for i in range(10)]
    choices = {"max_tokens": settings.train.max_tokens_per_micro_batch}
    batches = Batches(
        config=settings,
        accelerator=accelerator,
        teacher=LocalTeacher(teacher, VOCABULARY),
        pad_id=0,
        packed=bool(settings.train.packing),
        choices=choices,
    )
    return Trainer(
        config=settings,
        accelerator=accelerator,
        policy=policy,
        student=student,
        optimizer=optimizer,
        sampler=GenerateSampler(student, (1,), 0, VOCABULARY, settings.seed, bf16=False),
        evaluator=NoEvaluator(),
        checkpoints=Checkpoints(tmp_path / "checkpoints", settings.checkpoint.keep_last, settings.checkpoint.keep_best),
        prompts=prompts,
        batches=batches,
        update=Update(config=settings, accelerator=accelerator, policy=policy, optimizer=optimizer, batches=batches),
        max_steps=settings.train.max_steps or 1,
        saved_state={"config": {}, "choices": choices},
        overlaps=overlaps,
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.student.parameters()])


def after(make_model, tmp_path, steps=2, **options) -> torch.Tensor:
    trainer = make_trainer(make_model, tmp_path, **options)
    for _ in range(steps):
        trainer.train_step()
    return weights(trainer)


@pytest.mark.parametrize("estimator", ["sampled", "exact", "topk"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("max_tokens", [1, 20, 45])
def test_micro_batches_do_not_change_the_result(make_model, tmp_path, estimator, reduction, max_tokens):
    options = {"ppo__estimator": estimator, "ppo__reduction": reduction, "ppo__steps": 2, "ppo__k": 4}
    whole = after(make_model, tmp_path, train__max_tokens_per_micro_batch=10_000, **options)
    split = after(make_model, tmp_path, train__max_tokens_per_micro_batch=max_tokens, **options)
    assert torch.allclose(whole, split, atol=2e-5)
    assert not torch.allclose(whole, weights(make_trainer(make_model, tmp_path)), atol=1e-3)  # and something was learnt


def test_sampling_batches_do_not_change_the_result(make_model, tmp_path):
    assert torch.allclose(after(make_model, tmp_path, sampling__batch_size=1), after(make_model, tmp_path), atol=2e-5)


def rollout_of(prompt, completion, finish=FinishReason.stop, index=0) -> Rollout:
    return Rollout(Request(Prompt(index, prompt, "")), completion, torch.zeros(len(completion)), finish)


def test_gradient_is_the_mean_over_all_tokens_and_not_the_mean_of_means(make_model, tmp_path, monkeypatch):
    """Unequal lengths in two micro-batches, against the objective written out over all tokens at once."""
    trainer = make_trainer(make_model, tmp_path, ppo__advantage_clip=None, optim__max_grad_norm=1e9, train__max_tokens_per_micro_batch=9)
    rollouts = [rollout_of((3, 4), (5,), index=0), rollout_of((6,), (7, 8, 9, 10, 11, 12, 1), index=1)]
    batches = trainer.batches.split(rollouts)
    assert len(batches) == 2
    grabbed = {}
    gradients = lambda *_, **__: grabbed.update({n: p.grad.clone() for n, p in trainer.student.named_parameters()})  # noqa: E731
    monkeypatch.setattr(Update, "apply", gradients)
    trainer.config.ppo.importance_cap = None
    current = Round(rollouts, rollouts)
    trainer.batches.score(current)
    trainer.inner_step(current)
    trainer.student.zero_grad()
    temperature, losses = trainer.config.sampling.temperature, []
    for rollout in rollouts:
        ids = torch.tensor([rollout.request.prompt.ids + rollout.completion])
        start = len(rollout.request.prompt.ids)
        target = ids[:, start:, None]
        logp = (trainer.student(ids).logits[:, start - 1 : -1] / temperature).log_softmax(-1).gather(-1, target)
        teacher = (trainer.batches.teacher.model(ids).logits[:, start - 1 : -1] / temperature).log_softmax(-1).gather(-1, target)
        losses.append((-(teacher - logp).detach() * logp).flatten())
    torch.cat(losses).mean().backward()
    for name, parameter in trainer.student.named_parameters():
        assert torch.allclose(grabbed[name], parameter.grad, atol=1e-5, rtol=1e-4), name


def test_the_end_of_sequence_token_is_learnt_and_the_prompt_is_not():
    batch = collate([rollout_of((3, 4, 5), (7, 8, 1)), rollout_of((6,), (1,))], [0, 1], pad_id=1)
    width = batch.inputs.ids_BT.shape[1]
    assert batch.target_N.tolist() == [7, 8, 1, 1]
    assert batch.inputs.kept_N.tolist() == [2, 3, 4, width + 0]
    following = batch.inputs.ids_BT.flatten()[batch.inputs.kept_N + 1]
    assert following.tolist() == batch.target_N.tolist()  # each kept position predicts its own target: labels are shifted once
    assert batch.sequence_N.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("pad", [0, 1, 22])
def test_padding_and_what_it_is_made_of_change_nothing(make_model, pad):
    model = make_model()
    teacher = LocalTeacher(model, VOCABULARY)
    short, long = rollout_of((3, 4), (5, 1)), rollout_of((6, 7, 8, 9), (10, 11, 12, 13, 14, 1), index=1)
    alone = teacher.logp(collate([short], [0], pad), 0.7)
    together = teacher.logp(collate([long, short], [0, 1], pad), 0.7)
    assert torch.allclose(together[-2:], alone, atol=1e-5)


def test_the_prefix_limit_leaves_later_tokens_out_of_the_loss(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, ppo__loss_prefix=2, sampling__n=4)
    metrics = trainer.train_step()
    limited = [len(item.logp) for item in metrics.scored]
    assert max(limited) == 2
    all_tokens = make_trainer(make_model, tmp_path, sampling__n=4).train_step().metrics["tokens"]
    assert metrics.metrics["tokens"] < all_tokens
    rollout = rollout_of((3,), (4, 5, 6, 1))
    assert rollout.first(2).completion == (4, 5) and len(rollout.first(2).behaviour_logp) == 2 and rollout.first(None) is rollout


def test_the_ids_that_were_sampled_are_the_ids_that_are_scored(make_model, tmp_path):
    """Never decoded and tokenised again: the student's ids, in any order that no tokenizer would write, reach both models as they are."""
    trainer = make_trainer(make_model, tmp_path)
    rollouts = trainer.sample()
    scored = [(int(i), int(t)) for batch in trainer.batches.split(rollouts) for i, t in zip(batch.sequence_N, batch.target_N, strict=True)]
    assert sorted(scored, key=lambda pair: pair[0]) == [(i, t) for i, rollout in enumerate(rollouts) for t in rollout.completion]


def test_a_prompt_boundary_belongs_to_its_row():
    rollouts = [rollout_of(tuple(range(2, 2 + n)), (20, 21, 1), index=n) for n in (1, 5, 3)]
    for batch in micro_batches(rollouts, 1000, pad_id=0):
        assert batch.target_N.tolist() == [20, 21, 1] * 3


def test_clipping_binds_from_the_second_inner_step_on(make_model, tmp_path):
    def clipped(steps):
        trainer = make_trainer(make_model, tmp_path, ppo__steps=steps, ppo__clip_eps=0.01, optim__lr=5e-2)
        return trainer.train_step().metrics

    assert clipped(1)["clipped"] == 0 and clipped(1)["ratio"] == 1
    assert clipped(2)["clipped"] > 0.02 and clipped(2)["ratio"] != 1


def test_a_teacher_that_is_the_student_teaches_nothing(make_model, tmp_path):
    student = make_model(VOCABULARY, seed=1)
    trainer = make_trainer(make_model, tmp_path, student=student, teacher=make_model(VOCABULARY, seed=1))
    before = weights(trainer)
    metrics = trainer.train_step().metrics
    assert abs(metrics["reverse_kl"]) < 1e-5 and metrics["optim/grad_norm"] < 1e-4
    assert metrics["engine_gap"] < 1e-5
    assert torch.allclose(before, weights(trainer), atol=1e-4)


def test_exact_distillation_brings_the_student_to_the_teacher(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("opd.training.build.ADAM_EPS", 1e-8)
    options = {"ppo__estimator": "exact", "train__max_steps": 60, "train__batch_size": 10, "optim__lr": 1e-2}
    trainer = make_trainer(make_model, tmp_path, student=make_model(VOCABULARY, seed=1, hidden=32), **options)
    kl = [trainer.train_step().metrics["reverse_kl"] for _ in range(60)]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])


def test_teacher_is_frozen_and_in_no_checkpoint(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path)
    before = [p.clone() for p in trainer.batches.teacher.model.parameters()]
    for event in trainer.run():
        assert isinstance(event, StepDone | Evaluated | Saved)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.batches.teacher.model.parameters(), strict=True))
    saved = sorted(path.name for path in (tmp_path / "checkpoints" / "step_000004").iterdir())
    assert saved == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    student = sum(p.numel() for p in trainer.student.parameters())
    from safetensors.torch import load_file

    assert sum(t.numel() for t in load_file(tmp_path / "checkpoints/step_000004/model.safetensors").values()) == student


def test_dropout_is_off_in_every_pass(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, student=make_model(VOCABULARY, seed=1, attention_dropout=0.5))
    assert trainer.train_step().metrics["engine_gap"] < 1e-5
    assert not trainer.student.training


def test_master_weights_are_float32(make_model):
    from opd.models.policy import prepare_student

    student = prepare_student(make_model().to(torch.bfloat16), torch.device("cpu"))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, train__max_steps=9)
    trainer.train_step()
    before, state = weights(trainer), {k: v.clone() for k, v in optimizer_state(trainer).items()}
    honest = trainer.batches.teacher
    trainer.batches.teacher = Poisoned(honest)
    metrics = trainer.train_step().metrics
    assert metrics["optim/skipped"] == 1 and not math.isfinite(metrics["loss"])
    assert torch.equal(before, weights(trainer))
    assert all(torch.equal(v, optimizer_state(trainer)[k]) for k, v in state.items())
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(NumericError, match=r"3 steps in a row were not finite \(step 4\), there is no checkpoint to go back to"):
        trainer.rewind()
    trainer.batches.teacher = honest
    assert trainer.train_step().metrics["optim/skipped"] == 0
    assert not torch.equal(before, weights(trainer))


class Poisoned:
    """A teacher one of whose answers is NaN."""

    def __init__(self, teacher):
        self.teacher = teacher

    def logp(self, batch, temperature):
        return self.teacher.logp(batch, temperature).index_fill(0, torch.tensor([0]), math.nan)

    def states(self, batch):
        return self.teacher.states(batch)


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    from opd.training.checkpoint import optimizer_tensors

    return optimizer_tensors(trainer.optimizer)


def test_masked_positions_cannot_matter_even_as_nan(make_model):
    """NaN in the final hidden states of prompt and padding reaches neither loss nor gradient: they are left out before any product."""
    model = make_model()
    batch = collate([rollout_of((3, 4, 5), (7, 8, 1)), rollout_of((6,), (1,))], [0, 1], pad_id=0)
    others = torch.ones(batch.inputs.ids_BT.numel(), dtype=torch.bool).index_fill(0, batch.inputs.kept_N, False)

    def poison(module, args, output):
        output.last_hidden_state = output.last_hidden_state.masked_fill(others.view(*batch.inputs.ids_BT.shape, 1), math.nan)

    model.base_model.register_forward_hook(poison)
    zeros = torch.zeros(len(batch.target_N))
    tokens = Sampled(target_N=batch.target_N, teacher_logp_N=zeros, behaviour_logp_N=zeros)
    loss, _ = Policy(model, VOCABULARY)(batch.inputs, lambda hidden, head: chunked_loss(hidden, head, sampled(tokens, 1.0, Clips())))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_reported_loss_is_the_one_that_is_minimised(make_model, tmp_path, reduction):
    trainer = make_trainer(make_model, tmp_path, ppo__reduction=reduction, ppo__advantage_clip=None, ppo__importance_cap=None)
    rollouts = trainer.sample()
    done = trainer.train_step()
    by_rollout = {}
    for batch in trainer.batches.split(rollouts):
        teacher = trainer.batches.teacher.logp(batch, trainer.config.sampling.temperature)
        for index, value in zip(batch.sequence_N.tolist(), (batch.behaviour_logp_N - teacher).tolist(), strict=True):
            by_rollout.setdefault(index, []).append(value)
    means = [sum(values) / len(values) for values in by_rollout.values()]
    tokens = [value for values in by_rollout.values() for value in values]
    expected = sum(tokens) / len(tokens) if reduction == "token" else sum(means) / len(means)
    assert math.isclose(done.metrics["loss"], expected, rel_tol=1e-4)


def test_a_run_beyond_its_last_step_ends(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, train__max_steps=2)
    trainer.step = 5
    assert [type(event) for event in trainer.run()] == [Evaluated]


def test_resume_is_bitwise_at_every_step_across_epochs(make_model, tmp_path):
    options = {"train__max_steps": 9, "ppo__steps": 2, "checkpoint__every": 1, "checkpoint__keep_last": 20}
    straight = make_trainer(make_model, tmp_path / "straight", **options)
    trajectory = []
    for event in straight.run():
        if isinstance(event, StepDone):
            trajectory.append(weights(straight))
    assert straight.step * straight.prompts_per_step > 2 * len(straight.prompts)  # several epochs
    for step in range(1, 9):
        resumed = make_trainer(make_model, tmp_path / "straight", **options)
        resumed.go_on(read(straight.checkpoints.path(step)))
        for _ in range(step, 9):
            resumed.train_step()
        assert torch.equal(weights(resumed), trajectory[-1])


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
@pytest.mark.parametrize("place", [1, 2])
def test_a_stop_between_inner_steps_goes_on_from_the_rollouts_bit_for_bit(make_model, tmp_path, monkeypatch, estimator, place):
    options = {"train__max_steps": 2, "ppo__steps": 3, "ppo__estimator": estimator, "ppo__loss_prefix": 5, "checkpoint__every": 9}
    straight = make_trainer(make_model, tmp_path / "straight", **options)
    events = [event for event in straight.run() if isinstance(event, StepDone)]
    stopped = make_trainer(make_model, tmp_path / "stopped", **options)
    looks = iter(range(100))
    monkeypatch.setattr(signals, "requested", lambda: next(looks) == place + 1)
    with pytest.raises(Preempted):
        list(stopped.run())
    monkeypatch.setattr(signals, "requested", lambda: False)
    found = stopped.checkpoints.newest()
    assert found.moment == (0, place) and found.path.name == f"step_000000_{place}"
    resumed = make_trainer(make_model, tmp_path / "stopped", **options)
    monkeypatch.setattr(resumed.sampler, "sample", forbidden_at_step_0(resumed))
    resumed.go_on(found)
    assert len(resumed.round.seen["logp"]) == sum(len(rollout.completion) for rollout in resumed.round.learnt)
    again = [event for event in resumed.run() if isinstance(event, StepDone)]
    assert torch.equal(weights(resumed), weights(straight))
    untimed = [{k: v for k, v in e.metrics.items() if "time" not in k and "per_second" not in k} for e in (*events, *again)]
    assert untimed[:2] == untimed[2:]


def forbidden_at_step_0(trainer):
    sample = trainer.sampler.sample

    def guarded(*args):
        assert trainer.step > 0, "sampled again"
        return sample(*args)

    return guarded


def test_a_round_is_shared_out_to_another_number_of_processes(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, train__batch_size=4, ppo__loss_prefix=3)
    whole = trainer.begin()
    trainer.inner_step(whole)
    prompts = {prompt.sample_id: prompt for prompt in trainer.prompts}
    parts = [share(whole.tensors(), whole.numbers(), prompts, rank, 2, torch.device("cpu")) for rank in range(2)]
    assert [r.completion for part in parts for r in part.written] == [r.completion for r in whole.written]
    assert [r.completion for part in parts for r in part.learnt] == [r.completion for r in whole.learnt]
    assert torch.equal(torch.cat([part.seen["logp"] for part in parts]), whole.seen["logp"])
    assert torch.equal(torch.cat([part.teacher_logp_N for part in parts]), whole.teacher_logp_N)
    assert parts[0].means.sums == whole.means.sums and set(parts[1].means.sums.values()) == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(joined([p.tensors() for p in parts]).values(), whole.tensors().values(), strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_out_of_memory_makes_smaller_micro_batches_and_the_same_step(make_model, tmp_path, monkeypatch, packing):
    options = {"ppo__steps": 2, "train__packing": packing}
    plenty = after(make_model, tmp_path, **options)
    trainer = make_trainer(make_model, tmp_path, **options)
    forward, refused = Policy.forward, []

    def tight(self, inputs, loss):
        if inputs.ids_BT.numel() > 30:
            refused.append(inputs.ids_BT.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, loss)

    monkeypatch.setattr(Policy, "forward", tight)
    for _ in range(2):
        trainer.train_step()
    assert refused and trainer.batches.max_tokens <= 60 and trainer.saved_state["choices"]["max_tokens"] == trainer.batches.max_tokens
    assert torch.allclose(weights(trainer), plenty, atol=2e-5)
    monkeypatch.setattr(Policy, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room for one")))
    with pytest.raises(torch.OutOfMemoryError, match="no room for one"):
        trainer.train_step()


def test_samples_left_out_are_left_out_and_no_other_is_missed():
    left_out = [2, 3, 7]
    assert [nth_position(number, left_out) for number in range(6)] == [0, 1, 4, 5, 6, 8]
    assert [nth_position(number, []) for number in range(3)] == [0, 1, 2]


def test_every_sample_comes_once_an_epoch_and_in_another_order_each():
    taken = take(seed=3, size=7, start=0, count=21)
    epochs = [[index for epoch, index in taken if epoch == number] for number in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(3, 7, 5, 9) == taken[5:14]
    assert take(4, 7, 0, 7) != taken[:7]


def test_processes_share_out_the_prompts_of_a_step():
    """Two processes with 2 prompts each walk the same samples as one with 4."""
    one = take(0, 11, start=4 * 3, count=4)
    two = [sample for rank in range(2) for sample in take(0, 11, start=3 * 4 + rank * 2, count=2)]
    assert one == two


def test_micro_batches_keep_to_their_budget_and_hold_every_rollout_once():
    lengths = [3, 50, 7, 7, 20, 1, 33]
    groups = split_by_tokens(lengths, 40)
    assert sorted(index for group in groups for index in group) == list(range(7))
    assert all(len(group) * max(lengths[i] for i in group) <= 40 or len(group) == 1 for group in groups)
    assert [max(lengths[i] for i in group) for group in groups] == sorted(
        (max(lengths[i] for i in group) for group in groups), reverse=True
    )


def test_schedules():
    cosine = OptimConfig(schedule=Schedule.cosine, warmup_steps=4)
    assert [round(lr_factor(cosine, step, 20), 3) for step in (0, 3, 4, 12, 20)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    linear = OptimConfig(schedule=Schedule.linear, warmup_steps=0)
    assert [lr_factor(linear, step, 10) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    constant = OptimConfig(schedule=Schedule.constant, warmup_steps=1)
    assert [lr_factor(constant, step, 10) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]


def test_gradients_are_clipped_to_the_norm(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, optim__max_grad_norm=1e-3)
    norms = []
    original = trainer.optimizer.step
    trainer.optimizer.step = lambda: norms.append(torch.cat([p.grad.flatten() for p in trainer.student.parameters()]).norm()) or original()
    assert trainer.train_step().metrics["optim/grad_norm"] > 1e-2
    assert norms[0] <= 1.001e-3


def test_means_add_up_over_parts():
    whole, parts = Means(), Means()
    values = torch.randn(10)
    whole.add_tensors({"x": values})
    parts.add_tensors({"x": values[:3]})
    parts.add_tensors({"x": values[3:]})
    assert math.isclose(whole.means()["x"], parts.means()["x"], rel_tol=1e-9)
    doubled = parts.from_tensor(2 * parts.to_tensor(torch.device("cpu")))
    assert doubled.means() == parts.means()


def test_evaluation_comes_before_after_and_every_so_many_steps(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, train__max_steps=5, eval__steps=2, checkpoint__every=3)
    happened = [
        ("eval", e.evaluation.step) if isinstance(e, Evaluated) else ("save" if isinstance(e, Saved) else "step", e.step)
        for e in trainer.run()
    ]
    assert [step for kind, step in happened if kind == "eval"] == [0, 2, 4, 5]
    assert [step for kind, step in happened if kind == "save"] == [3, 5]
    assert happened[0] == ("eval", 0) and happened[-1] == ("eval", 5)


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_computes_no_padding_and_changes_nothing(make_model, tmp_path, estimator, attention):
    options = {"ppo__estimator": estimator, "ppo__steps": 2}
    models = [make_model(VOCABULARY, seed=1, attn_implementation=attention) for _ in range(2)]
    padded = after(make_model, tmp_path, student=models[0], **options)
    packed = after(make_model, tmp_path, student=models[1], train__packing=True, train__max_tokens_per_micro_batch=40, **options)
    assert torch.allclose(padded, packed, atol=2e-5)
    rollouts = [rollout_of((3, 4, 5), (7, 8, 1)), rollout_of((6,), (1,))]
    batch = collate(rollouts, [0, 1], pad_id=0, packed=True)
    assert batch.inputs.ids_BT.tolist() == [[3, 4, 5, 7, 8, 1, 6, 1]]
    assert batch.inputs.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch.inputs.kept_N.tolist() == [2, 3, 4, 6]


def test_packed_micro_batches_keep_to_their_budget():
    groups = split_by_tokens([3, 50, 7, 7, 20, 1, 33], 40, packed=True)
    lengths = [3, 50, 7, 7, 20, 1, 33]
    assert sorted(index for group in groups for index in group) == list(range(7))
    assert all(sum(lengths[i] for i in group) <= 40 or len(group) == 1 for group in groups)


class WholeMatrices(TorchDispatchMode):
    """How many tensors of the shape were made within; operations that view one or write into it make none."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.made = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        fresh = isinstance(result, torch.Tensor) and not any(alias.alias_info for alias in function._schema.returns)
        self.made += fresh and result.shape == self.shape and result.layout is torch.strided
        return result


def test_a_short_completion_is_not_padded_beside_a_long_one(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, train__packing=False, train__max_tokens_per_micro_batch=4096)
    long, short = rollout_of((2,) * 200, (3,)), rollout_of((2,) * 10, (3,))
    assert len(trainer.batches.split([long, short])) == 2 and len(trainer.batches.split([long, long])) == 1


def test_a_tied_embeddings_gradient_is_that_of_autograd_in_one_matrix(make_model):
    """Over two micro-batches with ids that occur many times, one of them the padding id."""
    model = make_model(VOCABULARY, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(3)
    policy, plain = Policy(model, VOCABULARY - 2, 3), 0.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    written = [Rollout(Request(Prompt(i, (0, 5, 2 + i), "")), (3, 5, 5, 1), torch.zeros(4), FinishReason.stop) for i in range(6)]
    batches = [collate(written, indices, 0) for indices in ([0, 1, 2, 3], [4, 5])]
    weight = torch.randn(4 * len(written), generator=generator).split([16, 8])

    def nll(logits, target):
        return -logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]

    def loss_on(batch, weight_N):
        def token_loss(logits, part):
            return nll(logits, batch.target_N[part]), {}

        return lambda hidden, head: chunked_loss(hidden, head, token_loss, weight_N=weight_N)

    found = []
    for batch, own in zip(batches, weight, strict=True):
        total, _ = policy(batch.inputs, loss_on(batch, own))
        with WholeMatrices((VOCABULARY, 16)) as matrices:
            total.backward()
        found.append(matrices.made)
        logits = model(input_ids=batch.inputs.ids_BT).logits.flatten(0, 1)[batch.inputs.kept_N, : VOCABULARY - 2]
        plain = plain + (nll(logits, batch.target_N) * own).sum()
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert found == [0, 0]
    model.zero_grad()
    assert not model.model.embed_tokens.sparse, "the module is as it was"
    plain.backward()
    assert all(torch.allclose(mine[name], parameter.grad, atol=1e-5) for name, parameter in model.named_parameters())


def test_activation_checkpointing_recomputes_and_changes_nothing(make_model, tmp_path):
    plain = after(make_model, tmp_path, student=make_model(VOCABULARY, seed=1, attention_dropout=0.5))
    student = make_model(VOCABULARY, seed=1, attention_dropout=0.5)
    calls = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert torch.allclose(plain, after(make_model, tmp_path, student=student, train__activation_checkpointing=True), atol=1e-6)
    assert sum(calls) == 2 * 2  # with gradient twice a step: forward, and again in the backward pass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile uses parts of torch that torch deprecates
def test_compiled_layers_change_nothing(make_model, tmp_path):
    assert torch.allclose(after(make_model, tmp_path), after(make_model, tmp_path, train__compile=True), atol=2e-5)


def test_a_teacher_with_a_prompt_of_its_own_scores_the_same_tokens(make_model):
    model = make_model()
    teacher = LocalTeacher(model, VOCABULARY)
    plain = rollout_of((3, 4), (5, 6, 1))
    prompted = replace(plain, request=Request(Prompt(0, (3, 4), "", teacher_ids=(9, 10, 11, 3, 4))))
    other = rollout_of((9, 10, 11, 3, 4), (5, 6, 1))
    batch = collate([prompted, plain], [0, 1], pad_id=0)
    assert batch.inputs.ids_BT.shape[1] == 5 and batch.teacher_inputs.ids_BT.shape[1] == 8
    found = teacher.logp(batch, 0.7)
    assert torch.allclose(found[:3], teacher.logp(collate([other], [0], 0), 0.7), atol=1e-5)
    assert torch.allclose(found[3:], teacher.logp(collate([plain], [0], 0), 0.7), atol=1e-5)


def test_task_rewards_are_added_within_a_prompts_completions(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, ppo__reward_coef=0.5)

    class Judge(NoEvaluator):
        def judge(self, rollouts):
            return [1.0, 0.0, None, None, 1.0, 1.0]

    trainer.evaluator = Judge()
    rollouts = trainer.sample()
    assert trainer.task_bonus(rollouts).tolist() == [0.5, -0.5, 0, 0, 0, 0]
    assert math.isfinite(trainer.train_step().metrics["loss"])


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("truncated", ["mask", "drop"])
def test_cut_off_completions_are_left_out_of_the_gradient(make_model, tmp_path, monkeypatch, truncated, reduction):
    """As if they had not been written: against the same step with the whole completions alone."""
    rollouts = [
        rollout_of((3, 4), (5, 6, 1), index=0),
        rollout_of((6,), (7, 8, 9, 10, 11), FinishReason.length, index=1),
        rollout_of((6, 2), (7, 1), index=2),
    ]

    def step(written, **options):
        trainer = make_trainer(make_model, tmp_path, ppo__reduction=reduction, ppo__importance_cap=None, **options)
        monkeypatch.setattr(Trainer, "sample", lambda self: written)
        done = trainer.train_step()
        return weights(trainer), done

    found, done = step(rollouts, sampling__truncated=truncated)
    expected, _ = step([rollouts[0], rollouts[2]])
    everything, _ = step(rollouts)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, everything, atol=1e-4)
    assert done.metrics["tokens"] == (10 if truncated == "mask" else 5)
    assert (done.metrics["finish/stop"], done.metrics["finish/length"]) == (2, 1)


@pytest.mark.parametrize("truncated", ["mask", "drop"])
def test_a_step_of_nothing_but_cut_off_completions_changes_nothing(make_model, tmp_path, truncated):
    trainer = make_trainer(make_model, tmp_path, sampling__truncated=truncated, sampling__max_new_tokens=2)
    before = weights(trainer)
    trainer.sampler.eos = torch.tensor([999])
    metrics = trainer.train_step().metrics
    assert torch.equal(weights(trainer), before) and metrics["optim/skipped"] == 1 and metrics["truncated"] == 1
    assert trainer.trouble.steps == 0  # nothing was wrong with the numbers
    assert not trainer.optimizer.state_dict()["state"]


def test_the_sampler_is_told_of_every_update(make_model, tmp_path, monkeypatch):
    trainer = make_trainer(make_model, tmp_path, ppo__steps=2)
    told = []
    monkeypatch.setattr(trainer.sampler, "refresh", lambda: told.append(weights(trainer)), raising=False)
    trainer.train_step()
    assert len(told) == 2 and torch.equal(told[-1], weights(trainer))


class Recording:
    """A sampler that notes what it was asked, and that weights were handed to it, with the weights of then."""

    def __init__(self, trainer, inner):
        self.trainer, self.inner, self.asked = trainer, inner, []

    def sample(self, requests, decoding, stream):
        self.asked.append(([request.prompt.sample_id for request in requests], weights(self.trainer)))
        return self.inner.sample(requests, decoding, stream)

    def refresh(self):
        pass

    def sync_weights(self, lead):
        self.asked.append(([], weights(self.trainer)))


def test_with_a_lag_the_next_step_is_sampled_with_the_weights_before_the_update(make_model, tmp_path):
    trainer = make_trainer(make_model, tmp_path, sampling__lag=1, sampling__engine="vllm", sampling__vllm__url="http://localhost:1")
    trainer.sampler = Recording(trainer, trainer.sampler)
    before = weights(trainer)
    first = trainer.train_step()
    trainer.settle()
    ids = [asked[0] for asked in trainer.sampler.asked]
    expected = [[r.prompt.sample_id for r in trainer.requests(step)] for step in (0, 1)]
    assert ids == [[], expected[0], [], expected[1]]  # the weights; this step's; the weights, which are the same; the next step's
    assert all(torch.equal(seen, before) for _, seen in trainer.sampler.asked[:3])
    second = trainer.train_step()
    assert first.metrics["engine_gap"] < 1e-5 < second.metrics["engine_gap"]  # of the weights of one step before, and corrected for
    for _ in range(2):
        trainer.train_step()
    assert trainer.ahead is None  # nothing is sampled behind the last step


class Inline(Executor):
    """Runs what it is given at once, in the thread that gives it."""

    def submit(self, work, *args):
        done = Future()
        done.set_result(work(*args))
        return done


def untimed(done: StepDone) -> dict[str, float]:
    return {name: value for name, value in done.metrics.items() if "time" not in name and "per_second" not in name}


@pytest.mark.parametrize("options", [{}, {"ppo__loss_prefix": 5}, {"sampling__truncated": "drop"}, {"sampling__truncated": "mask"}])
def test_a_teacher_that_scores_while_the_student_samples_says_the_same(make_model, tmp_path, options):
    options = {"ppo__steps": 2, "sampling__max_new_tokens": 12, **options}
    steps = {}
    for name, rows in (("thread", 2), ("inline", 2), ("serial", 2), ("one batch", 64), ("one batch, serial", 64)):
        trainer = make_trainer(make_model, tmp_path / name, overlaps="serial" not in name, sampling__batch_size=rows, **options)
        if name == "inline":
            trainer.overlap.background = Inline()
        done = [trainer.train_step() for _ in range(2)]
        first = [(row.rollout.completion, row.teacher_logp.tolist()) for row in done[0].scored]
        steps[name] = ([untimed(one) for one in done], first, weights(trainer))
    for mine, reference in (("thread", "inline"), ("one batch", "one batch, serial")):
        assert steps[mine][:2] == steps[reference][:2] and torch.equal(steps[mine][2], steps[reference][2])
    assert torch.allclose(steps["thread"][2], steps["serial"][2], atol=2e-5)  # other micro-batches: the rounding alone


def overlapping(make_model, tmp_path, **options):
    """A trainer of three decoding batches a step, its teacher's `logp`, and its sampler's way to write one batch."""
    trainer = make_trainer(make_model, tmp_path, overlaps=True, sampling__batch_size=2, **options)
    return trainer, trainer.batches.teacher.logp, trainer.sampler._sample_batch


def test_the_teacher_scores_a_batch_while_the_next_is_decoded(make_model, tmp_path, monkeypatch):
    trainer, logp, write = overlapping(make_model, tmp_path)
    decoding, scored = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]
    turns = {"write": iter(range(3)), "logp": iter(range(3))}

    def writes(*args):
        turn = next(turns["write"])
        decoding[turn].set()
        assert turn == 0 or scored[turn - 1].wait(60)  # the batch before was scored in the middle of this one
        return write(*args)

    def scores(*args):
        turn = next(turns["logp"])
        assert turn == 2 or decoding[turn + 1].wait(60)
        scored[turn].set()
        assert threading.current_thread() is not threading.main_thread()
        return logp(*args)

    monkeypatch.setattr(trainer.sampler, "_sample_batch", writes)
    monkeypatch.setattr(trainer.batches.teacher, "logp", scores)
    assert len(trainer.begin().teacher_logp_N) and all(event.is_set() for event in scored)


def test_an_error_of_the_scoring_thread_is_the_runs(make_model, tmp_path, monkeypatch):
    trainer, _, _ = overlapping(make_model, tmp_path)
    error = ValueError("made up")
    monkeypatch.setattr(trainer.batches.teacher, "logp", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="made up") as raised:
        trainer.train_step()
    assert raised.value is error


def test_memory_that_runs_out_beside_the_sampler_is_made_do_with(make_model, tmp_path, monkeypatch):
    plain = after(make_model, tmp_path, steps=1, sampling__batch_size=2)
    trainer, logp, _ = overlapping(make_model, tmp_path)

    def tight(*args):
        if threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logp(*args)

    monkeypatch.setattr(trainer.batches.teacher, "logp", tight)
    trainer.train_step()
    assert torch.equal(weights(trainer), plain) and trainer.batches.max_tokens == trainer.config.train.max_tokens_per_micro_batch


@pytest.mark.parametrize("batch", [0, 2])
def test_a_signal_stops_sampler_and_scoring_thread(make_model, tmp_path, monkeypatch, batch):
    """While the first batch is scored, and the last, when nothing is decoded any more."""
    trainer, logp, _ = overlapping(make_model, tmp_path, train__max_tokens_per_micro_batch=1)  # two micro-batches a batch
    asked = []

    def signalled(*args):
        asked.append(args)
        if len(asked) == 2 * batch + 1:
            monkeypatch.setattr(signals, "pending", [signal.SIGTERM])
        return logp(*args)

    monkeypatch.setattr(trainer.batches.teacher, "logp", signalled)
    with pytest.raises(Preempted, match="SIGTERM"):
        trainer.train_step()
    trainer.overlap.background.submit(int).result(60)  # behind what may still be running
    assert len(asked) == 2 * batch + 1


def test_a_sampler_that_breaks_off_leaves_nothing_to_be_scored(make_model, tmp_path, monkeypatch):
    trainer, logp, write = overlapping(make_model, tmp_path)
    cancelled, asked = threading.Event(), []

    def writes(*args):
        if len(trainer.overlap.scores) == 2:
            trainer.overlap.scores[1].add_done_callback(lambda _: cancelled.set())
            raise RuntimeError("made up")
        return write(*args)

    def scores(*args):
        assert cancelled.wait(60)
        asked.append(args)
        return logp(*args)

    monkeypatch.setattr(trainer.sampler, "_sample_batch", writes)
    monkeypatch.setattr(trainer.batches.teacher, "logp", scores)
    with pytest.raises(RuntimeError, match="made up"):
        trainer.train_step()
    assert len(asked) == 1 and trainer.overlap.scores[0].done()


class Handed:
    """A server in small: samples with the weights that it was last handed, whatever becomes of the trainer's in the meantime."""

    def __init__(self, trainer):
        self.trainer, self.model = trainer, copy.deepcopy(trainer.student)
        self.inner = GenerateSampler(self.model, (1,), 0, VOCABULARY, 0, bf16=False)

    def sample(self, requests, decoding, stream):
        return self.inner.sample(requests, decoding, stream)

    def refresh(self):
        pass

    def sync_weights(self, lead):
        self.model.load_state_dict(self.trainer.student.state_dict())


@pytest.mark.parametrize("place", [2, 3, 4, None])
def test_with_a_lag_a_run_goes_on_with_what_was_sampled_ahead(make_model, tmp_path, monkeypatch, place):
    """Stopped at its look for signals `place`: between inner steps of the first, before and after it takes up what was sampled ahead for
    the second; and from each checkpoint between steps."""
    options = {"sampling__lag": 1, "sampling__engine": "vllm", "sampling__vllm__url": "http://localhost:1", "ppo__steps": 2}
    options |= {"checkpoint__every": 9 if place else 1, "checkpoint__keep_last": 9, "train__max_steps": 4}

    def make(folder):
        trainer = make_trainer(make_model, tmp_path / folder, **options)
        trainer.sampler = Handed(trainer)
        return trainer

    straight = make("straight")
    list(straight.run())
    found = [straight.checkpoints.path(step) for step in (1, 2, 3)]
    if place:
        stopped, looks = make("stopped"), iter(range(100))
        monkeypatch.setattr(signals, "requested", lambda: next(looks) == place)
        with pytest.raises(Preempted):
            list(stopped.run())
        monkeypatch.setattr(signals, "requested", lambda: False)
        found = [stopped.checkpoints.newest().path]
    for path in found:
        resumed = make("resumed")
        resumed.go_on(read(path))
        assert resumed.ahead.done() and (resumed.round is None) == (place in (3, None))
        list(resumed.run())
        assert torch.equal(weights(resumed), weights(straight))


def test_a_lag_needs_a_server_and_a_correction():
    with pytest.raises(ConfigError, match=r"sampling.lag=1.*sampling.vllm.url"):
        config(sampling__lag=1)
    with pytest.raises(ConfigError, match=r"importance_cap"):
        config(sampling__lag=1, sampling__vllm__url="http://localhost:1", ppo__importance_cap=None)


def test_repetition_counts_runs_that_stood_there_before():
    assert repetition((1, 2, 3)) == 0 and repetition((1, 2, 3, 4, 5)) == 0
    assert repetition((7,) * 8) == pytest.approx(4 / 5)
    assert repetition((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 / 5)
