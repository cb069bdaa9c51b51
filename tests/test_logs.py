"""The guard over the completions, and the watchdog for a run that hangs."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from opd.config.options import GuardAction, PPOConfig, SamplingConfig
from opd.config.schema import Config
from opd.errors import INTERNAL, NumericError
from opd.training.checks import Guard
from opd.training.logs import watchdog

HANG = """
import sys, time
from pathlib import Path
from opd.training.logs import watchdog

with watchdog(1 / 600, Path("stacks.txt"), lambda reason: print(reason, flush=True)) as beat:
    for _ in range(5):
        beat()
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Another test may have run a command that configured logging."""
    caplog.set_level(logging.WARNING)


def metrics(**values: float) -> dict[str, float]:
    return {"truncated": 0.0, "repetition": 0.0, "engine_gap": 0.0, **values}


def test_the_guard_warns_once_after_ten_bad_steps_and_again_after_a_good_one(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(Config(sampling=SamplingConfig()))
    for step in range(1, 31):
        guard.check(step, metrics(truncated=0.94 if step == 16 else 0.95, repetition=0.49))
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 10", "step 26"]
    assert "truncated=0.95" in caplog.text and "sampling.max_new_tokens" in caplog.text


def test_the_guard_stops_a_run_that_repeats_itself(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(Config(sampling=SamplingConfig(guard=GuardAction.stop)))
    for step in range(1, 10):
        guard.check(step, metrics(repetition=0.5))
    with pytest.raises(NumericError, match=r"step 10: repetition=0\.50.*optim\.lr.*sampling\.guard=warn"):
        guard.check(10, metrics(repetition=0.5))


def test_the_guard_is_silent_when_it_is_off(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(Config(sampling=SamplingConfig(guard=GuardAction.none)))
    for step in range(20):
        guard.check(step, metrics(repetition=0.9, truncated=1.0))
    assert not caplog.records


@pytest.mark.parametrize(("options", "warned"), [({}, True), ({"top_p": 0.9}, False), ({"top_k": 5}, False), ({"max_gap": 0.5}, False)])
def test_a_gap_between_sampler_and_trainer_is_warned_of_once(options, warned, caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(Config(sampling=SamplingConfig(**options)))
    for step in range(3):
        guard.check(step, metrics(engine_gap=0.2))
    assert len(caplog.records) == int(warned)


def test_a_gap_is_expected_where_another_temperature_is_scored(caplog: pytest.LogCaptureFixture) -> None:
    for temperature, warned in ((1.0, False), (0.7, True)):
        Guard(Config(ppo=PPOConfig(temperature=temperature))).check(1, metrics(engine_gap=0.2))
        assert bool(caplog.records) is warned


def test_a_run_that_hangs_ends_with_its_stacks_and_exit_code_70(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANG], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == INTERNAL, done.stderr
    assert "train.watchdog_minutes" in done.stdout and "stacks.txt" in done.stdout
    assert 'File "<string>", line 9' in (tmp_path / "stacks.txt").read_text()


def test_a_watchdog_leaves_no_file_behind(tmp_path: Path) -> None:
    reasons: list[str] = []
    for minutes in (None, 10.0):
        with watchdog(minutes, tmp_path / "stacks.txt", reasons.append) as beat:
            beat()
    assert not reasons and not list(tmp_path.iterdir())
