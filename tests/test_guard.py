"""The guard: warns once of completions that no longer end or repeat themselves, and of a sampler that is not the trainer's model."""

import pytest
from training_helpers import config, make_trainer

from opd.errors import NumericError
from opd.training.logs import Guard


def metrics(**values: float) -> dict[str, float]:
    return {"truncated": 0.0, "repetition": 0.0, "engine_gap": 0.0, **values}


@pytest.mark.parametrize(
    ("name", "limit", "remedy"), [("truncated", 0.95, "sampling.max_new_tokens"), ("repetition", 0.5, "ppo.advantage_clip")]
)
def test_the_guard_warns_once_after_ten_bad_steps_and_again_after_a_good_one(caplog, name, limit, remedy):
    guard = Guard(config().sampling)
    for step in range(1, 31):
        guard.check(step, metrics(**{name: limit - 0.01 if step == 16 else limit}))
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 10", "step 26"]
    assert name in caplog.text and remedy in caplog.text


@pytest.mark.parametrize(
    ("options", "warned"),
    [({}, True), ({"sampling__top_p": 0.9}, False), ({"sampling__top_k": 5}, False), ({"sampling__max_gap": 0.5}, False)],
)
def test_a_gap_between_sampler_and_trainer_is_warned_of_once(caplog, options, warned):
    guard = Guard(config(**options).sampling)
    for step in range(3):
        guard.check(step, metrics(engine_gap=0.2))
    assert len(caplog.records) == int(warned)


def test_the_loop_shows_the_guard_every_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    seen = []

    def stop_at_step_3(step, step_metrics):
        seen.append((step, step_metrics.keys() >= metrics().keys()))
        if step == 3:
            raise NumericError("stop")

    monkeypatch.setattr(trainer.guard, "check", stop_at_step_3)
    with pytest.raises(NumericError):
        list(trainer.run())
    assert seen == [(1, True), (2, True), (3, True)] and trainer.step == 3
