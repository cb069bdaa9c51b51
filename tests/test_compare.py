"""`opd compare` ranks runs by what they achieved, finished or not, of any version; JSON and CSV have every number."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd import errors
from opd.cli import main as cli
from opd.config.options import METRICS, Direction
from opd.report import compare
from opd.runs.folder import write_json
from opd.runs.reader import find_runs


def rewarded(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 10, "length": 3.0, "truncated": 0.0}


def make(folder: Path, status: str = "done", rewards: tuple[float, ...] = (), kl: tuple[float, ...] = (), **options: Any) -> Path:
    """A run that was evaluated before the first step and after each tenth one."""
    folder.mkdir(parents=True)
    write_json(folder / "status.json", {"status": status, "reason": "" if status == "done" else "why", "exit_code": 0})
    write_json(folder / "run.json", {"config": {"seed": 0, "name": folder.name, "optim": {"lr": 0.1, "betas": [0.9, 0.95]}} | options})
    measured = max(len(rewards), len(kl))
    lines = [{"model": "teacher", "step": 0, "rewards": rewarded(1.0) if rewards else None, "kl": None}]
    for index in range(measured):
        reward = rewarded(rewards[index]) if rewards else None
        lines.append({"model": "student", "step": 10 * index, "rewards": reward, "kl": kl[index] if kl else None})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"step": step, "reverse_kl": 1.0 / step, "tokens": 5, "time/step": 2.0} for step in range(1, 10 * measured - 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


def ranked(*folders: Path, **how: Any) -> list[tuple[int | None, str]]:
    return [(row.rank, row.run.name) for row in compare.compare(find_runs(folders), **how).rows]


def test_runs_are_ranked_by_the_last_reward_and_those_without_one_come_last(tmp_path: Path) -> None:
    make(tmp_path / "a", rewards=(0.5, 0.6), kl=(2.0, 1.0))
    make(tmp_path / "b", rewards=(0.5, 0.9, 0.7), kl=(2.0, 1.0, 1.5))
    make(tmp_path / "c", "failed")
    make(tmp_path / "d", rewards=(0.5, 0.0), kl=(2.0, 0.5))
    assert ranked(tmp_path) == [(1, "b"), (2, "a"), (3, "d"), (None, "c")]
    assert ranked(tmp_path, metric="eval_kl_after") == [(1, "d"), (2, "a"), (3, "b"), (None, "c")]
    assert ranked(tmp_path, metric="eval_kl_after", direction=Direction.maximize) == [(1, "b"), (2, "a"), (3, "d"), (None, "c")]
    assert ranked(tmp_path, metric="reward_best")[0] == (1, "b")


def test_runs_of_other_data_or_rewards_are_not_ranked_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", rewards=(0.5, 0.6), eval={"reward": "number"})
    make(tmp_path / "b", rewards=(0.5, 0.9), eval={"reward": "exact"})
    assert cli.main(["compare", str(tmp_path)]) == errors.OK
    assert capfd.readouterr().out.startswith("warning: these runs have different rewards (eval.reward)")
    assert [rank for rank, _ in ranked(tmp_path)] == [None, None]
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "both.html")]) == errors.OK
    assert "These runs have different rewards (eval.reward)" in (tmp_path / "both.html").read_text()
    make(tmp_path / "same/a", rewards=(0.5, 0.6), eval={"reward": "number"})
    make(tmp_path / "same/b", rewards=(0.5, 0.9), eval={"reward": "number"})
    assert compare.incomparable(find_runs([tmp_path / "same"])) == ""


def test_of_equal_members_the_one_proposed_first_comes_first(tmp_path: Path) -> None:
    for number, name in ((2, "a"), (1, "b")):
        write_json(make(tmp_path / name, rewards=(0.5, 0.6)) / "member.json", {"number": number})
    assert ranked(tmp_path) == [(1, "b"), (2, "a")]


def test_rewards_outside_of_0_and_1_and_names_are_in_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "of-17", rewards=(3.0, 17.5))
    assert cli.main(["compare", str(tmp_path)]) == errors.OK
    shown = capfd.readouterr().out
    assert "of-17" in shown.partition("\n  1  ")[0] and "17.5 [17.4, 17.6]" in shown and "%" not in shown


def test_without_rewards_runs_are_ranked_by_the_smaller_kl(tmp_path: Path) -> None:
    make(tmp_path / "a", kl=(2.0, 1.0))
    make(tmp_path / "b", kl=(2.0, 0.5))
    assert ranked(tmp_path) == [(1, "b"), (2, "a")]


def test_of_many_options_that_differ_the_typed_and_the_most_telling_are_below_the_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("a", 1), ("b", 2)):
        data = {f"option_{number:02}": value for number in range(17)}
        folder = make(tmp_path / name, rewards=(0.5, 0.6), data=data, model={"path": f"student-{name}"}, optim={"lr": value / 10})
        (folder / ".hydra").mkdir()
        (folder / ".hydra/overrides.yaml").write_text(f"- data.option_16={value}\n")
    assert cli.main(["compare", str(tmp_path)]) == errors.OK
    table, _, below = capfd.readouterr().out.partition(f"{tmp_path / 'a'}\n")
    assert "options that differ" not in table
    options = below.splitlines()[0].split()
    assert options[:4] == ["data.option_16=1", "model.path=student-a", "optim.lr=0.1", "data.option_00=1"] and len(options) == 12
    assert below.splitlines()[-1].startswith("and 7 more options differ") and "--csv" in below


def test_an_unfinished_run_is_ranked_by_its_logs(tmp_path: Path) -> None:
    [row] = compare.compare(find_runs([make(tmp_path / "a", "running", rewards=(0.5, 0.9, 0.7), kl=(2.0, 1.0, 1.5))])).rows
    assert {name: row.values[name] for name in ("reward_before", "reward_after", "reward_best", "reward_best_step", "reward_teacher")} == {
        "reward_before": 0.5,
        "reward_after": 0.7,
        "reward_best": 0.9,
        "reward_best_step": 10,
        "reward_teacher": 1.0,
    }
    assert row.values["reward_best_interval"] == [pytest.approx(0.8), pytest.approx(1.0)]
    assert (row.values["eval_kl_before"], row.values["eval_kl_after"]) == (2.0, 1.5)
    assert row.values["reverse_kl_first"] == pytest.approx((1 + 1 / 2) / 2) and row.values["reverse_kl_last"] == pytest.approx(
        (1 / 19 + 1 / 20) / 2
    )
    assert (row.values["steps"], row.values["graded_tokens"], row.values["seconds"], row.values["tokens_per_second"]) == (
        20,
        100,
        40.0,
        2.5,
    )
    assert set(METRICS) <= set(row.values)


def test_a_summary_overrides_the_logs_and_may_lack_keys_or_have_unknown_ones(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rewards=(0.5, 0.6))
    write_json(folder / "summary.json", {"reward_after": 0.65, "gap_closed": 0.3, "seconds": None, "of_another_version": 1})
    [row] = compare.compare(find_runs([folder])).rows
    assert (row.values["reward_after"], row.values["gap_closed"], row.values["reward_before"], row.values["seconds"]) == (
        0.65,
        0.3,
        0.5,
        20.0,
    )
    assert "of_another_version" not in row.values


def test_only_options_that_differ_and_affect_training_are_shown(tmp_path: Path) -> None:
    make(tmp_path / "a", optim={"lr": 0.1, "betas": [0.9, 0.95]}, sweep={"metric": "auto"})
    make(tmp_path / "b", optim={"lr": 0.2, "betas": [0.9, 0.9]}, sweep={"metric": "gap_closed"}, new_option=3)
    never_begun = make(tmp_path / "c", "failed")
    (never_begun / "run.json").unlink()
    (never_begun / ".hydra").mkdir()
    (never_begun / ".hydra/overrides.yaml").write_text("- experiment=debug\n- optim.lr=-1e-1\n- seed=0\n")
    rows = {row.run.name: row.options for row in compare.compare(find_runs([tmp_path])).rows}
    assert rows == {
        "a": {"optim.betas": [0.9, 0.95], "optim.lr": 0.1},
        "b": {"optim.betas": [0.9, 0.9], "optim.lr": 0.2},
        "c": {"optim.lr": -0.1},
    }


def test_runs_that_sample_in_other_precisions_are_told_apart(tmp_path: Path) -> None:
    for name, copies in (("a", True), ("b", False)):
        file = make(tmp_path / name) / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"choices": {"bf16_copy": copies}}))
    rows = {row.run.name: row.options for row in compare.compare(find_runs([tmp_path])).rows}
    assert rows == {"a": {"sampling.dtype, chosen": "bf16 copy"}, "b": {"sampling.dtype, chosen": "trainer"}}


def test_nearly_empty_run_folders_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/status.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/run.json").write_text("{}")
    (tmp_path / "odd/metrics.jsonl").write_text('{"step": 1}\n{"st')
    (tmp_path / "odd/evaluations.jsonl").write_text('{"model": "student", "step": 0}\n')
    for form in ([], ["--json"], ["--csv"]):
        assert cli.main(["compare", str(tmp_path), *form]) == errors.OK
    assert "new" in capsys.readouterr().out


def test_the_table_shows_how_a_run_ended_and_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", rewards=(0.5, 0.6), kl=(2.0, 1.0), model={"path": "[red]x[/red]"})
    make(tmp_path / "b", "preempted", model={"path": "y"})
    assert cli.main(["compare", str(tmp_path), "--metric", "gap_closed"]) == errors.OK
    shown = capsys.readouterr().out
    assert "model.path=[red]x[/red]" in shown and "60.0% [50, 70]" in shown and "2.0000 → 1.0000" in shown
    assert "gap_closed" in shown.splitlines()[1], "what they are ranked by has a column"
    assert f"{tmp_path / 'b'}: preempted: why" in shown


def test_json_and_csv_hold_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", rewards=(0.5, 0.6), optim={"lr": 0.12345678901234}, data={"prompt": 'x,"y"'})
    make(tmp_path / "b", optim={"lr": 0.2}, data={"prompt": None})
    assert cli.main(["compare", str(tmp_path), "--json"]) == errors.OK
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["metric"] == "reward_after" and [run["rank"] for run in comparison["runs"]] == [1, None]
    assert comparison["runs"][0]["options"] == {"data.prompt": 'x,"y"', "optim.lr": 0.12345678901234}
    assert cli.main(["compare", str(tmp_path), "--csv"]) == errors.OK
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (first["optim.lr"], first["data.prompt"], second["data.prompt"]) == ("0.12345678901234", 'x,"y"', "null")
    assert (first["reward_after"], first["reward_after_interval_low"], second["reward_after"]) == ("0.6", "0.5", "")


@pytest.mark.parametrize(
    ("words", "code", "remedy"),
    [
        (["nowhere"], errors.DATA, "nowhere: there is no such folder"),
        ([], errors.USAGE, "DIR"),
        (["runs", "--metric", "reward"], errors.USAGE, "reward_after"),
        (["runs", "--metric", "seed"], errors.USAGE, "reward_after"),
        (["runs", "--metric", "best_step"], errors.USAGE, "reward_after"),
        (["runs", "--json", "--csv"], errors.USAGE, "not allowed with"),
    ],
)
def test_compare_mistakes_are_one_line_with_an_exit_code(
    words: list[str], code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs/a")
    assert cli.main(["compare", *words]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("opd: error: ") and remedy in shown.err


def test_compare_imports_no_torch(tmp_path: Path) -> None:
    make(tmp_path / "a", rewards=(0.5, 0.6))
    code = f"import sys; from opd.cli import main; main.main(['compare', {str(tmp_path)!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
