"""The loop: events, order of data, learning rate, saving, resume, rewind, preemption, sampling ahead, and runs with one trajectory."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import (
    SERVER,
    UNEVEN,
    NoEvaluator,
    PoisonedTeacher,
    ServerSampler,
    config,
    make_trainer,
    untimed,
    weights,
)

from opd import signals
from opd.config.options import OptimConfig, Schedule
from opd.data.order import nth_position, take
from opd.errors import ConfigError, EngineError, NumericError, Preempted, SamplerError
from opd.training.build import resumed_choices
from opd.training.checkpoint import read
from opd.training.checks import check_copy
from opd.training.evaluation import Evaluation
from opd.training.events import Evaluated, Rewound, Saved, StepDone
from opd.training.loop import Trainer
from opd.training.step import lr_factor


def stop_at_check(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a signal arrive just before the trainer looks for one the `number`-th time, from 0: after sampling and before inner steps."""
    checks = iter(range(1000))
    monkeypatch.setattr(signals, "requested", lambda: next(checks) == number)


def run_until_stopped(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, check: int) -> None:
    with monkeypatch.context() as patch:
        stop_at_check(patch, check)
        with pytest.raises(Preempted):
            list(trainer.run())


# Events.


def test_events_are_steps_evaluations_every_so_many_steps_and_checkpoints(tmp_path):
    trainer = make_trainer(tmp_path, train__max_steps=5, eval__steps=2, checkpoint__every=3)
    events = [(type(event), event.evaluation.step if isinstance(event, Evaluated) else event.step) for event in trainer.run()]
    assert [step for kind, step in events if kind is StepDone] == [1, 2, 3, 4, 5]
    assert [step for kind, step in events if kind is Evaluated] == [0, 2, 4, 5]
    assert [step for kind, step in events if kind is Saved] == [3, 5]
    assert events[0] == (Evaluated, 0) and events[-1] == (Evaluated, 5)


def test_a_run_beyond_its_last_step_only_evaluates(tmp_path):
    trainer = make_trainer(tmp_path, train__max_steps=2)
    trainer.step = trainer.saved = 5
    assert [type(event) for event in trainer.run()] == [Evaluated]


def test_a_run_that_is_stopped_at_an_evaluation_saves_its_last_step(tmp_path):
    trainer = make_trainer(tmp_path, eval__steps=1, checkpoint__every=2)
    for event in trainer.run():
        if isinstance(event, Evaluated) and event.evaluation.step == 3:
            trainer.stop()
    assert trainer.step == 3 and trainer.checkpoints.moments() == [(2, 0), (3, 0)]


def test_a_run_is_saved_when_the_sampling_engine_fails(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, checkpoint__every=9)
    sample = trainer.sampler.sample

    def fail(*arguments):
        if trainer.step == 2:
            raise EngineError("the server is gone")
        return sample(*arguments)

    monkeypatch.setattr(trainer.sampler, "sample", fail)
    with pytest.raises(SamplerError, match="the server is gone"):
        list(trainer.run())
    assert trainer.checkpoints.moments() == [(2, 0)]


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    class Scores(NoEvaluator):
        def student(self, step, *_):
            return Evaluation(step, None, [0.1, math.nan, 0.7, 0.3, 0.4][step])

    trainer = make_trainer(tmp_path, eval__steps=1, checkpoint__every=9)
    trainer.evaluator = Scores()
    list(trainer.run())
    assert trainer.checkpoints.best() == {"step": 3, "score": -0.3}


def test_each_best_evaluation_is_saved(tmp_path):
    class Scores(NoEvaluator):
        def student(self, step, *_):
            return Evaluation(step, None, [0.1, 0.5, 0.7, 0.3, 0.4][step])

    trainer = make_trainer(tmp_path, eval__steps=1, checkpoint__every=9, checkpoint__keep_last=1)
    trainer.evaluator = Scores()
    saved = [event.step for event in trainer.run() if isinstance(event, Saved)]
    assert saved == [1, 3, 4]  # the first after training began, the lowest KL, and the last
    assert trainer.checkpoints.best() == {"step": 3, "score": -0.3}
    assert trainer.checkpoints.moments() == [(3, 0), (4, 0)]


def test_the_teacher_is_frozen_and_in_no_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    teacher = trainer.scoring.teacher.model
    before = [parameter.clone() for parameter in teacher.parameters()]
    list(trainer.run())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    folder = trainer.checkpoints.path(4)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    student = sum(parameter.numel() for parameter in trainer.student.parameters())
    assert sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()) == student


# Learning rate.


def test_learning_rate_schedules():
    cosine = OptimConfig(schedule=Schedule.cosine, warmup_steps=4)
    assert [round(lr_factor(cosine, step, 20), 3) for step in (0, 3, 4, 12, 20)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    linear = OptimConfig(schedule=Schedule.linear, warmup_steps=0)
    assert [lr_factor(linear, step, 10) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    constant = OptimConfig(schedule=Schedule.constant, warmup_steps=1)
    assert [lr_factor(constant, step, 10) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]


def test_every_optimizer_step_uses_the_scheduled_learning_rate(tmp_path):
    trainer = make_trainer(tmp_path, optim__schedule="linear", optim__warmup_steps=1, optim__lr=1e-2)
    optimizer, used = trainer.strategy.optimizer, []
    step = optimizer.step
    optimizer.step = lambda: used.append({group["lr"] for group in optimizer.param_groups}) or step()
    reported = [event.metrics["optim/lr"] for event in trainer.run() if isinstance(event, StepDone)]
    assert reported == pytest.approx([0.5e-2, 1e-2, 2 / 3 * 1e-2, 1 / 3 * 1e-2])
    assert used == [{rate} for rate in reported]


# Order of data.


def test_every_sample_comes_once_an_epoch_and_in_another_order_each():
    taken = take(seed=3, size=7, start=0, count=21)
    epochs = [[index for epoch, index in taken if epoch == number] for number in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(3, 7, 5, 9) == taken[5:14]
    assert take(4, 7, 0, 7) != taken[:7]


def test_positions_left_out_are_skipped_and_no_other_is():
    left_out = [2, 3, 7]
    assert [nth_position(number, left_out) for number in range(6)] == [0, 1, 4, 5, 6, 8]
    assert [nth_position(number, []) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("left_out", [[], [1, 6, 13]])
def test_two_processes_share_the_prompts_that_one_process_would_draw(tmp_path, left_out):
    one = make_trainer(tmp_path, train__batch_size=4)
    two = [make_trainer(tmp_path, train__batch_size=2) for _ in range(2)]
    for rank, trainer in enumerate(two):
        trainer.strategy.accelerator = SimpleNamespace(num_processes=2, process_index=rank)
    for trainer in (one, *two):
        trainer.trouble.left_out = left_out
    drawn = []
    for step in range(6):
        assert two[0].positions(step) + two[1].positions(step) == one.positions(step)
        assert two[0].batch(step)[0] + two[1].batch(step)[0] == one.batch(step)[0]
        drawn += one.positions(step)
    assert drawn == [position for position in range(99) if position not in left_out][: len(drawn)]
    assert [request.attempt for request in one.batch(0)[0]] == [0, 1] * 4


# Resume and preemption.


def test_resume_is_bitwise_at_every_step_across_epochs(tmp_path):
    options = {"train__max_steps": 7, "ppo__steps": 2, "checkpoint__every": 1, "checkpoint__keep_last": 20}
    straight = make_trainer(tmp_path, **options)
    list(straight.run())
    assert straight.step * straight.prompts_per_step > 2 * len(straight.prompts)  # several epochs
    for step in range(1, 7):
        resumed = make_trainer(tmp_path, **options)
        resumed.resume(read(straight.checkpoints.path(step)))
        for _ in range(step, 7):
            resumed.train_step()
        assert torch.equal(weights(resumed), weights(straight))


class Judge(NoEvaluator):
    def judge(self, rollouts):
        return [float(index % 3 == 0) for index in range(len(rollouts))]


def may_sample_after_step_0(trainer: Trainer) -> None:
    sample = trainer.sampler.sample

    def guarded(*args):
        assert trainer.step > 0, "sampled again"
        return sample(*args)

    trainer.sampler.sample = guarded


@pytest.mark.parametrize(
    ("options", "inner"),
    [
        ({"ppo__steps": 2, "ppo__loss_prefix": 3}, 1),
        ({"ppo__steps": 3, "ppo__loss_prefix": 5}, 1),
        ({"ppo__steps": 3, "ppo__loss_prefix": 5}, 2),
        ({"ppo__steps": 2, "ppo__loss_prefix": 5, "teacher__contrast": "x"}, 1),
        ({"ppo__steps": 3, "ppo__loss_prefix": 5, "ppo__estimator": "exact"}, 2),
        ({"ppo__steps": 2, "ppo__loss_prefix": 3, "control": "constant"}, 1),
        ({"ppo__steps": 2, "ppo__loss_prefix": 3, "control": "shuffled"}, 1),
        ({"ppo__steps": 2, **UNEVEN, "sampling__truncated": "drop", "ppo__reward_coef": 0.5, "ppo__baseline": True}, 1),
    ],
)
def test_resume_between_inner_steps_is_bitwise_and_samples_nothing_again(tmp_path, monkeypatch, options, inner):
    options = {"train__max_steps": 2, "checkpoint__every": 9, **options}

    def make(folder):
        trainer = make_trainer(tmp_path / folder, **options)
        trainer.evaluator = Judge()
        return trainer

    straight, stopped, resumed = make("straight"), make("stopped"), make("stopped")
    steps = [event for event in straight.run() if isinstance(event, StepDone)]
    run_until_stopped(stopped, monkeypatch, inner + 1)
    checkpoint = stopped.checkpoints.newest()
    assert checkpoint.moment == (0, inner) and checkpoint.path.name == f"step_000000_{inner}"
    assert not torch.equal(weights(stopped), weights(make("new")))
    may_sample_after_step_0(resumed)
    resumed.resume(checkpoint)
    rows = sum(len(rollout.trained) for rollout in resumed.tokens.rollouts)
    assert rows == len(resumed.tokens.columns["logp"]) < sum(len(rollout.completion) for rollout in resumed.tokens.rollouts)
    again = [event for event in resumed.run() if isinstance(event, StepDone)]
    assert torch.equal(weights(resumed), weights(straight))
    assert [untimed(step) for step in again] == [untimed(step) for step in steps]
    assert [step.by_position for step in again] == [step.by_position for step in steps]


def test_resume_may_begin_the_step_again(tmp_path, monkeypatch):
    stopped, resumed = (make_trainer(tmp_path, ppo__steps=2) for _ in range(2))
    run_until_stopped(stopped, monkeypatch, 2)
    resumed.resume(stopped.checkpoints.newest(), restart_step=True)
    assert (resumed.step, resumed.tokens) == (0, None)
    assert torch.equal(weights(resumed), weights(stopped))


def test_a_signal_while_sampling_stops_the_run_with_a_checkpoint_from_before_the_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, checkpoint__every=9)
    next_logits, calls = trainer.sampler.next_logits, []

    def signalled(*args):
        calls.append(trainer.step)
        if trainer.step == 1:
            monkeypatch.setattr(signals, "pending", [signal.SIGTERM])
        return next_logits(*args)

    trainer.sampler.next_logits = signalled
    with pytest.raises(Preempted, match="SIGTERM"):
        list(trainer.run())
    assert trainer.checkpoints.moments() == [(1, 0)] and trainer.tokens is None
    assert calls.count(1) == 1  # it stops before the next token


# Rewind.


def poison(trainer: Trainer, steps: range, once: bool = True) -> None:
    """Make the teacher's answers NaN in these steps; with `once`, only until the run is rewound."""
    is_poisoned = lambda: trainer.step in steps and not (once and trainer.trouble.left_out)  # noqa: E731
    trainer.scoring.teacher = PoisonedTeacher(trainer.scoring.teacher, is_poisoned)


def test_three_non_finite_steps_rewind_to_the_last_good_checkpoint_and_leave_their_samples_out(tmp_path, caplog):
    trainer = make_trainer(tmp_path, train__max_steps=8, train__batch_size=1, checkpoint__every=2, checkpoint__keep_last=9)
    poison(trainer, range(3, 6))
    suspects = [trainer.batch(step)[0][0].prompt.sample_id for step in (3, 4, 5)]
    sample, drawn = trainer.sampler.sample, []
    trainer.sampler.sample = lambda *args: drawn.append(trainer.positions(trainer.step)) or sample(*args)
    events, at_step_2 = [], None
    for event in trainer.run():
        events.append(event)
        if isinstance(event, Saved) and event.step == 2:
            at_step_2 = weights(trainer)
        if isinstance(event, Rewound):
            assert torch.equal(weights(trainer), at_step_2)
    rewound = [event for event in events if isinstance(event, Rewound)]
    assert rewound == [Rewound(2, [3, 4, 5])]
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8]
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6, 8]  # not while steps are non-finite
    assert drawn == [[0], [1], [2], [3], [4], [5], [2], [6], [7], [8], [9], [10]]
    for step, sample_id in zip((4, 5, 6), suspects, strict=True):
        assert any(record.message.startswith(f"step {step}:") and f"sample ids {sample_id}" in record.message for record in caplog.records)
    assert read(trainer.checkpoints.path(8)).state["trouble"]["left_out"] == [3, 4, 5]


def test_a_second_rewind_to_the_same_checkpoint_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path, train__max_steps=8, checkpoint__every=2)
    poison(trainer, range(3, 9), once=False)
    with pytest.raises(NumericError, match=r"step 6.*step 2.*optim\.lr") as raised:
        list(trainer.run())
    assert raised.value.exit_code == 77 and trainer.trouble.rewound_to == 2


def test_three_non_finite_steps_without_a_checkpoint_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path, train__max_steps=8)
    poison(trainer, range(9))
    with pytest.raises(NumericError, match=r"step 3.*no checkpoint.*optim\.lr"):
        list(trainer.run())


def test_a_rewind_to_the_middle_of_a_step_does_not_train_on_its_left_out_samples(tmp_path, monkeypatch):
    options = {"train__max_steps": 8, "ppo__steps": 2, "train__batch_size": 1, "checkpoint__every": 9}
    stopped = make_trainer(tmp_path, **options)
    run_until_stopped(stopped, monkeypatch, 2)
    trainer = make_trainer(tmp_path, **options)
    trainer.resume(stopped.checkpoints.newest())
    before = weights(trainer)
    trainer.trouble.places = [0, 1, 2]
    event = trainer.rewind()
    assert event == Rewound(0, [0, 1, 2]) and torch.equal(weights(trainer), before)
    assert trainer.tokens is None and trainer.positions(0) == [3]


# Sampling ahead.


class RecordingSampler:
    """Records requests and weights of `sample` and `sync_weights`."""

    def __init__(self, trainer):
        self.trainer, self.inner, self.calls = trainer, trainer.sampler, []

    def sample(self, requests, *arguments):
        self.calls.append(([request.prompt.sample_id for request in requests], weights(self.trainer)))
        return self.inner.sample(requests, *arguments)

    def refresh(self): ...

    def sync_weights(self, on_main):
        self.calls.append(("sync", weights(self.trainer)))


def test_with_lag_1_the_next_step_is_sampled_with_the_weights_from_before_the_update(tmp_path):
    trainer = make_trainer(tmp_path, **SERVER)
    trainer.sampler = RecordingSampler(trainer)
    before = weights(trainer)
    first = trainer.train_step()
    trainer.wait_for_ahead()
    expected = [[request.prompt.sample_id for request in trainer.batch(step)[0]] for step in (0, 1)]
    assert [call for call, _ in trainer.sampler.calls] == ["sync", expected[0], "sync", expected[1]]
    assert all(torch.equal(seen, before) for _, seen in trainer.sampler.calls[:3])
    second = trainer.train_step()
    assert first.metrics["engine_gap"] < 1e-5 < second.metrics["engine_gap"]  # sampled one update earlier
    for _ in range(2):
        trainer.train_step()
    assert trainer.ahead is None  # nothing is sampled after the last step


@pytest.mark.parametrize("check", [2, 3, 4, None])
def test_with_lag_1_resume_continues_with_the_rollouts_that_were_sampled_ahead(tmp_path, monkeypatch, check):
    """Stopped at its look for signals number `check`: between inner steps of the first step, before and after it takes over what was
    sampled ahead for the second; or from each checkpoint between steps."""
    options = {**SERVER, "ppo__steps": 2, "checkpoint__every": 9 if check else 1, "checkpoint__keep_last": 9}

    def make(folder):
        trainer = make_trainer(tmp_path / folder, **options)
        trainer.sampler = ServerSampler(trainer)
        return trainer

    straight = make("straight")
    list(straight.run())
    paths = [straight.checkpoints.path(step) for step in (1, 2, 3)]
    if check:
        stopped = make("stopped")
        run_until_stopped(stopped, monkeypatch, check)
        paths = [stopped.checkpoints.newest().path]
    for path in paths:
        resumed = make("resumed")
        resumed.resume(read(path))
        assert resumed.ahead.done() and (resumed.tokens is None) == (check in (3, None))
        list(resumed.run())
        assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize(
    ("options", "option", "remedy"),
    [
        ({"sampling__lag": 1}, "sampling.lag=1", "sampling.vllm.url"),
        ({**SERVER, "ppo__importance_cap": None}, "ppo.importance_cap=None", "lag=0"),
    ],
)
def test_lag_1_needs_a_server_and_importance_weights(options, option, remedy):
    with pytest.raises(ConfigError) as raised:
        config(**options)
    assert str(raised.value).startswith(option) and remedy in str(raised.value)


# The bf16 copy.


def test_a_bf16_copy_too_far_from_the_trainer_is_dropped_and_the_choice_is_stored(tmp_path, caplog):
    trainer = make_trainer(tmp_path, bf16_copy=True, sampling__max_gap=1e-4, train__max_steps=2, checkpoint__every=1)
    first, second = [event for event in trainer.run() if isinstance(event, StepDone)]
    assert first.metrics["engine_gap"] > 1e-4 and second.metrics["engine_gap"] < 1e-5
    assert trainer.sampler.copy is None and trainer.sampler.model is trainer.student
    assert "step 1" in caplog.text and "sampling.max_gap" in caplog.text
    state = {**read(trainer.checkpoints.path(1)).state, "config": {"train": {"max_tokens_per_micro_batch": 8192}}}
    assert resumed_choices(state, trainer.config)["bf16_copy"] is False  # so a resumed run has no copy either


@pytest.mark.parametrize(
    ("options", "gap"),
    [
        ({"sampling__max_gap": 0.5}, 0.4),
        ({"sampling__dtype": "bfloat16"}, 0.4),
        ({"sampling__top_p": 0.9}, 0.4),
        ({"sampling__top_k": 5}, 0.4),
        ({}, float("nan")),
    ],
)
def test_a_bf16_copy_is_kept_if_it_is_close_or_asked_for_or_the_gap_says_nothing(tmp_path, options, gap):
    trainer = make_trainer(tmp_path, bf16_copy=True, **options)
    check_copy(trainer.config, trainer.sampler, trainer.scoring.choices, 1, gap)
    assert trainer.sampler.copy is not None and trainer.scoring.choices["bf16_copy"] is True


def test_the_loop_shows_the_guard_every_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    seen = []

    def stop_at_step_3(step, step_metrics):
        seen.append((step, step_metrics.keys() >= {"truncated", "repetition", "engine_gap"}))
        if step == 3:
            raise NumericError("stop")

    monkeypatch.setattr(trainer.guard, "check", stop_at_step_3)
    with pytest.raises(NumericError):
        list(trainer.run())
    assert seen == [(1, True), (2, True), (3, True)] and trainer.step == 3
