"""What a run says before and at its beginning about its data and its teacher."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd import errors
from opd.cli import main as cli
from opd.config.options import OptimConfig
from opd.data.chat_template import ChatTemplate
from opd.data.prompts import Prompt
from opd.training.checks import check_prompts, check_rewards, check_teacher, learning_rate_problems
from opd.training.evaluator import Evaluator


def prompts(*ids: int) -> list[Prompt]:
    return [Prompt(row, (1, number), "text") for row, number in enumerate(ids)]


def test_evaluation_prompts_that_are_trained_on_and_repeated_ones_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    check_prompts(prompts(1, 2, 3), prompts(4, 5))
    check_prompts(prompts(*range(99), 0), prompts(100))  # one of 100 is nothing to speak of
    assert caplog.messages == []
    check_prompts(prompts(1, 2, 3, 3), prompts(2, 5, 3))
    shared, repeated = caplog.messages
    assert shared.startswith("2 of 3 evaluation prompts") and repeated.startswith("1 of 4 training prompts")


def test_prompts_without_text_are_counted_and_no_other_complaint_is_about_them(caplog: pytest.LogCaptureFixture) -> None:
    empty = [Prompt(number, (1, 3), " ") for number in range(3)]
    check_prompts([*prompts(1, 2), *empty], [*prompts(4), *empty[:1]])
    remedy = "remove these rows from the file, or check data.prompt"
    assert caplog.messages == [
        f"3 of 5 training prompts have no text and are trained on all the same: {remedy}",
        f"1 of 2 evaluation prompts have no text and are evaluated all the same: {remedy}",
    ]


def test_rewards_that_are_no_shares_are_told(caplog: pytest.LogCaptureFixture) -> None:
    check_rewards([0.0, None, 0.5, 1.0], "mine:score")
    assert caplog.messages == []
    check_rewards([0.0, 2.0], "mine:score")
    assert caplog.messages[0].startswith("eval.reward=mine:score gives values outside 0 to 1, 2 for example")


def test_answers_over_a_limit_are_told_once_unless_their_number_changes(caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        not_judged, reported, limits = 0, 0, "eval.reward_seconds=5"

        def grade(self, items: list[Any]) -> list[None]:
            self.not_judged += len(items)
            return [None] * len(items)

    evaluator: Any = SimpleNamespace(grader=Slow())
    for count in (3, 3, 2):
        Evaluator.grade(evaluator, [{}] * count)
    assert [message[:6] for message in caplog.messages] == ["3 of 3", "2 of 2"]


@pytest.mark.parametrize(
    ("warmup", "lr", "steps", "said"),
    [
        (1000, 1e-5, 2, ["optim.warmup_steps=1000: the learning rate reaches only 0.2 % of optim.lr in 2 steps"]),
        (10, 1e-5, 10, ["optim.warmup_steps=10: the learning rate reaches only 91 % of optim.lr in 10 steps"]),
        (10, 1e-3, 11, []),
        (0, 1e-2, 1, ["optim.lr=0.01: so high a rate destroys most models"]),
    ],
)
def test_a_warm_up_that_covers_the_run_and_a_very_high_learning_rate_are_told(warmup: int, lr: float, steps: int, said: list[str]) -> None:
    assert [what for what, _ in learning_rate_problems(OptimConfig(warmup_steps=warmup, lr=lr), steps)] == said


@pytest.mark.parametrize(
    ("before", "teacher", "said"), [(0.2, 0.0, "is 0"), (0.4, 0.3, "below the student's"), (0.3, 0.3, ""), (0.1, 0.3, ""), (None, 0.0, "")]
)
def test_a_teacher_that_is_never_right_or_worse_is_reported(
    before: float | None, teacher: float, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def line(model: str, mean: float | None) -> dict[str, Any]:
        return {"model": model, "step": 0, "rewards": None if mean is None else {"mean": mean}}

    check_teacher([line("teacher", teacher), line("student", before)])
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_a_worse_teachers_reward_is_no_percentage_where_rewards_are_no_shares(caplog: pytest.LogCaptureFixture) -> None:
    check_teacher([{"model": model, "step": 0, "rewards": {"mean": mean}} for model, mean in (("student", 2.5), ("teacher", 1.5))])
    assert "reward, 1.5, is below the student's, 2.5;" in caplog.text
    caplog.clear()
    check_teacher([{"model": model, "step": 0, "rewards": {"mean": mean}} for model, mean in (("student", -1.0), ("teacher", 0.0))])
    assert caplog.text == "", "0 is a good reward where others are negative"


def test_a_run_says_that_prompts_are_plain_text(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "experiment=debug", "device=cpu", "train.max_steps=1", "eval.limit=2", "eval.kl_prompts=0"]
    assert cli.main(words) == errors.OK
    assert "plain text" not in capfd.readouterr().out
    monkeypatch.setattr(ChatTemplate, "find", lambda template: None)
    assert cli.main([*words, "name=plain"]) == errors.OK
    assert capfd.readouterr().out.count("no chat template: prompts are plain text") == 1
