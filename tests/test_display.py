"""The display of a run: nothing in it can control the terminal, lines appear at the right steps, and the closing table is complete."""

import io
import logging
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from opd.training import metrics
from opd.training.display import Display, NoteHandler
from opd.training.evaluation import Evaluation, Rewards
from opd.training.events import Evaluated, StepDone
from opd.training.tokens import Tokens

HOSTILE = "a\x1b[31mb\x07\u202ec\nd\r"
SUMMARY = {
    "reward_before": 0.4375, "reward_before_interval": [0.231, 0.668], "reward_after": 0.875, "reward_after_interval": [0.64, 0.965],
    "reward_teacher": 1.0, "reward_teacher_interval": [0.806, 1.0], "gap_closed": 0.7778,
    "eval_kl_before": 1.91064, "eval_kl_after": 1.7967,
    "steps": 6, "graded_tokens": 1720, "seconds": 200.0, "tokens_per_second": 8.6, "peak_memory_bytes": 3 * 2**29,
}  # fmt: skip


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def make_display(screen: io.StringIO, max_steps: int = 3, **options: object) -> Display:
    return Display(max_steps, shown=True, console=Console(file=screen, soft_wrap=True, width=80, **options))


METRICS = {
    "truncated": 0.25,
    "unlisted": 1.0,
    "perf/mfu": 0.41,
    "memory/peak_bytes": 3 * 2**29,
    **{f"time/{name}": seconds for name, seconds in {"sample": 6, "wait": 0, "score": 1, "update": 3, "step": 10}.items()},
}


def step_done(step: int) -> StepDone:
    return StepDone(step, METRICS | {"reverse_kl": 1.5 / step}, {}, Tokens([], torch.device("cpu")), {})


def test_notes_hold_no_control_characters(screen: io.StringIO) -> None:
    make_display(screen).note(HOSTILE)
    assert screen.getvalue() == "a␛[31mb␇⟨U+202E⟩c\nd␍\n"


def test_the_evaluation_in_the_panel_is_wrapped_and_not_cut(screen: io.StringIO) -> None:
    display = make_display(screen)
    overlap = {"mass": 0.9, "share": 0.8}
    display.evaluation = Evaluation(3, Rewards(0.5, 0.25, 0.75, 16, 3.0, 0.0), 1.5, overlap=overlap)
    display.console.print(display._panel())
    assert "80% of the ids" in " ".join(screen.getvalue().replace("│", "").split())


def test_a_sample_is_one_harmless_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "decode", lambda tokenizer, ids, **options: HOSTILE)
    rollout = SimpleNamespace(request=SimpleNamespace(prompt=SimpleNamespace(text="say\n  a")), answer=(1,))
    assert metrics.sample_text(None, rollout) == "say a → a␛[31mb␇⟨U+202E⟩c d"


def test_without_a_terminal_the_first_and_last_steps_and_every_evaluation_get_a_line(screen: io.StringIO) -> None:
    display = make_display(screen)
    display.begin(0)
    for step in (1, 2, 3):
        display.show(step_done(step), sample="a sample")
    overlap = {"mass": 0.999, "share": 0.88}
    display.show(Evaluated(Evaluation(3, Rewards(0.5, 0.25, 0.75, 16, 3.0, 0.0), 0.123456, overlap=overlap)))
    display.end()
    first, last, evaluation = screen.getvalue().splitlines()
    assert first == "step 1/3  reverse KL 1.5000  truncated 25.0%  MFU 41.0%" and last.startswith("step 3/3  reverse KL 0.5000")
    assert "step 3" in evaluation and "50.0% [25.0, 75.0] over 16 answers" in evaluation and "0.1235 nats/token" in evaluation
    assert "100% of the probability, 88% of the ids" in evaluation


def test_on_a_terminal_a_panel_shows_progress_metrics_evaluation_and_sample(screen: io.StringIO) -> None:
    display = make_display(screen, force_terminal=True, color_system=None)
    display.begin(0)
    display.show(step_done(1), sample="a sample")
    display.show(Evaluated(Evaluation(1, None, 0.5)))
    display.end()
    shown = screen.getvalue()
    for part in (
        "1/3",
        "reverse KL",
        "1.5000",
        "sampling 60%",
        "update 30%",
        "peak memory 1.50 GiB",
        "evaluation after step 1",
        "a sample",
    ):
        assert part in shown, part
    assert "step 1/3  reverse KL" not in shown, "no plain line next to the panel"


def test_the_closing_table_fits_into_80_columns(screen: io.StringIO) -> None:
    make_display(screen).summarise(SUMMARY, {"report": "runs/x/report.html"})
    lines = screen.getvalue().splitlines()
    [reward] = [line for line in lines if line.lstrip().startswith("reward")]
    assert [cell.strip() for cell in reward.split("│")[1:]] == ["43.8% [23, 67]", "87.5% [64, 96]", "100.0% [81, 100]"]
    [kl] = [line for line in lines if "KL to teacher" in line]
    assert [cell.strip() for cell in kl.split("│")[1:]] == ["1.9106", "1.7967", "0"]
    rest = "\n".join(lines)
    for part in ("77.8% of the gap", "6 steps", "1,720 trained tokens", "3.3 min", "9 tokens/s", "1.50 GiB", "report   runs/x/report.html"):
        assert part in rest, part


def test_a_summary_without_measurements_is_shown(screen: io.StringIO) -> None:
    make_display(screen).summarise({**dict.fromkeys(SUMMARY), "steps": 0, "peak_memory_bytes": 0}, {})
    assert "0 steps, – trained tokens" in screen.getvalue() and "gap" not in screen.getvalue()


def test_warnings_of_the_log_are_shown(screen: io.StringIO) -> None:
    handler = NoteHandler(make_display(screen))
    handler.handle(logging.LogRecord("opd", logging.WARNING, "", 0, "%d left out", (3,), None))
    assert screen.getvalue() == "warning: 3 left out\n"
