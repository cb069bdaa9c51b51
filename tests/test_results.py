"""What a run says of its result, and what can be done with it afterwards: its best checkpoint, its checkpoints, from any folder."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd import errors
from opd.cli import main as cli
from opd.config.compose import PACKAGE

SUMS = [{"prompt": f"{one}+{two}=", "answer": str(one + two)[::-1]} for one in range(11, 41) for two in (12, 35)]

WORDS = [
    "experiment=debug",
    "device=cpu",
    "name=run",
    "model.path=./student",
    "teacher.path=./teacher",
    "data=jsonl",
    "data.train_path=sums.jsonl",
    "data.eval_path=sums.jsonl",
    "eval.reward=number",
    "optim.lr=1e-2",
    "train.max_steps=6",
    "eval.steps=2",
    "eval.limit=32",
    "checkpoint.best=final",
    "checkpoint.keep_last=1",
]


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, data, and a finished run of them under relative paths, which ruined the student; of half of the sums the
    answers are no numbers."""
    folder = tmp_path_factory.mktemp("ruined")
    for name in ("student", "teacher"):
        shutil.copytree(PACKAGE / "assets" / f"tiny-{name}", folder / name)
    rows = [row if index % 2 else {**row, "answer": "no digits here"} for index, row in enumerate(SUMS)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forked.trained(folder, WORDS)
    return folder


def test_a_run_that_ruined_the_student_says_so(ruined: Path) -> None:
    summary = json.loads((ruined / "runs/run/summary.json").read_text())
    worse = next(text for text in summary["warnings"] if "worse than before training" in text)
    assert f"{summary['reward_before']:.1%} → {summary['reward_after']:.1%}" in worse and "lower optim.lr" in worse
    assert summary["best_step"] == 0 and "the best was step 0" in worse
    assert worse.replace("'", "&#x27;") in (ruined / "runs/run/report.html").read_text()
    assert cli.main(["report", str(ruined / "runs/run")]) == errors.OK


def test_a_refused_start_leaves_the_log_of_the_run_as_it_was(
    ruined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ruined / "runs/run", tmp_path / "runs/run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/run/train.log").write_text("its own\n")
    assert cli.main(["train", "experiment=debug", "device=cpu", "name=run", "train.max_steps=7"]) == errors.USAGE
    assert "contains another run" in capfd.readouterr().err
    assert (tmp_path / "runs/run/train.log").read_text() == "its own\n"


def test_answers_that_were_not_judged_are_counted(ruined: Path) -> None:
    lines = [json.loads(line) for line in (ruined / "runs/run/evaluations.jsonl").read_text().splitlines()]
    student = next(line for line in lines if line["model"] == "student")
    assert student["unjudged"]["count"] + student["rewards"]["count"] == student["unjudged"]["of"] == 32
    assert student["unjudged"]["answer"] == "no digits here"


def test_a_finished_run_is_not_resumed_with_options_that_nothing_is_left_for(
    ruined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shutil.copytree(ruined, tmp_path / "copy"))
    stored = Path("runs/run/run.json").read_bytes()
    words = ["train", *WORDS, "optim.lr=1e-4", "resume_force=true"]
    assert cli.main(words) == errors.USAGE
    assert "its 6 steps are done" in (shown := capfd.readouterr().err) and "train.max_steps above 6" in shown
    assert Path("runs/run/run.json").read_bytes() == stored and '"done"' in Path("runs/run/status.json").read_text()
    for steps in (7, 8):
        assert cli.main([*words, f"train.max_steps={steps}"]) == errors.OK
    warnings = json.loads(Path("runs/run/summary.json").read_text())["warnings"]
    assert "options changed on the way (resume_force): optim.lr was 0.01, is 0.0001" in warnings
    assert warnings[0] in Path("runs/run/report.html").read_text()


def test_final_has_the_weights_of_the_best_evaluation(ruined: Path, tmp_path: Path) -> None:
    run = ruined / "runs/run"
    best = json.loads((run / "checkpoints/best.json").read_text())["step"]
    assert best < 6 and json.loads((run / "summary.json").read_text())["checkpoint"] == f"step_{best:06d}"
    wanted = load_file(run / f"checkpoints/step_{best:06d}/model.safetensors")
    found = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert f"step_{best:06d}" in (run / "final/README.md").read_text()
    assert cli.main(["export", str(run), "--best", "--out", str(tmp_path / "best")]) == errors.OK
    assert (tmp_path / "best/model.safetensors").read_bytes() == (run / "final/model.safetensors").read_bytes()
    assert cli.main(["export", str(run), "--out", str(tmp_path / "whole")]) == errors.OK
    cards = [(folder / "README.md").read_text() for folder in (run / "final", tmp_path / "best", tmp_path / "whole")]
    results = {card[card.index("## Result") : card.index("The weights are those")] for card in cards}
    assert "The gap to the teacher grew by" in cards[0]
    assert "the gap to the teacher grew by" in (run / "report.html").read_text(), "in the same words"
    assert len(results) == 1 and f"\n{best} steps, " in results.pop()
    assert cli.main(["export", str(run / "final"), "--best", "--out", str(tmp_path / "other")]) == errors.DATA


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft
def test_final_has_the_merged_adapters_of_the_best_evaluation(tmp_path: Path) -> None:
    words = ["experiment=debug", "device=cpu", "name=run", "lora=default", "optim.lr=3e-2", "eval.steps=1", "checkpoint.best=final"]
    forked.trained(tmp_path, words)
    run = tmp_path / "runs/run"
    best = json.loads((run / "checkpoints/best.json").read_text())["step"]
    assert best < 6
    for step, same in ((best, True), (6, False)):
        out = tmp_path / f"step{step}"
        assert cli.main(["export", str(run / f"checkpoints/step_{step:06d}"), "--out", str(out)]) == errors.OK
        assert (out.joinpath("model.safetensors").read_bytes() == (run / "final/model.safetensors").read_bytes()) is same


def test_a_run_and_its_checkpoints_are_evaluated_from_any_folder(
    ruined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ruined / "runs/run"
    found = []
    for target in (run, run / "checkpoints/step_000006"):
        assert cli.main(["eval", str(target), "--json", "--out", "out.json", "eval.limit=32"]) == errors.OK, capfd.readouterr().err
        found.append(json.loads(capfd.readouterr().out))
    assert found[0]["teacher"] == found[1]["teacher"] == str(ruined / "teacher") and found[1]["baseline"] == str(ruined / "student")
    summary = json.loads((run / "summary.json").read_text())
    assert found[1]["tasks"]["evaluation"]["models"]["model"]["mean"] == pytest.approx(summary["reward_after"])
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in run.iterdir() if path.name != "eval.json")
    words = [str(run / "checkpoints/step_000006"), "--prompt", "11+12=", "--json"]
    assert cli.main(["sample", *words]) == errors.OK and "teacher" in json.loads(capfd.readouterr().out)
    assert cli.main(["score", str(run), "--text", "11+12=32", "--json"]) == errors.OK
    capfd.readouterr()
    moved = json.loads((run / "run.json").read_text()) | {"started_in": str(tmp_path / "gone")}
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy/run.json").write_text(json.dumps(moved))
    assert cli.main(["eval", "copy"]) == errors.USAGE
    assert "teacher.path=./teacher" in (shown := capfd.readouterr().err) and "--teacher FOLDER" in shown


def test_a_bare_model_is_sampled_without_a_teacher(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.evaluation.sample_score.load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    words = ["sample", "bundled:tiny-student", "data=arithmetic", "device=cpu", "--prompt", "11+11=", "--json"]
    assert cli.main(words) == errors.OK
    assert json.loads(capfd.readouterr().out).keys() == {"prompt", "student"}


def test_a_reward_that_judges_nothing_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sums.jsonl").write_text("".join(json.dumps({**row, "answer": "no digits here"}) + "\n" for row in SUMS[:8]))
    words = ["experiment=debug", "device=cpu", "name=run", "data=jsonl", "data.train_path=sums.jsonl", "train.max_steps=1"]
    words += ["data.eval_path=sums.jsonl", "eval.reward=number"]
    assert cli.main(["train", *words]) == errors.OK
    shown = capfd.readouterr().out
    assert "warning: eval.reward=number judged none of" in shown and "'no digits here' has no single number" in shown
    [found] = json.loads(Path("runs/run/summary.json").read_text())["warnings"]
    assert "judged none of" in found and "judged none of" in Path("runs/run/report.html").read_text()
