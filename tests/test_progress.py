"""How far long work is: lines at intervals where there is no terminal, a line that is replaced on one, and nothing in JSON."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from training_helpers import make_trainer

from opd import errors
from opd.cli import main as cli
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request
from opd.doctor.findings import Report, ok, show_finding
from opd.runs import progress
from opd.runs.progress import Progress, progress_on
from opd.samplers import Decoding
from opd.training.display import Display


def test_work_is_shown_at_intervals_with_what_is_done_and_its_end() -> None:
    lines: list[str] = []
    shown = Progress(lines.append, 0.02)
    with shown.of("evaluating the teacher", 500) as note:
        note(120)
        wait_for(lambda: len(lines) >= 2)
    assert lines[0] == "evaluating the teacher: 120 of 500, 0 s"
    assert lines[-1] == "" and set(lines[:-1]) == {lines[0]}


def test_short_work_gets_no_line_and_nothing_is_shown_where_nobody_looks() -> None:
    screen = io.StringIO()
    with progress_on(Console(file=screen)).of("loading"):
        pass
    with Progress().of("loading") as note:
        note(1)
    assert screen.getvalue() == ""


def test_a_terminal_gets_a_line_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.02)
    screen = io.StringIO()
    with progress_on(Console(file=screen, force_terminal=True, width=80)).of("loading the models"):
        wait_for(lambda: "loading the models: 0 s" in screen.getvalue())
    assert "\x1b[2K" in screen.getvalue()  # the line is erased


def test_completions_are_counted_while_their_batch_is_decoded(tmp_path: Path) -> None:
    ended: list[int] = []
    requests = [Request(Prompt(row, (2, 3, 4 + row), "")) for row in range(8)]
    rollouts = make_trainer(tmp_path).sampler.sample(requests, Decoding(1.0, 32, ended=ended.append), "evaluation")
    assert ended == sorted(ended) and ended[0] == 0
    assert ended[-1] == sum(rollout.finish_reason is FinishReason.stop for rollout in rollouts) > 0


def test_the_panel_and_the_lines_of_a_run_show_the_work() -> None:
    screen = io.StringIO()
    display, shown = Display(3, shown=True, console=Console(file=screen, width=80)), Progress()
    display.watch(shown)
    assert shown.show is not None and shown.seconds == progress.LINE_SECONDS
    shown.show("evaluating the teacher: 0 of 500, 10 s")
    shown.show("")
    assert screen.getvalue() == "evaluating the teacher: 0 of 500, 10 s\n"
    hidden = Progress()
    Display(3, shown=False).watch(hidden)
    assert hidden.show is None


def test_the_doctor_shows_each_finding_at_once() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80)
    report = Report(on_finding=lambda finding: show_finding(console, finding))
    report.add(ok("config", "composes"))
    assert "composes" in screen.getvalue()
    report.add(ok("generation_config of the student", "none"))
    first, second = screen.getvalue().splitlines()
    assert first.index("composes") == second.index("none")


@pytest.mark.parametrize("words", [("doctor", "--prompts", "2"), ("eval", "bundled:tiny-student")])
def test_progress_is_told_to_people_and_never_in_json(
    words: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress.__init__, "__defaults__", (None, 0.001))
    small = ["experiment=debug", "device=cpu", "eval.limit=2", "eval.kl_prompts=2"]
    assert cli.main([*words, *small]) == errors.OK
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("loading the model") for line in lines)
    assert any(line.startswith("evaluating the teacher: ") and " of 2, " in line for line in lines)
    if words[0] == "eval":
        assert lines[0].split() == ["model", "bundled:tiny-student"]  # before anything is loaded
    assert cli.main([*words, *small, "--json"]) == errors.OK
    assert isinstance(json.loads(capfd.readouterr().out), dict)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
