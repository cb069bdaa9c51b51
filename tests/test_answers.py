"""What was answered in evaluations is stored and shown, and the KL of an evaluation has an interval over its prompts."""

import json
from pathlib import Path
from statistics import fmean, stdev

import forked
import pytest

from opd import errors
from opd.cli import main as cli
from opd.report import sections
from opd.runs.answers import CHARACTERS, MOST, Answer, as_text, lines_of, store
from opd.runs.folder import ANSWERS, EVALUATIONS, RunFolder, read_lines
from opd.runs.intervals import Z95
from opd.runs.reader import Run, open_run
from opd.training.evaluation import KL, add_kl_squares, kl_interval
from opd.training.tokens import Means

WORDS = ["experiment=debug", "device=cpu", "name=run", "train.max_steps=2", "eval.steps=1", "eval.limit=6", "optim.lr=1e-3"]


def answer(sample: int, reward: float | None, text: str = "", dataset: str = "") -> Answer:
    return Answer(dataset, reward, 3, False, text, sample, f"prompt {sample}", ("42",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    forked.trained(folder, WORDS)
    return folder / "runs/run"


def test_a_run_stores_the_first_and_last_answers_of_the_student_and_those_of_the_teacher(trained: Path) -> None:
    stored, evaluations = read_lines(trained / ANSWERS), read_lines(trained / EVALUATIONS)
    found = {(line["model"], line["step"]): [] for line in stored}
    for line in stored:
        found[line["model"], line["step"]].append(line["reward"])
        assert line["prompt"] and line["completion"] and len(line["answer"]) == 1
    assert list(found) == [("teacher", 0), ("student", 0), ("student", 2)]
    for evaluation in evaluations:
        assert "answers" not in evaluation
        if (key := (evaluation["model"], evaluation["step"])) in found:
            assert found[key] == evaluation["rewards"]["each"]
        if evaluation["model"] == "student":
            low, high = evaluation["kl_interval"]
            assert low < evaluation["kl"] < high
    assert 'id="answers"' in (trained / "report.html").read_text()


def test_eval_writes_its_answers_beside_its_result(trained: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert cli.main(["eval", str(trained), "eval.limit=3", "eval.kl_prompts=2", "--out", str(out)]) == errors.OK
    lines = read_lines(tmp_path / f"result-{ANSWERS}")
    assert [line["model"] for line in lines] == ["model"] * 3 + ["baseline"] * 3 + ["teacher"] * 3
    models = json.loads(out.read_text())["tasks"]["evaluation"]["models"]
    for role, statistics in models.items():
        assert fmean(line["reward"] for line in lines if line["model"] == role) == pytest.approx(statistics["mean"])
    low, high = models["model"]["kl_interval"]
    assert low <= models["model"]["kl"] <= high and f"result-{ANSWERS}" in capfd.readouterr().out


def test_files_of_answers_are_bounded(tmp_path: Path) -> None:
    lines = lines_of([answer(row, 1.0, "x" * (CHARACTERS + 5)) for row in range(MOST + 1)][::-1], model="teacher")
    assert len(lines) == MOST and lines[0]["sample_id"] == 0
    assert lines[0]["completion"] == "x" * CHARACTERS + " … (+5 characters)"
    folder = RunFolder(tmp_path)
    for step in (0, 5, 10, 15):
        store(folder, [answer(1, 1.0)], "student", step)
    store(folder, [answer(1, 1.0)], "teacher", 0)
    assert [(line["model"], line["step"]) for line in read_lines(tmp_path / ANSWERS)] == [("student", 0), ("student", 15), ("teacher", 0)]
    folder.rewind(10)
    assert [line["step"] for line in read_lines(tmp_path / ANSWERS)] == [0, 0]


def test_the_report_shows_disagreements_and_nothing_that_a_browser_would_run(tmp_path: Path) -> None:
    given = {
        ("student", 0): [answer(0, 1.0), answer(1, 0.0), answer(2, 0.0, "before")],
        ("student", 9): [answer(0, 0.0, "<script>"), answer(1, 1.0, "good"), answer(2, 0.0, "still")],
        ("teacher", 0): [answer(0, 1.0), answer(1, 1.0), answer(2, None)],
    }
    lines = [line for (model, step), answers in given.items() for line in lines_of(answers, model=model, step=step)]
    (tmp_path / ANSWERS).write_text(as_text(lines))
    page = sections.answers([Run(tmp_path)])
    assert "The teacher is better: 1 of 2" in page and "Worse than before: 1 of 3" in page and "Better than before: 1 of 3" in page
    assert "&lt;script&gt;" in page and "<script>" not in page and "prompt 2" not in page
    assert sections.answers([Run(tmp_path), Run(tmp_path)]) == "" == sections.answers([Run(tmp_path / "old")])


def means(sums: list[float], tokens: list[int]) -> Means:
    found = Means()
    add_kl_squares(found, sums, tokens)
    found.add(KL, sum(sums), sum(tokens))
    return found


def test_the_interval_of_the_kl_is_that_of_prompts_and_not_of_tokens() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    spread = Z95 * stdev(values) / 2
    for tokens in (1, 100):  # of equal lengths it is the interval of their means, however many tokens they have
        interval = kl_interval({"": means([tokens * value for value in values], [tokens] * 4)})
        assert interval == pytest.approx((0.5 - spread, 0.5 + spread))
    assert kl_interval({"": means([0.3 * tokens for tokens in (1, 7, 9)], [1, 7, 9])}) == pytest.approx((0.3, 0.3), abs=1e-6)
    assert kl_interval({"": means([1.0], [2])}) is None and kl_interval({}) is None
    parts = {"a": means([0.2, 0.5], [1, 1]), "b": means([0.9, 0.4], [1, 1])}
    assert kl_interval(parts) == pytest.approx((0.5 - spread, 0.5 + spread))


def test_answers_are_read_with_the_run(trained: Path) -> None:
    assert len(open_run(trained).answers) == 18
