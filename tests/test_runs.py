"""Run folders: safe writes, reads at any moment of a run, its outcome, and how numbers are shown."""

import argparse
import contextlib
import errno
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from opd import errors
from opd.cli import arguments
from opd.config.options import SweepConfig
from opd.runs import intervals, outcome, text
from opd.runs.folder import EVALUATIONS, METRICS, RunFolder, Status, read_lines, write_json
from opd.runs.reader import find_runs, open_run


def make(folder: Path, status: str = "done", **files: object) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"status": status, "reason": "why", "exit_code": 0})
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_open_run_reads_all_files(tmp_path: Path) -> None:
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
    assert [line["step"] for line in run.metrics] == [1, 2] and run.evaluations == []
    assert run.rollout_steps() == [3, 12] and run.rollouts(12) == [{}]


def test_a_sweep_member_that_failed_early_has_its_overrides(tmp_path: Path) -> None:
    assert open_run(make(tmp_path / "member", "failed", member={"overrides": ["optim.lr=-1"]})).overrides == ["optim.lr=-1"]


def test_the_summary_of_an_earlier_run_in_the_folder_is_ignored(tmp_path: Path) -> None:
    assert open_run(make(tmp_path / "again", "failed", summary={"steps": 3})).summary is None


def test_json_lines_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "e\x0bf"]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [line["text"] for line in read_lines(file)] == texts


def test_find_runs_searches_folders_and_returns_each_run_once(tmp_path: Path) -> None:
    first, second = make(tmp_path / "sweep/lr=1"), make(tmp_path / "sweep/lr=2")
    make(first / "checkpoints/inner")  # not searched: it is inside a run
    assert [run.path for run in find_runs([tmp_path / "sweep", second])] == [first, second]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_find_runs_refuses_folders_without_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match=name):
        find_runs([tmp_path / name])


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_damaged_run_folder_is_a_data_error_that_names_it(tmp_path: Path, content: str) -> None:
    folder = make(tmp_path / "damaged")
    (folder / "status.json").write_text(content)
    with pytest.raises(errors.DataError, match=r"damaged.*cannot be read"):
        open_run(folder)


def test_verbs_report_every_mistake_in_one_line_with_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def task(parsed: argparse.Namespace) -> None:
        if parsed.word == "file":
            raise FileNotFoundError(2, "No such file", "x.txt")
        if parsed.word == "data":
            raise errors.DataError("row 3:\n no answer")
        assert 3 // int(parsed.word)

    parser = arguments.Parser("try", task, "tries", "opd try 1")
    parser.add_argument("word")
    codes = {word: parser.run([word]) for word in ("1", "file", "data", "0")}
    messages = capsys.readouterr().err.splitlines()
    assert codes == {"1": errors.OK, "file": errors.OUTPUT, "data": errors.DATA, "0": errors.INTERNAL}
    assert messages[:2] == ["opd: error: x.txt: No such file", "opd: error: row 3: no answer"]
    assert messages[-1].startswith("opd: internal error: ZeroDivisionError")
    assert parser.run(["1", "--no-such"]) == errors.USAGE
    assert "--no-such" in capsys.readouterr().err
    assert parser.run(["--help"]) == 0
    assert "  opd try 1" in capsys.readouterr().out


def test_gap_closed() -> None:
    assert outcome.gap_closed(0.5, 0.75, 1.0) == 0.5 and outcome.gap_closed(0.5, 0.25, 1.0) == -0.5
    assert outcome.gap_closed(0.5, 0.75, 0.5) is None and outcome.gap_closed(None, 0.75, 1.0) is None
    assert set(outcome.achieved([], []).values()) == {None}


def evaluation(step: int, each: list[float | None] | None, kl: float | None = None, model: str = "student") -> dict[str, Any]:
    judged = [reward for reward in each or [] if reward is not None]
    rewards = {"mean": fmean(judged), "low": min(judged), "high": max(judged), "count": len(judged), "each": each} if judged else None
    return {"model": model, "step": step, "rewards": rewards, "kl": kl}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [evaluation(0, [1] * 8 + [0] * 8), evaluation(10, [0] * 16)],
            "reward 50.0% → 0.0%: worse than before training; the best was step 0",
        ),
        ([evaluation(0, [1, 0] * 8), evaluation(10, [1] * 16), evaluation(20, [0] * 16)], "the best was step 10 (opd export RUN --best)"),
        ([evaluation(0, [17.5] * 8), evaluation(10, [3.0] * 8)], "reward 17.5 → 3: worse"),
        ([evaluation(0, [1, 1, 0, 0] * 8), evaluation(10, [1, 0, 0, 0] * 8)], "reward 50.0% → 25.0%"),
        ([evaluation(0, [1, 1, 0, 0]), evaluation(10, [1, 0, 0, 0])], ""),  # one of four: within the interval
        ([evaluation(0, [0] * 16), evaluation(10, [1] * 16)], ""),
        ([evaluation(0, None, 1.0), evaluation(10, None, 1.2)], "KL to the teacher 1.0000 → 1.2000: worse"),
        ([evaluation(0, None, 1.0), evaluation(10, None, 1.05)], ""),
        ([evaluation(0, [0, 1] * 8, 1.0), evaluation(10, [1] * 16, 1.05)], ""),
        ([evaluation(0, [1] * 16)], ""),
        ([], ""),
    ],
)
def test_a_run_that_made_the_student_worse_has_a_warning(lines: list[dict[str, Any]], words: str) -> None:
    found = outcome.find_warnings(lines, {"eval": {"reward": "number"}})
    assert words in found[0] and "optim.lr" in found[0] if words else found == []


def test_a_kl_that_rose_with_the_reward_is_told_but_not_as_worse() -> None:
    before, after = evaluation(0, [0, 1] * 8, 1.0), evaluation(10, [1] * 16, 1.2)
    [found] = outcome.find_warnings([before, after], {})
    assert found.startswith("KL to the teacher 1.0000 → 1.2000 although the reward rose") and "report.html" in found
    assert outcome.WORSE not in found  # which a sweep would not choose
    assert outcome.find_warnings([before, {**after, "rewards": before["rewards"]}], {}) == []


def test_answers_without_a_reward_are_a_warning() -> None:
    lines = [{**evaluation(0, None), "unjudged": {"count": 4, "of": 4, "answer": "no digits here"}}]
    [found] = outcome.find_warnings(lines, {"eval": {"reward": "number"}})
    assert "eval.reward=number judged none of 4 answers: 'no digits here' has no single number" in found and "data.answer" in found
    lines = [{**evaluation(0, None), "unjudged": {"count": 4, "of": 4, "answer": "1", "missed": 4}}]
    [found] = outcome.find_warnings(lines, {"eval": {"reward": "mine:slow"}})
    assert found.endswith("it took too long or too much memory; raise eval.reward_seconds or eval.reward_memory")
    lines = [{**evaluation(0, [1, None]), "unjudged": {"count": 1, "of": 2, "answer": "x"}}]
    assert "judged 1 of 2 answers" in outcome.find_warnings(lines, {"eval": {"reward": "exact"}})[0]


def test_the_best_evaluation_may_be_that_before_training() -> None:
    assert outcome.achieved([], [evaluation(0, [1.0, 0.0]), evaluation(10, [0.0, 0.0])])["best_step"] == 0
    assert outcome.achieved([], [evaluation(0, [0.0]), evaluation(10, [1.0]), evaluation(20, [1.0])])["best_step"] == 10, "the first"
    assert outcome.achieved([], [evaluation(0, None, 2.0), evaluation(10, None, 1.0)])["best_step"] == 10


@pytest.mark.parametrize(("rewards", "shares"), [([0, 0.5, 1, None], True), ([17.5], False), ([-2.0, 1.0], False), ([], True)])
def test_rewards_outside_of_0_and_1_are_no_percentages(rewards: list[float | None], shares: bool) -> None:
    assert intervals.are_shares(rewards) is shares
    assert outcome.rewards_are_shares([evaluation(0, [0.5]), evaluation(10, rewards, model="teacher")]) is shares


def test_achieved_takes_the_last_evaluation_or_that_of_a_step() -> None:
    lines = [{"model": "student", "step": step, "kl": 1.0 / (step + 1), "rewards": None} for step in (0, 2, 4)]
    metrics = [{"step": step, "reverse_kl": float(step), "time/step": 2.0, "tokens": 10.0} for step in range(1, 5)]
    found = outcome.achieved(metrics, lines)
    assert (found["eval_kl_before"], found["eval_kl_after"]) == (1.0, 0.2)
    assert (found["reverse_kl_first"], found["reverse_kl_last"]) == (1.0, 4.0)
    assert (found["steps"], found["graded_tokens"], found["seconds"], found["tokens_per_second"]) == (4, 40, 8.0, 5.0)
    assert outcome.achieved(metrics, lines, 2)["eval_kl_after"] == 1 / 3
    assert outcome.achieved(metrics, lines, 3)["eval_kl_after"] is None
    assert outcome.achieved(metrics, lines[:1])["eval_kl_after"] is None, "the evaluation before training"


def test_run_outcome_adds_the_best_evaluation_and_prefers_the_summary(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", run={"config": {"seed": 7}}, summary={"reward_after": 0.4, "steps": None, "unknown": 1})
    means = {0: 0.2, 2: 0.6, 4: 0.3}
    lines = [{"model": "student", "step": step, "rewards": {"mean": mean, "low": 0.1, "high": 0.9}} for step, mean in means.items()]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = outcome.run_outcome(open_run(folder))
    assert (found["reward_best"], found["reward_best_step"], found["reward_best_interval"]) == (0.6, 2, [0.1, 0.9])
    assert (found["reward_before"], found["reward_after"], found["seed"], found["steps"]) == (0.2, 0.4, 7, None)
    assert "unknown" not in found


@pytest.mark.parametrize("total", [1, 6, 50, 51, 400, 10_000])
def test_detailed_steps_are_about_fifty_with_the_first_and_the_last(total: int) -> None:
    steps = [step for step in range(1, total + 1) if outcome.is_detailed_step(step, total)]
    assert steps[0] == 1 and steps[-1] == total and min(total, 25) <= len(steps) <= 52


@pytest.mark.parametrize(
    ("metric", "reward", "kl", "found"),
    [
        ("auto", 0.5, 2.0, 0.5),
        ("auto", 0.0, 2.0, 0.0),
        ("auto", None, 2.0, -2.0),
        ("auto", None, None, None),
        ("eval_kl_after", 0.5, 2.0, 2.0),
        ("eval_kl_after", 0.5, None, None),
    ],
)
def test_the_objective_of_a_sweep(metric: str, reward: float | None, kl: float | None, found: float | None) -> None:
    assert outcome.objective(SweepConfig(metric=metric), {"reward_after": reward, "eval_kl_after": kl}) == found


# Writing


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "new")
    folder.prepare()
    return folder


def test_a_log_line_that_the_disk_refused_is_written_with_the_next(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.append(METRICS, {"step": 1, "loss": float("nan")})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        folder.append(METRICS, {"step": 2})
    assert [line["step"] for line in read_lines(folder.path / METRICS)] == [1]
    folder.append(METRICS, {"step": 3})
    assert read_lines(folder.path / METRICS) == [{"step": 1, "loss": None}, {"step": 2}, {"step": 3}]


def test_rewind_deletes_what_came_after_a_step(folder: RunFolder) -> None:
    for step in (0, 1, 2, 3):
        folder.append(EVALUATIONS, {"step": step})
        folder.append(METRICS, {"step": step})
        folder.write_rollouts(step, [{}])
    folder.rewind(1)
    folder.set_status(Status.running)
    run = open_run(folder.path)
    assert [line["step"] for line in run.metrics] == [line["step"] for line in run.evaluations] == run.rollout_steps() == [0, 1]
    folder.rewind(-1)
    assert open_run(folder.path).metrics == [] and open_run(folder.path).rollout_steps() == []


def test_other_ranks_write_nothing(folder: RunFolder) -> None:
    before = sorted(folder.path.rglob("*"))
    other = RunFolder(folder.path, writes=False)
    other.prepare()
    other.append(METRICS, {"step": 1})
    other.write_rollouts(1, [{}])
    other.write("run.json", {})
    other.write_hydra({"config": ""})
    other.set_status(Status.done)
    other.rewind(-1)
    assert sorted(folder.path.rglob("*")) == before and folder.status() is None


def test_a_locked_run_folder_is_refused_until_it_is_free(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(errors.OutputError, match="name="), RunFolder(folder.path).lock():
        pass
    with RunFolder(folder.path).lock():
        pass


def test_a_run_folder_with_a_link_to_elsewhere_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "final").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.OutputError, match=r"elsewhere.*hydra\.run\.dir"):
        folder.prepare()


def refuse(folder: RunFolder, begun: bool = False) -> None:
    with contextlib.suppress(errors.DataError), folder.unchanged_if_refused():
        folder.set_status(Status.running)
        folder.begun = begun
        folder.set_status(Status.failed, "no such column", errors.DATA)
        raise errors.DataError


def test_a_refused_start_leaves_an_earlier_run_its_status_and_a_new_folder_empty(folder: RunFolder) -> None:
    other = RunFolder(folder.path / "new")
    other.prepare()
    with other.lock():
        refuse(other)
    assert not list(other.path.iterdir())

    folder.set_status(Status.failed, "internal error")
    refuse(folder)
    assert open_run(folder.path).reason == "no such column", "no run has begun here: the last failure counts"
    folder.write("run.json", {})
    folder.set_status(Status.preempted, "stopped")
    refuse(folder)
    assert (open_run(folder.path).status, open_run(folder.path).reason) == ("preempted", "stopped")
    refuse(folder, begun=True)
    assert open_run(folder.path).status == "failed", "the run had begun: this is no refusal"


# Text


def test_numbers_are_shown_the_same_everywhere() -> None:
    assert text.format_reward(0.4375, [0.231, 0.668]) == "43.8% [23.1, 66.8]" and text.format_reward(1.0, None) == "100.0%"
    assert text.format_reward(0.4375, [0.231, 0.668], digits=0) == "43.8% [23, 67]"
    assert text.format_reward(17.5, [17.5, 17.5], shares=False) == "17.5" and text.format_reward(0.5, [0.5, 0.5]) == "50.0%", "no interval"
    assert text.format_reward(-2.0, [-3.25, -1], shares=False) == "-2 [-3.25, -1]"
    assert text.format_reward(0.125, [-0.312, 0.0], sign="+") == "+12.5% [-31.2, +0.0]"
    assert [text.format_duration(seconds) for seconds in (0.4, 119, 120, 7_199, 7_200, 200_000)] == [
        "0 s",
        "119 s",
        "2.0 min",
        "120.0 min",
        "2.0 h",
        "2.3 days",
    ]
    assert [text.format_bytes(count) for count in (0, 2**20, 2**30 - 2**20, 3 * 2**29)] == ["0.0 MiB", "1.0 MiB", "1,023.0 MiB", "1.50 GiB"]
    assert (text.format_number(1234, ","), text.format_number(0.12345), text.format_percent(0.5)) == ("1,234", "0.1235", "50.0%")
    shown = [text.format_number(None), text.format_percent(None), text.format_reward(None, None), text.format_duration(None)]
    assert set(shown) == {"–"} == {text.format_bytes(None)}


def test_a_console_without_a_terminal_is_wide_enough_for_tables(capsys: pytest.CaptureFixture[str]) -> None:
    text.make_console(200).print("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"
