"""The doctor tells what would go wrong before a run begins, and trains and writes nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from opd import errors
from opd.api import from_options
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.doctor import first, machine, rows, tokens
from opd.doctor.findings import Finding, Status
from opd.doctor.footprint import Footprint, micro_batch, sampling_bytes, shape_of
from opd.training.evaluate import interval

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str]) -> Any:
    """`opd doctor --json` with the words: its exit code and what it found, by the name of the check."""

    def look(*words: str) -> tuple[int, dict[str, dict[str, str]], dict[str, Any]]:
        code = cli.main(["doctor", "experiment=debug", "device=cpu", "--json", *words])
        shown = capfd.readouterr()
        report = json.loads(shown.out)
        assert report["ready"] == (code == errors.OK), shown.err
        assert (shown.err == "") == report["ready"]
        return code, {finding["check"]: finding for finding in report["findings"]}, report

    return look


def copy_of(name: str, into: Path, **changes: dict[str, Any]) -> str:
    """A bundled model in a folder of its own, with keys of its JSON files set (None takes them out)."""
    shutil.copytree(PACKAGE / "assets" / name, into)
    for stem, values in changes.items():
        file = into / f"{stem}.json"
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(into)


def test_a_run_that_is_ready(doctor: Any, tmp_path: Path) -> None:
    code, found, report = doctor("--prompts", "64")
    assert code == errors.OK
    assert {finding["status"] for finding in found.values()} == {"ok"}, found
    assert found["teacher = student"]["what"].startswith("KL 0.0e+00 nats/token on 4 prompts")
    assert "256" in found["end of sequence"]["what"] and "<|pad|>" in found["padding of the student"]["what"]
    assert found["reward of reference answers"]["what"].endswith("gives 1 for each of 200")
    assert report["figures"]["memory"]["peak"] > 0 and report["figures"]["step"]["seconds"]["sample"] > 0
    assert report["rendered"]["student"] == report["rendered"]["teacher"] != ""
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_the_table_for_people_and_the_line_for_the_failure(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "experiment=debug", "device=cpu", "--prompts", "0"]
    assert cli.main(words) == errors.OK
    assert "ready" in capfd.readouterr().out
    assert cli.main([*words, "teacher.path=./nowhere"]) == errors.NOT_READY
    shown = capfd.readouterr()
    assert "FAIL" in shown.out
    assert shown.err.startswith("opd: error: not ready: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["modle=x"], "did you mean model?"),
        (["optim.lr=-1"], "must be above 0"),
        (["--prompts", "-1"], "opd doctor --help"),
        (["-m", "seed=0,1"], "one config at a time"),
    ],
)
def test_what_does_not_compose_is_one_line(words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *words]) == errors.USAGE
    shown = capfd.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_help_is_the_doctors_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "doctor"]) == errors.OK
    assert "Usage: opd doctor [--json] [--prompts N]" in capfd.readouterr().out


def test_a_swapped_tokenizer(doctor: Any, tmp_path: Path) -> None:
    teacher = copy_of("tiny-teacher", tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    file.write_text(file.read_text().replace('"A": 32', '"A": X').replace('"B": 33', '"B": 32').replace('"A": X', '"A": 33'))
    code, found, _ = doctor(f"teacher.path={teacher}")
    assert code == errors.NOT_READY
    assert found["tokenizers"]["status"] == "fail" and "'A' (student 32, teacher 33)" in found["tokenizers"]["what"]
    assert "take a teacher of the student's family" in found["tokenizers"]["remedy"]
    assert "data" not in found and "memory" not in found, "what builds on equal ids is not looked at"


def test_another_end_of_sequence(doctor: Any, tmp_path: Path) -> None:
    teacher = copy_of("tiny-teacher", tmp_path / "t", config={"eos_token_id": 255}, generation_config={"eos_token_id": 255})
    _, found, _ = doctor(f"teacher.path={teacher}", "--prompts", "0")
    assert found["end of sequence"]["status"] == "warn"
    assert "(255)" in found["end of sequence"]["what"] and "may never ask the student to stop" in found["end of sequence"]["what"]


def test_a_template_whose_turns_end_with_something_else(doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s")
    template = tmp_path / "s" / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|pad|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _, found, _ = doctor(f"model.path={student}", "--prompts", "0")
    assert found["end of a turn of the student"]["status"] == "warn"
    assert "'<|pad|>'" in found["end of a turn of the student"]["what"]
    assert found["chat templates"]["status"] == "warn", "the teacher renders it otherwise"


def test_a_missing_pad(doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s", tokenizer_config={"pad_token": None})
    code, found, _ = doctor(f"model.path={student}", "--prompts", "0")
    assert code == errors.NOT_READY, "transformers makes one up for this kind of model, with an id that the model does not have"
    assert "'<|endoftext|>' (student 261, teacher none)" in found["tokenizers"]["what"]
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    assert tokens.check_pad(tokenizer, "student")[0].status is Status.ok
    tokenizer.pad_token = None
    (bare,) = tokens.check_pad(tokenizer, "student")
    assert bare.status is Status.warn and "no padding token; '<|end|>' stands in" in bare.what


@pytest.mark.parametrize(
    ("template", "status", "said"),
    [
        ("hello", "fail", "does not hold the prompt's text"),
        ("{{ messages[0].content }}", "warn", "does not open the assistant's turn"),
    ],
)
def test_a_wrong_template(template: str, status: str, said: str, doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s")
    (tmp_path / "s" / "chat_template.jinja").write_text(template)
    code, found, report = doctor(f"model.path={student}", "--prompts", "0")
    said_of = [finding for finding in report["findings"] if finding["check"] == "chat template of the student"]
    assert said_of[0]["status"] == status and said in said_of[0]["what"]
    assert found["chat templates"]["status"] == "warn" and report["rendered"]["student"] != report["rendered"]["teacher"]
    assert (code == errors.NOT_READY) == (status == "fail")


def test_a_thinking_switch_of_one_side(doctor: Any, tmp_path: Path) -> None:
    teacher = copy_of("tiny-teacher", tmp_path / "t")
    file = tmp_path / "t" / "chat_template.jinja"
    file.write_text(file.read_text() + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}")
    _, found, _ = doctor(f"teacher.path={teacher}", "--prompts", "0", "+data.chat_template_kwargs.enable_thinking=true")
    assert found["thinking"]["status"] == "warn" and "enable_thinking=True" in found["thinking"]["what"]


def test_a_hidden_repetition_penalty(doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s", generation_config={"repetition_penalty": 1.1, "do_sample": True, "top_k": 20})
    _, found, _ = doctor(f"model.path={student}", "--prompts", "0")
    found = found["generation_config of the student"]
    assert found["status"] == "warn" and "repetition_penalty=1.1, top_k=20: opd follows none of it" in found["what"]


def test_a_teacher_that_is_worse(doctor: Any) -> None:
    code, found, report = doctor("model.path=bundled:tiny-teacher", "teacher.path=bundled:tiny-student", "eval.limit=64", "--prompts", "64")
    assert code == errors.NOT_READY
    assert found["rewards before training"]["status"] == "fail"
    assert "the teacher is worse than the student" in found["rewards before training"]["remedy"]
    assert len(report["figures"]["rewards"]["teacher"]) == 64


def test_a_reward_that_never_fires(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import opd\n\n@opd.reward\ndef never(completion, answer):\n    return 0.0\n")
    code, found, _ = doctor("eval.reward=mine:never")
    assert code == errors.NOT_READY
    assert found["reward of reference answers"]["status"] == "fail" and "gives 1 for 0 of" in found["reward of reference answers"]["what"]
    assert "time" not in found, "models are not loaded for it"


def test_a_reward_of_silence_and_one_that_fails(doctor: Any, tmp_path: Path) -> None:
    reward = "import opd\n\n@opd.reward\ndef always(completion, answer):\n    return 1.0\n"
    (tmp_path / "yes.py").write_text(reward)
    code, found, _ = doctor("eval.reward=yes:always")
    assert code == errors.NOT_READY and "gives up to 1 for saying nothing" in found["reward of empty texts"]["what"]
    (tmp_path / "bad.py").write_text(reward.replace("1.0", "1 / 0"))
    code, found, _ = doctor("eval.reward=bad:always")
    assert code == errors.NOT_READY and "ZeroDivisionError" in found["reward"]["what"]


def test_data_that_cannot_be_had_or_are_mostly_left_out(doctor: Any, tmp_path: Path) -> None:
    code, found, _ = doctor("data.answer=solution")
    assert code == errors.NOT_READY and "has no such column" in found["data"]["what"]
    lines = [{"prompt": f"{i}+1=" + "9" * 40 * (i % 2), "answer": "1"} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ["data=jsonl", "data.train_path=p.jsonl", "data.eval_path=p.jsonl", "data.max_prompt_tokens=20"]
    code, found, _ = doctor(*data, "--prompts", "0")
    assert found["training prompts"]["status"] == "warn" and "10 of 20 left out" in found["training prompts"]["what"]
    assert found["held out"]["status"] == "warn" and "10 of 10 evaluation prompts" in found["held out"]["what"]


def test_a_run_that_does_not_fit_is_told_before_its_models_are_loaded(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.doctor.free_memory", lambda device: 20 * 2**20)
    monkeypatch.setattr("opd.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    code, found, _ = doctor("train.batch_size=200")
    assert code == errors.NOT_READY
    assert found["memory"]["status"] == "fail" and "activations are the most" in found["memory"]["remedy"]


def test_a_missing_package_of_the_tracker(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("opd.training.logs.find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest))
    code, found, _ = doctor("track=wandb", "--prompts", "0")
    assert code == errors.NOT_READY and "pip install" in found["tracker"]["remedy"] + found["tracker"]["what"]


def test_the_trial_step_updates_and_changes_nothing(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[float] = []

    def watched(trainer: Any) -> first.Step:
        before = [weight.detach().clone() for weight in trainer.student.parameters()]
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: updates.append(trainer.optimizer.param_groups[0]["lr"]))
        step = trial(trainer)
        assert all(torch.equal(*pair) for pair in zip(before, trainer.student.parameters(), strict=True))
        assert not trainer.optimizer.state and all(weight.grad is None for weight in trainer.student.parameters())
        return step

    trial = first.trial_step
    monkeypatch.setattr(first, "trial_step", watched)
    assert doctor("--prompts", "0")[0] == errors.OK
    assert updates == [0.0, 0.0], "a short step is taken twice"


def test_verdicts_on_rewards() -> None:
    def verdict(student: list[float], teacher: list[float]) -> Finding:
        (found,) = first.check_rewards(student, teacher)
        return found

    assert "start with SFT" in verdict([0.0] * 20, [1.0] * 20).remedy
    assert "neither is ever right" in verdict([0.0] * 20, [0.0] * 20).remedy
    assert verdict([1.0, 0.0] * 10, [1.0] * 20).status is Status.ok
    assert verdict([1.0] * 20, [0.0] * 20).status is Status.fail
    few = verdict([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    assert few.status is Status.warn and "not better" in few.remedy, "three prompts do not decide it"
    low, high = interval([-1.0] * 20)
    assert low == high == -1


def test_verdicts_on_the_first_step() -> None:
    def verdict(**values: float) -> dict[str, Finding]:
        step = first.Step({}, {"reverse_kl": 0.5, "entropy": 1.0, "truncated": 0.0, "length": 9.0, **values}, [])
        return {finding.check: finding for finding in first.check_start(step, Config())}

    assert all(finding.status is Status.ok for finding in verdict().values())
    noisy = verdict(reverse_kl=4.0)["distance to the teacher"]
    assert noisy.status is Status.warn
    assert "the reverse KL is noisy: lower sampling.temperature or sampling.max_new_tokens" in noisy.remedy
    assert "raise sampling.temperature" in verdict(entropy=0.001)["distance to the teacher"].remedy
    assert "raise sampling.max_new_tokens" in verdict(truncated=0.9)["truncation"].remedy


def test_a_reward_that_misses_some_reference_answers_is_a_warning() -> None:
    prompts = [type("Prompt", (), {"answer": answer})() for answer in ("1", "many")]
    (found,) = rows.of_reference("number", prompts, [1.0, None])
    assert found.status is Status.warn and "1 of 2; the answer 'many' gets None" in found.what


def test_memory_is_compared_with_what_is_free() -> None:
    gib = 2**30
    needed = Footprint({"the process": gib, "student": gib, "optimizer": 2 * gib}, {"KV cache": gib}, {"activations": 3 * gib})
    assert needed.peak == 7 * gib
    statuses = [machine.check_memory(needed, free * gib, torch.device("cpu"))[0].status for free in (5, 6.5, 8)]
    assert statuses == [Status.fail, Status.warn, Status.ok]


def test_the_largest_micro_batch_is_that_of_the_run() -> None:
    config = Config()
    config.train.batch_size, config.sampling.n, config.sampling.max_new_tokens = 2, 3, 10
    prompts = [Prompt(index, (1,) * 5, "") for index in range(4)]
    assert micro_batch(config, prompts, torch.device("cpu")) == (6, 15, False)
    config.train.max_tokens_per_micro_batch = 45
    assert micro_batch(config, prompts, torch.device("cpu")) == (3, 15, True)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [["train.batch_size=4", "sampling.max_new_tokens=16"]])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(setting: list[str], tmp_path: Path) -> None:
    weights = ROOT / "models"
    if not (weights / "student").is_dir():
        pytest.skip("scripts/fetch_smollm2 models was not run")
    pytest.importorskip("reasoning_gym")
    models = [f"model.path={weights / 'student'}", f"teacher.path={weights / 'teacher'}", "device=cpu"]
    short = ["train.max_steps=2", "eval.kl_prompts=4", "eval.kl_max_new_tokens=8", "name=run"]
    words = ["experiment=smollm2", *models, *short, *setting]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    train = subprocess.run([sys.executable, "-m", "opd", "train", *words], env=environment, capture_output=True, text=True, timeout=300)
    assert train.returncode == 0, train.stderr
    looked = subprocess.run([sys.executable, "-m", "opd", "doctor", *words, "--json"], capture_output=True, text=True, timeout=300)
    measured = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["peak_memory_bytes"]
    assert json.loads(looked.stdout)["figures"]["memory"]["peak"] == pytest.approx(measured, rel=0.15)


def test_an_evaluation_of_few_prompts_needs_no_cache_for_many() -> None:
    config = from_options({"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher", "eval.batch_size": 64})
    student, _ = shape_of(config.model, "model")
    prompts = [Prompt(0, (2, 3), "")]
    few, many, none = (sampling_bytes(config, student, student, prompts, count)["KV cache"] for count in (4, 640, 0))
    step = min(config.sampling.batch_size, config.train.batch_size * config.sampling.n) * (2 + config.sampling.max_new_tokens) * student.kv
    assert many == 64 * (2 + config.eval.max_new_tokens) * student.kv and few == none == step
