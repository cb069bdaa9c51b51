"""`opd eval` compares models on the same prompts; its intervals are those of the judge."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from transformers import AutoTokenizer

from opd import errors
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.options import DataConfig, EvalConfig, LoraConfig, ModelConfig, Quantization, TeacherConfig
from opd.config.schema import Config
from opd.errors import ConfigError
from opd.evaluation import judge
from opd.evaluation.show import show_evaluation
from opd.evaluation.target import with_quantized_base
from opd.runs.intervals import interval
from opd.runs.text import make_console

SMALL = ["eval.limit=40", "eval.kl_prompts=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps, in runs/run of the folder."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["experiment=debug", "device=cpu", "name=run", "optim.lr=1e-3", "train.max_steps=2"]
    forked.trained(folder, words)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `opd eval --json` and return what it printed."""

    def run(*words: str) -> dict[str, Any]:
        code = cli.main(["eval", *words, "--json"])
        shown = capfd.readouterr()
        assert code == errors.OK, shown.err
        evaluation: dict[str, Any] = json.loads(shown.out)
        return evaluation

    return run


def tree(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def test_a_served_teacher_is_loaded_here_and_said_so_or_asked_for(evaluate: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["bundled:tiny-student", "experiment=tiny", "device=cpu", "teacher.url=http://127.0.0.1:1", "eval.limit=2", "eval.kl_prompts=0"]
    assert evaluate(*words)["teacher"] == "bundled:tiny-teacher (loaded here, not served)"
    assets = PACKAGE / "assets/tiny-teacher"
    AutoTokenizer.from_pretrained(assets).save_pretrained(tmp_path / "tokenizer")
    words.append(f"teacher.path={tmp_path / 'tokenizer'}")
    assert cli.main(["eval", *words]) == errors.USAGE and "--teacher MODEL" in capfd.readouterr().err
    assert evaluate(*words, "--teacher", "bundled:tiny-teacher")["teacher"].endswith("tiny-teacher")


def test_eval_of_a_run_repeats_its_own_evaluation_and_changes_none_of_its_files(trained: Path, evaluate: Any) -> None:
    run = trained / "runs" / "run"
    before, summary = tree(run), json.loads((run / "summary.json").read_text())
    found = evaluate(str(run))
    task = found["tasks"]["evaluation"]
    figures = task["models"]
    assert task["prompts"] == 16 and found["baseline"] == "bundled:tiny-student" and found["model"].endswith("final")
    assert figures["model"]["mean"] == pytest.approx(summary["reward_after"])
    assert figures["baseline"]["mean"] == pytest.approx(summary["reward_before"])
    assert figures["teacher"]["mean"] == pytest.approx(summary["reward_teacher"])
    assert figures["model"]["kl"] == pytest.approx(summary["eval_kl_after"], rel=1e-3)
    assert task["gap_closed"] == pytest.approx(summary["gap_closed"])
    assert json.loads((run / "eval.json").read_text()) == found
    evaluate(str(run), "eval.limit=4")
    assert (run / "eval-2.json").is_file() and json.loads((run / "eval.json").read_text()) == found
    assert before.items() <= tree(run).items()


@pytest.mark.long
def test_eval_of_a_run_in_bf16_computes_as_the_run_did(evaluate: Any, capfd: pytest.CaptureFixture[str]) -> None:
    dtypes = ["model.dtype=bfloat16", "teacher.dtype=bfloat16", "sampling.dtype=bfloat16"]
    words = ["experiment=debug", "device=cpu", "name=bf16", "optim.lr=1e-3", "train.max_steps=1", "eval.reward=null", *dtypes]
    assert cli.main(["train", *words]) == errors.OK
    capfd.readouterr()
    summary = json.loads(Path("runs/bf16/summary.json").read_text())
    figures = evaluate("runs/bf16")["tasks"]["evaluation"]["models"]
    assert figures["baseline"]["kl"] == pytest.approx(summary["eval_kl_before"], rel=1e-6)
    assert figures["model"]["kl"] == pytest.approx(summary["eval_kl_after"], rel=1e-6)


def test_the_best_checkpoint_is_shown_by_its_own_path_and_no_file_is_written_without_out(
    trained: Path, evaluate: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained / "runs" / "run"
    before = tree(run)
    assert cli.main(["eval", str(run), "--best", "eval.limit=2", "eval.kl_prompts=0"]) == errors.OK
    shown = capfd.readouterr().out
    assert re.search(rf"^model +{re.escape(str(run))}/checkpoints/step_\d+$", shown, re.MULTILINE) and "opd-checkpoint" not in shown
    assert "not written to a file; --out FILE" in shown and tree(run) == before


def test_overrides_change_only_what_they_name_in_the_config_of_a_run(trained: Path, evaluate: Any) -> None:
    run = str(trained / "runs" / "run")
    found = evaluate(run, "eval.limit=6", "eval.samples=3", "eval.temperature=0.7", "--baseline", "none", "--out", "out.json")
    task = found["tasks"]["evaluation"]
    assert (task["prompts"], task["samples"], task["max_new_tokens"], task["data"]) == (6, 3, 8, "arithmetic")
    assert set(task["models"]) == {"model", "teacher"} and task["gap_closed"] is None
    assert set(task["models"]["model"]["pass"]) == {"1", "2", "3"}
    assert task["models"]["model"]["pass"]["1"] == pytest.approx(task["models"]["model"]["mean"])
    assert json.loads(Path("out.json").read_text()) == found


def test_a_run_on_given_completions_is_evaluated_on_data_without_them(trained: Path, evaluate: Any) -> None:
    shutil.copytree(trained / "runs" / "run", "run")
    stored = json.loads(Path("run/run.json").read_text())
    stored["config"]["train"]["given_share"], stored["config"]["data"]["completion"] = 0.5, "answer"
    Path("run/run.json").write_text(json.dumps(stored))
    task = evaluate("run", "data=arithmetic", "eval.limit=2", "eval.kl_prompts=0", "--baseline", "none")["tasks"]["evaluation"]
    assert task["prompts"] == 2


def test_a_teacher_that_was_the_quantised_base_of_the_student_stays_quantised() -> None:
    mix = {"a": {"source": "arithmetic"}, "b": {"source": "arithmetic"}}
    lora = LoraConfig(rank=2)
    base = ModelConfig(path="x", quantization=Quantization.nf4)
    own, other = TeacherConfig(path="x", prompt="{prompt} !"), TeacherConfig(path="y")
    assert with_quantized_base(Config(model=base, teacher=own, lora=lora)).teacher.quantization is Quantization.nf4
    assert with_quantized_base(Config(model=base, teacher=other, lora=lora)).teacher == other
    teachers = {"a": {"path": "x", "prompt": "{prompt} !"}}
    found = with_quantized_base(Config(model=base, teacher=other, teachers=teachers, lora=lora, data=DataConfig(mix=mix))).parts_by_teacher
    assert {label: part.teacher.quantization.value for label, part in found.items()} == {"a": "nf4", "": "none"}


def test_a_model_against_a_given_baseline_and_teacher(evaluate: Any, tmp_path: Path) -> None:
    words = [
        "bundled:tiny-student",
        "data=arithmetic",
        "eval=arithmetic",
        *SMALL,
        "device=cpu",
        "model.dtype=float32",
        "teacher.dtype=float32",
    ]
    found = evaluate(*words, "--teacher", "bundled:tiny-teacher", "--baseline", "bundled:tiny-teacher")
    task = found["tasks"]["evaluation"]
    assert list(found) == ["target", "model", "baseline", "teacher", "seed", "overrides", "tasks"]
    assert list(found["tasks"]) == ["evaluation"]
    assert task["models"]["baseline"]["mean"] == task["models"]["teacher"]["mean"] == 1
    assert task["against"]["baseline"]["high"] < 0 and task["gap_closed"] is None
    assert task["models"]["baseline"]["kl"] == pytest.approx(0, abs=1e-6), "the baseline is the teacher"
    assert list(tmp_path.iterdir()) == [], "only the result of a run is stored, in its folder"


def test_the_table_of_an_evaluation(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(trained / "runs" / "run"), "--out", "x.json"]) == errors.OK
    shown = capfd.readouterr()
    for part in ("16 prompts of arithmetic, greedy", "reward", "against the baseline:", "written to x.json", "KL to teacher"):
        assert part in shown.out
    assert "other content" not in shown.err, "nothing that the run read has changed"


def test_a_gap_that_grew_is_told_in_the_words_of_a_run(capfd: pytest.CaptureFixture[str]) -> None:
    rewards = {"model": [0.0] * 40, "baseline": [0.0, 1.0] * 20, "teacher": [1.0] * 40}
    answers = {name: [judge.Answer("", reward, 3, False, "", prompt) for prompt, reward in enumerate(of)] for name, of in rewards.items()}
    show_evaluation(make_console(), {"tasks": {"evaluation": judge.compare_answers(answers, {}, Config())}}, None)
    shown = capfd.readouterr().out
    assert re.search(r"the gap to the teacher grew by 100\.0% \[\d+\.\d, \d+\.\d\]\n", shown) and "closed" not in shown


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["nowhere/at/all", "teacher=tiny"], 64, "there is no such folder"),
        (["a", "b"], 64, "--baseline"),
        (["eval.samples=2"], 64, "eval.temperature"),
        (["--teacher"], 64, "expected one argument"),
        (["-m", "seed=0,1"], 64, "one config at a time"),
        (["broken"], 65, "there is no final/ in it: the run is failed; resume it, or name its checkpoint broken/checkpoints/step_000002"),
        (["."], 64, ".: a folder of runs: name one, such as broken"),
        (["broken", "optim.lr=1e-3"], 64, "optim.lr=1e-3: is only read by opd train: remove it"),
        (["broken/final"], 64, "is a part of the run broken"),
        (["broken/final", "teacher=tiny"], 64, "broken/final: there is no such folder"),
        (["x", "model.adapter=y"], 64, "model.adapter='y': does not apply to x"),
        (["x", "model.revision=y"], 64, "model.path=x"),
        (["broken", "model.quantization=nf4", "lora=default"], 64, "model.quantization=nf4: does not apply to broken"),
        (["x", "--teacher", "z", "teacher.adapter=y"], 64, "teacher.path=z"),
    ],
)
def test_eval_mistakes_are_one_line_with_an_exit_code(
    words: list[str], code: int, part: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "status.json").write_text('{"status": "failed", "reason": "", "exit_code": 70}')
    (tmp_path / "broken" / "run.json").write_text('{"config": {"seed": 0}}')
    (tmp_path / "broken" / "checkpoints" / "step_000002").mkdir(parents=True)
    assert cli.main(["eval", *words]) == code
    shown = capfd.readouterr()
    assert part in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_an_experiment_cannot_override_a_run(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(trained / "runs" / "run"), "experiment=tiny"]) == errors.USAGE
    assert "experiment=tiny: the run has its own config" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_eval_on_two_processes_equals_one(trained: Path) -> None:
    words = ["-m", "opd", "eval", str(trained / "runs" / "run"), "--json", "eval.limit=15", "eval.kl_prompts=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    found = []
    for start in ([], launch):
        done = subprocess.run([sys.executable, *start, *words], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["tasks"])
    assert found[0] == found[1]


# Intervals


def test_bootstrap_matches_enumeration_of_all_resamples() -> None:
    values = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    drawn = judge.resampled_means(values, draws=200_000)
    everything = torch.tensor([[row[list(index)].double().mean() for row in values] for index in itertools.product(range(3), repeat=3)])
    assert drawn.dtype == torch.float64
    difference, exact = (means[:, 0] - means[:, 1] for means in (drawn, everything))
    for value in exact.unique():
        share, wanted = ((means - value).abs() < 1e-9 for means in (difference, exact))
        assert float(share.double().mean()) == pytest.approx(float(wanted.double().mean()), abs=0.005)


def test_bootstrap_of_many_prompts_matches_the_normal_interval() -> None:
    values = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = judge.quantile_interval(judge.resampled_means(values)[:, 0])
    wanted = interval(values[0].tolist())
    width = wanted[1] - wanted[0]
    assert abs(low - wanted[0]) < 0.03 * width and abs(high - wanted[1]) < 0.03 * width


def test_bootstrap_is_seeded_and_paired() -> None:
    values = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(judge.resampled_means(values, seed=3), judge.resampled_means(values, seed=3))
    assert not torch.equal(judge.resampled_means(values, seed=3), judge.resampled_means(values, seed=4))
    same = judge.resampled_means(torch.stack([values[0], values[0] + 1]))
    assert torch.allclose(same[:, 1] - same[:, 0], torch.ones(len(same), dtype=torch.float64)), "a constant lead has no spread"


def test_gap_closed_has_no_interval_where_the_teacher_may_not_be_better() -> None:
    now, before, teacher = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    assert judge.gap_closed_interval(now, before, teacher) is None
    low, high = judge.gap_closed_interval(now * 0 + 0.5, before * 0, teacher * 0 + 1) or (0, 0)
    assert low == high == 0.5


def test_pass_at_k_matches_enumeration_of_all_subsets() -> None:
    for right in range(6):
        answers = [1] * right + [0] * (5 - right)
        for k in range(1, 6):
            wanted = sum(any(chosen) for chosen in itertools.combinations(answers, k)) / len(list(itertools.combinations(answers, k)))
            assert judge.pass_at(right, 5, k) == pytest.approx(wanted)


def test_intervals_are_over_prompts_not_over_answers() -> None:
    answers = [judge.Answer("", float(prompt == 0), 3, False, "", prompt) for prompt in (0, 1) for _ in range(50)]
    result = judge.compare_answers({"model": answers, "teacher": answers}, {}, Config(eval=EvalConfig(samples=50, temperature=1.0)))
    statistics = result["models"]["model"]
    assert statistics["mean"] == 0.5 and (statistics["low"], statistics["high"]) == (0, 1), "two prompts"
    assert statistics["pass"]["50"] == 0.5 and result["against"]["teacher"] == {"mean": 0, "low": -1, "high": 1}


def test_a_model_without_a_judged_answer_is_compared_with_none() -> None:
    judged = [judge.Answer("", 1.0, 3, False, "", prompt) for prompt in (0, 1)]
    for answers in ({"model": judged, "teacher": []}, {"model": [], "baseline": judged, "teacher": judged}, {"model": [], "teacher": []}):
        result = judge.compare_answers(answers, {"model": 0.5}, Config())
        assert result["prompts"] == 0 and "against" not in result
        assert result["models"] == {name: {"kl": 0.5 if name == "model" else None} for name in answers}


def test_all_statistics_are_over_the_prompts_that_all_models_have_a_judged_answer_to() -> None:
    model = [judge.Answer("", 1.0, 3, False, "", 0), judge.Answer("", 0.0, 9, True, "", 1)]
    result = judge.compare_answers({"model": model, "teacher": model[:1]}, {}, Config())
    statistics = result["models"]["model"]
    assert result["prompts"] == 1 and statistics == result["models"]["teacher"]
    assert (statistics["mean"], statistics["length"], statistics["truncated"]) == (1, 3, 0)


def test_several_greedy_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"samples.*temperature"):
        EvalConfig(samples=2)
