"""Cores that other programs use are reported once, from injected times, and only where a step waits for nothing else."""

import logging
from typing import Any

import pytest
import torch
from training_helpers import SERVER, config

from opd.training import cores
from opd.training.cores import STEPS, Cores, watch_cores

CPU = torch.device("cpu")


def reports(caplog: pytest.LogCaptureFixture, found: Cores, share: float, steps: int = 3 * STEPS) -> list[str]:
    """Return what is logged of steps of 2 seconds with this share of the threads' time."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for step in range(1, steps + 1):
            found.note(step, share * found.threads * 2.0, 2.0)
    return caplog.messages


def test_busy_cores_are_reported_once_with_what_is_faster(caplog: pytest.LogCaptureFixture) -> None:
    found = Cores(2)
    [line] = reports(caplog, found, 0.4)
    assert "40 % of the CPU time" in line and "OMP_NUM_THREADS=1" in line and f"step {STEPS + 1}:" in line
    assert found.metrics() == {"perf/cpu": pytest.approx(0.4)}


def test_one_thread_that_shares_its_core_is_reported_with_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    [line] = reports(caplog, Cores(1), 0.4)
    assert "40 % of the CPU time of their thread" in line and "taskset" in line and "OMP" not in line
    assert reports(caplog, Cores(1), 0.7) == []


def test_free_cores_unwatched_ones_and_a_slow_first_step_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert reports(caplog, Cores(2), 0.7) == []
    assert reports(caplog, Cores(0), 0.4) == [] and Cores(0).metrics() == {}
    assert reports(caplog, Cores(2), 0.1, steps=STEPS) == []
    found = Cores(2)
    found.note(1, 0.1, 100.0)
    assert reports(caplog, found, 0.9) == []


@pytest.mark.parametrize(
    ("options", "device", "processes", "policy"),
    [({}, "cuda", 1, ""), ({}, "cpu", 2, ""), ({}, "cpu", 1, "passive"), (SERVER, "cpu", 1, ""), ({"ppo__reward_coef": 0.1}, "cpu", 1, "")],
)
def test_nothing_is_watched_where_a_step_waits_for_something_else(
    options: dict[str, Any], device: str, processes: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 4)
    assert watch_cores(config(), CPU, 1).threads == 4
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert watch_cores(config(**options), torch.device(device), processes).threads == 0
