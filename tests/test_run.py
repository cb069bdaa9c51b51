"""Whole runs: the run folder, resuming, refusals, and exit codes of mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from training_helpers import TIMED
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.errors import DataError
from opd.models.policy import Policy
from opd.runs.folder import RunFolder
from opd.train import main
from opd.training.checkpoint import Checkpoints
from opd.training.start import cut_logs

DEBUG = ("experiment=debug", "device=cpu")
SUMMARY = {
    "reward_before", "reward_after", "reward_teacher", "gap_closed", "eval_kl_before", "eval_kl_after",
    "reverse_kl_first", "reverse_kl_last", "steps", "graded_tokens", "seconds", "tokens_per_second", "peak_memory_bytes", "seed",
}  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished debug run of two inner steps, with its working directory."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*DEBUG, "name=run"]) == 0
    return root / "runs" / "run"


def test_run_folder_has_the_documented_files(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        ".hydra",
        "train.log",
        "metrics.jsonl",
        "evaluations.jsonl",
        "rollouts",
        "checkpoints",
        "final",
        "status.json",
        "summary.json",
    }
    assert json.loads((finished / "status.json").read_text()) == {"status": "done", "reason": "", "exit_code": 0}
    assert (finished / ".hydra/overrides.yaml").read_text().splitlines() == [f"- {word}" for word in [*DEBUG, "name=run"]]
    assert OmegaConf.load(finished / ".hydra/config.yaml") == json.loads((finished / "run.json").read_text())["config"]
    assert OmegaConf.load(finished / ".hydra/hydra.yaml").hydra.job.name == "train"
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["steps"] == 6 and summary["reward_teacher"] > 0.9 and 0 < summary["eval_kl_after"] < 10
    metrics = lines(finished / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert summary["graded_tokens"] == sum(line["tokens"] for line in metrics) == metrics[-1]["tokens_total"]
    evaluations = lines(finished / "evaluations.jsonl")
    assert [(line["model"], line["step"]) for line in evaluations] == [("teacher", 0), ("student", 0), ("student", 3), ("student", 6)]
    assert not list(finished.rglob("*.pkl")) and not list(finished.rglob("*.pt")) and not list(finished.rglob("*.bin"))


def test_stored_rollouts_have_three_log_probs_per_token(finished):
    records = lines(finished / "rollouts" / "step_000001.jsonl")
    assert len(records) == 2
    for record in records:
        count = len(record["ids"])
        assert count == len(record["tokens"]) == len(record["behaviour_logp"]) == len(record["student_logp"]) == len(record["teacher_logp"])
        assert record["completion"] == "".join(record["tokens"])
        assert all(abs(a - b) < 1e-3 for a, b in zip(record["behaviour_logp"], record["student_logp"], strict=True))
        assert record["prompt"].startswith("<|user|>") and record["prompt"].endswith("<|assistant|>")


def test_final_is_a_plain_model_folder(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    assert model.dtype == torch.float32
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+34="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert len(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0, ids["input_ids"].shape[1] :])) > 0
    assert model.generation_config.do_sample is False and model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    card = (finished / "final" / "README.md").read_text()
    assert "bundled:tiny-teacher" in card and "| reward |" in card


def test_finished_run_is_not_repeated_and_its_files_stay(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished.parent.parent)
    before = {path: path.stat().st_mtime_ns for path in (finished / "final").iterdir()}
    assert main([*DEBUG, "name=run"]) == 0
    assert "finished; nothing to do" in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "final").iterdir()}


def test_changed_option_in_the_same_folder_is_refused_with_old_and_new_value(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished.parent.parent)
    composed = {file.name: file.read_text() for file in (finished / ".hydra").iterdir()}
    assert main([*DEBUG, "name=run", "optim.lr=2e-4"]) == 64
    assert "optim.lr was 0.0001, is 0.0002" in capfd.readouterr().err
    assert main([*DEBUG, "name=run", "resume=never"]) == 64
    assert "already contains a run" in capfd.readouterr().err
    assert main([*DEBUG, "name=run", "eval.limit=8"]) == 64
    assert "eval.limit was 16, is 8" in capfd.readouterr().err
    assert json.loads((finished / "status.json").read_text())["status"] == "done"
    assert composed == {file.name: file.read_text() for file in (finished / ".hydra").iterdir()}, "they describe the run in the folder"


def stop_after(monkeypatch, step: int) -> None:
    """Let a run end as if killed, right after `step` was saved."""
    from opd.training.loop import Trainer

    original = Trainer.train_step

    def train_step(self):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_interrupted_run_resumes_to_the_same_weights_and_log(finished, tmp_path, monkeypatch, capfd, step):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert main([*DEBUG, "name=run"]) == 130
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    assert main([*DEBUG, "name=run"]) == 0
    assert "resuming after step" in capfd.readouterr().out
    assert same(final_weights(folder), final_weights(finished))
    strip = lambda path: [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines(path)]  # noqa: E731
    assert strip(folder / "metrics.jsonl") == strip(finished / "metrics.jsonl")
    assert strip(folder / "evaluations.jsonl") == strip(finished / "evaluations.jsonl")


def test_logs_of_a_run_without_a_checkpoint_are_cleared_by_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        main([*DEBUG, "name=run"])
    assert main([*DEBUG, "name=run", "eval.limit=8", "train.max_steps=1"]) == 0
    evaluations = lines(tmp_path / "runs" / "run" / "evaluations.jsonl")
    assert [(line["model"], line["rewards"]["count"]) for line in evaluations] == [("teacher", 8), ("student", 8), ("student", 8)]


def test_finished_run_without_checkpoints_is_still_finished(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "run")
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    assert main([*DEBUG, "name=run"]) == 0
    assert "finished; nothing to do" in capfd.readouterr().out
    assert main([*DEBUG, "name=run", "optim.lr=1"]) == 64


def test_changed_number_of_prompts_per_step_is_refused(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished.parent.parent)
    assert main([*DEBUG, "name=run", "train.batch_size=8"]) == 64
    error = capfd.readouterr().err
    assert "prompts per step were 4, are 8" in error and "train.batch_size" in error


def test_a_finished_run_is_not_that_of_other_data_or_another_reward(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{number}+27=", "answer": "1"} for number in range(10, 40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "import opd\n\n@opd.reward\ndef judge(completion, answer):\n    return float(answer in completion)\n"
    Path("judging.py").write_text(code)
    words = [*DEBUG, "name=run", "data.train_path=rows.jsonl", "eval.reward=judging:judge", "train.max_steps=1", "eval.limit=4"]
    assert main(words) == 0
    assert main(words) == 0
    assert "nothing to do" in capfd.readouterr().out
    Path("judging.py").write_text(code.replace("in completion", "not in completion"))
    assert main(words) == 64
    assert "runs/run contains another run: eval.reward has other content than it had. Set another name" in capfd.readouterr().err
    assert main([*words, "resume_force=true"]) == 64
    assert "its 1 steps are done, so other options change nothing" in capfd.readouterr().err
    Path("judging.py").write_text(code)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    assert main(words) == 64
    assert "data.train_path has other content than it had" in capfd.readouterr().err


def test_a_finished_run_is_not_that_of_another_model_in_the_same_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for role in ("student", "teacher"):
        shutil.copytree(PACKAGE / f"assets/tiny-{role}", role)
    words = [*DEBUG, "name=run", "model.path=./student", "teacher.path=./teacher", "train.max_steps=1", "eval.limit=4"]
    assert main(words) == 0
    shutil.copytree("student", "copy")
    shutil.rmtree("student")
    shutil.copytree("copy", "student", copy_function=shutil.copyfile)  # the same files with other times
    assert main(words) == 0
    assert "nothing to do" in capfd.readouterr().out
    for role in ("student", "teacher"):
        file = Path(role) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\0\0\1\1")
        assert main(words) == 64
        assert f"{'model' if role == 'student' else 'teacher'}.path has other content than it had" in capfd.readouterr().err
    assert cli.main(["eval", "runs/run", "eval.limit=4"]) == 0
    shown = capfd.readouterr().err
    assert "warning: teacher.path=./teacher: has other content than when the run was trained" in shown
    assert "warning: model.path=./student: has" in shown and "data" not in shown


def test_a_folder_of_runs_becomes_no_run(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished.parent.parent)
    assert main([*DEBUG, "hydra.run.dir=runs"]) == 64
    assert "hydra.run.dir=" in (shown := capfd.readouterr().err) and "runs in it; name a folder there" in shown
    assert not (finished.parent / "status.json").exists() and not (finished.parent / ".hydra").exists()


def test_a_gradient_of_0_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [*DEBUG, "name=run", "train.max_steps=1", "eval=kl", "eval.kl_prompts=0", "sampling.temperature=1e-4"]
    assert main(words) == 0
    assert "the gradient of step 1 is 0: it trains nothing; raise sampling.temperature" in capfd.readouterr().out


def test_a_run_that_was_killed_before_it_was_called_done_finishes(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "runs" / "run")
    run = tmp_path / "runs" / "run"
    (run / "status.json").write_text(json.dumps({"status": "running", "reason": "", "exit_code": None}))
    (run / "report.html").unlink()
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run"]) == 0
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert (run / "report.html").is_file() and same(final_weights(run), final_weights(finished))


def test_a_checkpoint_of_another_run_replaces_no_run(finished, tmp_path, monkeypatch, capfd):
    shutil.copytree(finished, tmp_path / "runs" / "run")
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "runs/run/metrics.jsonl").read_text()
    assert main([*DEBUG, "name=run", f"resume={finished}/checkpoints/step_000006"]) == 64
    assert "runs/run already contains another run; set another name" in capfd.readouterr().err
    assert main([*DEBUG, "name=run", "resume=runs/run/checkpoints/step_000006", "train.max_steps=7", "resume_force=true"]) == 0
    assert (tmp_path / "runs/run/metrics.jsonl").read_text().startswith(before)


def test_an_interruption_between_cutting_checkpoints_and_logs_leaves_no_checkpoint_beyond_its_log(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2, keep_best=False)
    for step in (2, 4):
        checkpoints.path(step).mkdir(parents=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "rewind", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cut_logs((2, 0), RunFolder(tmp_path), checkpoints)
    assert checkpoints.moments() == [(2, 0)]


def test_lines_that_a_full_disk_refused_are_cut_like_the_others(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 1})
    folder.unwritten = {"metrics.jsonl": '{"step": 2}\n{"step": 3}\n'}
    folder.rewind(2)
    folder.append("metrics.jsonl", {"step": 3, "again": True})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    folder.unwritten = {"metrics.jsonl": '{"step": 4}\n'}
    folder.append_unwritten()
    assert lines(tmp_path / "metrics.jsonl")[-1] == {"step": 4} and not folder.unwritten


def test_another_teacher_is_evaluated_again(finished, tmp_path, monkeypatch, capfd):
    shutil.copytree(finished, tmp_path / "runs" / "run")
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "teacher.path=bundled:tiny-student", "train.max_steps=7", "resume_force=true"]) == 0
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["reward_teacher"] < 0.9 < json.loads((finished / "summary.json").read_text())["reward_teacher"]
    assert summary["reward_teacher"] == pytest.approx(summary["reward_before"], abs=0.01), "it is the student before training"


def test_a_learning_rate_that_is_not_set_follows_from_the_model(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [*DEBUG, "name=run", "train.max_steps=2", "optim.lr=null", "optim.schedule=constant", "optim.warmup_steps=0", "eval.limit=2"]
    assert main(words) == 0
    assert "learning rate 0.0003\n" in capfd.readouterr().out
    assert [line["optim/lr"] for line in lines(Path("runs/run/metrics.jsonl"))] == [3e-4, 3e-4]
    stored = json.loads(Path("runs/run/run.json").read_text())
    assert stored["config"]["optim"]["lr"] is None and stored["choices"]["lr"] == 3e-4
    assert main(words) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert main([*words, "train.max_steps=3", "resume_force=true"]) == 0
    assert lines(Path("runs/run/metrics.jsonl"))[-1]["optim/lr"] == 3e-4


def test_run_resumes_from_a_named_checkpoint(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = finished / "checkpoints" / "step_000004"
    assert main([*DEBUG, "name=other", f"resume={start}"]) == 0
    assert same(final_weights(tmp_path / "runs" / "other"), final_weights(finished))
    summary = json.loads((tmp_path / "runs" / "other" / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["graded_tokens"] == json.loads((finished / "summary.json").read_text())["graded_tokens"]


def test_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        main([*DEBUG, "name=run"])
    folder = tmp_path / "runs" / "run"
    newest = max((folder / "checkpoints").glob("step_*"))
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    assert main([*DEBUG, "name=run"]) == 0
    assert (folder / "checkpoints" / f"bad_{newest.name}").is_dir()
    assert same(final_weights(folder), final_weights(finished))


def test_run_with_damaged_checkpoints_only_is_refused_and_nothing_is_deleted(finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "status.json").write_text('{"status": "failed"}')
    for manifest in (tmp_path / "runs" / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert main([*DEBUG, "name=run"]) == 74
    assert "no checkpoint is usable" in capfd.readouterr().err
    kept = sorted(path.parent.name for path in (tmp_path / "runs" / "run" / "checkpoints").glob("*/model.safetensors"))
    assert kept == [f"bad_{path.name}" for path in sorted((finished / "checkpoints").glob("step_*"))]


@pytest.mark.parametrize(
    ("overrides", "code", "part"),
    [
        (["model.path=./nowhere"], 64, "there is no such folder"),
        (["model=qwen05b"], 64, "experiment=tiny needs no download"),
        (["data.answer=solution"], 65, "data.answer=COLUMN"),
        (["data.prompt=text"], 65, "it has answer, prompt: set data.prompt=COLUMN"),
        (['data.answer_after="####"'], 65, "no evaluation prompt has an answer"),
        (["data.max_prompt_tokens=2"], 65, "data.max_prompt_tokens=2"),
        (["eval.reward=os:system"], 64, "opd.reward"),
        (["eval.reward=nmber"], 64, "number"),
        (["ppo.estimator=topk", "ppo.k=262"], 64, "ppo.k=262: there are only 261 tokens in the vocabulary; set ppo.k"),
        (["track=wandb"], 64, "pip install 'opd[track]'"),
        (["resume=no/such/checkpoint"], 64, "there is no such checkpoint"),
        (["resume=."], 74, "not a usable checkpoint"),
        (["hydra.run.dir=/proc/nowhere"], 74, "/proc/nowhere"),
        pytest.param(
            ["device=cuda"], 64, "no such device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
        ),
    ],
)
def test_mistake_is_one_line_with_its_exit_code(tmp_path, monkeypatch, capfd, overrides, code, part):
    monkeypatch.chdir(tmp_path)
    if overrides == ["track=wandb"]:
        monkeypatch.setattr("opd.training.logs.find_spec", lambda name: None)
    assert main(["experiment=debug", "name=run", *overrides]) == code
    error = capfd.readouterr().err
    assert part in error and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs/*")), "a run that is refused leaves no folder"


def test_refused_resume_leaves_the_run_as_it_was(finished, tmp_path, monkeypatch, capfd):
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}

    def refuse(*arguments):
        raise DataError("data.answer=x: no such column")

    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(finished, tmp_path / "runs" / "run"))
    (folder / "status.json").write_text('{"status": "preempted", "reason": "stopped by SIGTERM", "exit_code": 75}')
    monkeypatch.setattr("opd.training.runner.build", refuse)
    before = content()
    assert main([*DEBUG, "name=run", "checkpoint.every=7"]) == 65
    assert content() == before
    assert "no such column" in capfd.readouterr().err


def test_failure_before_training_is_kept_with_its_log(tmp_path, monkeypatch, capfd):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opd.training.runner.build", fail)
    assert main([*DEBUG, "name=run"]) == 70
    assert json.loads((tmp_path / "runs/run/status.json").read_text())["exit_code"] == 70
    assert "Traceback" in (tmp_path / "runs/run/train.log").read_text()


def test_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").write_text("a file in the way")
    monkeypatch.setattr("opd.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main([*DEBUG, "name=run"]) == 74
    assert "Traceback" not in capfd.readouterr().err


def test_rows_that_are_left_out_are_on_the_screen_in_the_summary_and_in_the_report(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+{i}=" + "9" * 40 * (i % 2), "answer": "1"} for i in range(10, 50)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data.train_path=p.jsonl", "data.max_prompt_tokens=32", "train.max_steps=1", "eval.kl_prompts=0"]
    assert main([*DEBUG, "name=run", *data]) == 0
    shown = capfd.readouterr().out
    assert "warning: data.max_prompt_tokens=32: 18 of 36 training prompts" in shown and "18 of 36 prompts" in shown
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["prompts"], summary["rows"]) == (18, 36)
    assert "18 of 36" in (tmp_path / "runs" / "run" / "report.html").read_text()


def test_without_answers_only_the_kl_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(10, 60)))
    data = ["data=jsonl", "data.train_path=p.jsonl", "data.answer=null", "eval=kl", "eval.kl_max_new_tokens=8"]
    assert main([*DEBUG, "name=run", *data]) == 0
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["reward_after"] is None and summary["gap_closed"] is None and summary["eval_kl_after"] > 0


def test_custom_reward(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import opd\n\n@opd.reward\ndef always(completion, answer):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "eval.reward=mine:always"]) == 0
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["reward_after"] == 0.25


@pytest.mark.parametrize(
    "options", [["ppo.estimator=exact"], ["ppo.estimator=topk", "ppo.divergence=jsd"], ["ppo.reduction=sequence", "model.dtype=bfloat16"]]
)
def test_other_objectives_and_bf16_run(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "train.max_steps=2", *options]) == 0


def test_non_finite_step_is_skipped_and_logged_as_null(tmp_path, monkeypatch):
    from opd.training.step import Step

    monkeypatch.chdir(tmp_path)
    calls = []
    original = Step.teacher_scores

    def scores(self, part):
        calls.append(1)
        return {name: logp * (float("nan") if len(calls) == 2 else 1.0) for name, logp in original(self, part).items()}

    monkeypatch.setattr(Step, "teacher_scores", scores)
    assert main([*DEBUG, "name=run", "train.max_steps=3", "ppo.steps=1"]) == 0
    metrics = lines(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [line["optim/skipped"] for line in metrics] == [0, 1, 0]
    assert metrics[1]["loss"] is None and metrics[2]["loss"] is not None
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["reverse_kl_last"] is not None


def test_sweep_runs_every_member(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", *DEBUG, "train.max_steps=1", "optim.lr=1e-4,2e-4", "name=sweep"]) == 0
    assert len(list((tmp_path / "sweeps" / "sweep").glob("*/summary.json"))) == 2


def test_tensorboard_gets_the_metrics(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "train.max_steps=1", "track=tensorboard"]) == 0
    assert list((tmp_path / "runs" / "run").rglob("events.out.tfevents.*"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that transformers is leaving
def test_adapters_share_the_base_with_the_teacher_and_are_merged_in_the_export(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from opd.config.compose import PACKAGE

    monkeypatch.chdir(tmp_path)
    base = str(PACKAGE / "assets" / "tiny-teacher")
    options = ["lora=default", "lora.rank=4", f"model.path={base}", f"teacher.path={base}", "optim.lr=1e-2", "train.max_steps=2"]
    assert main([*DEBUG, "name=refused", *options]) == 64
    loaded = []
    from opd.models import load as models

    original = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: loaded.append(args[1]) or original(*args))
    assert main([*DEBUG, "name=run", *options, "teacher.system='27'", "checkpoint.every=1"]) == 0
    assert loaded == ["model"]  # one copy
    folder = tmp_path / "runs" / "run"
    from safetensors.torch import load_file

    saved = load_file(folder / "checkpoints" / "step_000002" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    before, after = AutoModelForCausalLM.from_pretrained(base).float().state_dict(), final_weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    first = lines(folder / "evaluations.jsonl")[1]
    assert first["model"] == "student" and first["kl"] > 0.01  # the teacher's own prompt makes it another distribution


def test_default_job_runs_on_local_copies_of_model_and_gsm8k(tmp_path, monkeypatch):
    """Folders instead of the hub, output heads padded to different widths, the columns of GSM8K; but no bf16 copy, on any processor."""
    from opd.config.compose import PACKAGE

    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    for role, width in (("student", 264), ("teacher", 272)):
        model = AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / f"tiny-{role}")
        model.resize_token_embeddings(width, mean_resizing=False)
        model.generation_config.repetition_penalty = 1.1  # as in Qwen2.5; must not reach the sampler
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [
            {"question": f"Tom has {i} pens and buys 3. How many?", "answer": f"{i}+3=<<{i}+3={i + 3}>>{i + 3}\n#### {i + 3}"}
            for i in range(8)
        ]
        (tmp_path / "gsm8k" / "main" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["model.path=student", "teacher.path=teacher", "data.path=gsm8k/main", "data.subset=null", "sampling.dtype=trainer"]
    short = ["train.max_steps=2", "sampling.max_new_tokens=6", "eval.max_new_tokens=6", "eval.kl_max_new_tokens=4", "eval.kl_prompts=4"]
    assert main([*options, *short, "device=cpu"]) == 0
    folder = tmp_path / "runs" / "student-from-teacher-on-gsm8k"
    evaluations = lines(folder / "evaluations.jsonl")
    assert {line["rewards"]["count"] for line in evaluations} == {8}
    assert max(line["engine_gap"] for line in lines(folder / "metrics.jsonl")) < 1e-4
    assert AutoModelForCausalLM.from_pretrained(folder / "final").get_output_embeddings().weight.shape[0] == 264


def test_untrained_tokens_have_null_scores_in_the_stored_rollouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "name=run", "ppo.loss_prefix=2", "train.max_steps=1"]) == 0
    folder = tmp_path / "runs" / "run"
    records = [json.loads(line) for file in (folder / "rollouts").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert any(len(record["ids"]) > 2 for record in records)
    for record in records:
        scored = min(2, len(record["ids"]))
        for name in ("student_logp", "teacher_logp"):
            assert len(record[name]) == len(record["ids"]) and all(value is None for value in record[name][scored:])
            assert all(value is not None for value in record[name][:scored])


@pytest.mark.long
def test_resumed_run_keeps_halved_micro_batches_until_another_size_is_configured(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    forward, options = Policy.forward, [*DEBUG, "train.max_steps=2", "checkpoint.every=1", "checkpoint.keep_last=9", "eval.steps=0"]
    with pytest.MonkeyPatch.context() as patch:

        def tight(self, inputs, loss):
            if inputs.ids_BT.numel() > 30:
                raise torch.OutOfMemoryError("made up")
            return forward(self, inputs, loss)

        patch.setattr(Policy, "forward", tight)
        assert main([*options, "name=first", "train.max_tokens_per_micro_batch=60"]) == 0
    first = f"resume={tmp_path / 'runs/first/checkpoints/step_000001'}"

    def resume(name: str, asked: int) -> tuple[int, str]:
        capfd.readouterr()
        assert main([*options, f"name={name}", first, f"train.max_tokens_per_micro_batch={asked}"]) == 0
        state = json.loads((tmp_path / f"runs/{name}/checkpoints/step_000002/state.json").read_text())
        return state["choices"]["max_tokens"], capfd.readouterr().out

    size, output = resume("same", 60)
    assert size == 30 and "micro-batches of 30 tokens" in output and "train.max_tokens_per_micro_batch=60" in output
    for asked in (50, 80):
        size, output = resume(f"other{asked}", asked)
        assert size == asked and "micro-batches of" not in output
