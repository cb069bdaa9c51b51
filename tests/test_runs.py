"""Run folders are read whole, at any moment of their life, and what is not one is refused in one line."""

import argparse
import json
from pathlib import Path

import pytest

from opd import errors
from opd.cli import arguments
from opd.runs import outcome
from opd.runs.folder import read_lines, write_json
from opd.runs.reader import find_runs, open_run


def make(folder: Path, status: str = "done", **files: object) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"status": status, "reason": "why", "exit_code": 0})
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_a_run_is_what_its_files_say(tmp_path: Path) -> None:
    folder = make(tmp_path / "first", run={"config": {"optim": {"lr": 0.1}}}, summary={"steps": 3})
    (folder / ".hydra").mkdir()
    (folder / ".hydra/overrides.yaml").write_text("- optim.lr=0.1\n- name=first\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (folder / "rollouts").mkdir()
    for step in (12, 3):
        (folder / f"rollouts/step_{step:06d}.jsonl").write_text("{}\n")
    run = open_run(folder)
    assert (run.name, run.status, run.reason, run.exit_code) == ("first", "done", "why", 0)
    assert run.config == {"optim": {"lr": 0.1}} and run.overrides == ["optim.lr=0.1", "name=first"] and run.summary == {"steps": 3}
    assert [line["step"] for line in run.metrics()] == [1, 2] and run.evaluations() == []
    assert run.rollout_steps() == [3, 12] and run.rollouts(12) == [{}]


def test_a_member_that_failed_before_it_was_a_run_tells_its_options(tmp_path: Path) -> None:
    assert open_run(make(tmp_path / "member", "failed", member={"overrides": ["optim.lr=-1"]})).overrides == ["optim.lr=-1"]


def test_the_summary_of_an_earlier_run_in_the_folder_is_not_that_of_one_that_is_not_done(tmp_path: Path) -> None:
    assert open_run(make(tmp_path / "again", "failed", summary={"steps": 3})).summary is None


def test_a_line_may_hold_what_other_programs_take_for_the_end_of_one(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "e\x0bf"]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [line["text"] for line in read_lines(file)] == texts


def test_runs_are_found_below_folders_each_once(tmp_path: Path) -> None:
    first, second = make(tmp_path / "sweep/lr=1"), make(tmp_path / "sweep/lr=2")
    make(first / "checkpoints/inner")  # below a run nothing is another one
    assert [run.path for run in find_runs([tmp_path / "sweep", second])] == [first, second]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_runs_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match=name):
        find_runs([tmp_path / name])


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_damaged_run_folder_is_named(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "damaged")
    (folder / "status.json").write_text(text)
    with pytest.raises(errors.DataError, match=r"damaged.*cannot be read"):
        open_run(folder)


def test_a_verb_with_plain_arguments_ends_every_mistake_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def task(parsed: argparse.Namespace) -> None:
        if parsed.word == "file":
            raise FileNotFoundError(2, "No such file", "x.txt")
        if parsed.word == "data":
            raise errors.DataError("row 3:\n no answer")
        assert 3 // int(parsed.word)

    parser = arguments.Parser("try", task, "tries", "opd try 1")
    parser.add_argument("word")
    codes = {word: parser.run([word]) for word in ("1", "file", "data", "0")}
    said = capsys.readouterr().err.splitlines()
    assert codes == {"1": errors.OK, "file": errors.OUTPUT, "data": errors.DATA, "0": errors.INTERNAL}
    assert said[:2] == ["opd: error: x.txt: No such file", "opd: error: row 3: no answer"]
    assert said[-1].startswith("opd: internal error: ZeroDivisionError")
    assert parser.run(["1", "--no-such"]) == errors.USAGE
    assert "--no-such" in capsys.readouterr().err
    assert parser.run(["--help"]) == 0
    assert "  opd try 1" in capsys.readouterr().out


def test_the_gap_that_is_closed_and_what_was_not_measured() -> None:
    assert outcome.gap_closed(0.5, 0.75, 1.0) == 0.5 and outcome.gap_closed(0.5, 0.25, 1.0) == -0.5
    assert outcome.gap_closed(0.5, 0.75, 0.5) is None and outcome.gap_closed(None, 0.75, 1.0) is None
    assert set(outcome.achieved([], []).values()) == {None}


def test_after_is_the_last_evaluation_or_that_of_a_step() -> None:
    lines = [{"model": "student", "step": step, "kl": 1.0 / (step + 1), "rewards": None} for step in (0, 2, 4)]
    metrics = [{"step": step, "reverse_kl": float(step), "time/step": 2.0, "tokens": 10.0} for step in range(1, 5)]
    found = outcome.achieved(metrics, lines)
    assert (found["eval_kl_before"], found["eval_kl_after"]) == (1.0, 0.2)
    assert (found["reverse_kl_first"], found["reverse_kl_last"]) == (1.0, 4.0)
    assert (found["steps"], found["graded_tokens"], found["seconds"], found["tokens_per_second"]) == (4, 40, 8.0, 5.0)
    assert outcome.achieved(metrics, lines, 2)["eval_kl_after"] == 1 / 3
    assert outcome.achieved(metrics, lines, 3)["eval_kl_after"] is None
