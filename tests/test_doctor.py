"""`opd doctor` finds what would go wrong before a run starts, trains nothing and leaves no files behind."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from opd import errors
from opd.api import from_options
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.options import PPOConfig, Truncated
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rewards import make_grader
from opd.doctor import candidates, check_models, first_step, machine, rows, tokens
from opd.doctor.findings import Finding, Report, Status
from opd.doctor.machine import REMEDIES
from opd.models.memory import Memory
from opd.training.evaluation import count_evaluations
from opd.training.tokens import Tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `opd doctor --json` with more arguments; return its exit code, the findings by check, and the whole report."""

    def run(*words: str) -> tuple[int, dict[str, dict[str, str]], dict[str, Any]]:
        code = cli.main(["doctor", "experiment=debug", "device=cpu", "--json", *words])
        output = capfd.readouterr()
        report = json.loads(output.out)
        assert report["ready"] == (code == errors.OK), output.err
        assert (output.err == "") == report["ready"]
        return code, {finding["check"]: finding for finding in report["findings"]}, report

    return run


def copy_of(name: str, into: Path, **changes: dict[str, Any]) -> str:
    """Copy a bundled model and change keys of its JSON files; None removes a key."""
    shutil.copytree(PACKAGE / "assets" / name, into)
    for stem, values in changes.items():
        file = into / f"{stem}.json"
        content = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return str(into)


def test_a_ready_run_has_no_warnings_and_leaves_no_files(doctor: Any, tmp_path: Path) -> None:
    code, found, report = doctor("--prompts", "64")
    assert code == errors.OK
    assert {finding["status"] for finding in found.values()} == {"ok"}, found
    assert found["teacher = student"]["what"].startswith("KL 0.0e+00 nats/token on 4 prompts")
    assert "256" in found["end of sequence"]["what"] and "<|pad|>" in found["padding of the student"]["what"]
    assert "50" in found["reward of reference answers"]["what"]
    memory, step = report["figures"]["memory"], report["figures"]["step"]
    assert memory["peak"] > memory["resident"]["the process"] > 0 and memory["free"] > 0
    assert step["seconds"]["sample"] > 0 and step["reverse_kl"] > 0
    assert report["rendered"]["student"] == report["rendered"]["teacher"] != ""
    assert list(tmp_path.iterdir()) == []


def test_table_for_people_and_one_line_for_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "experiment=debug", "device=cpu", "--prompts", "0"]
    assert cli.main(words) == errors.OK
    assert "ready" in capfd.readouterr().out
    assert cli.main([*words, "teacher.path=./nowhere"]) == errors.NOT_READY
    output = capfd.readouterr()
    assert "FAIL" in output.out
    assert output.err.startswith("opd: error: not ready: ") and output.err.count("\n") == 1


def test_a_run_is_sent_to_the_verbs_for_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/status.json").write_text("{}")
    assert cli.main(["doctor", "one"]) == errors.USAGE
    assert "opd eval one" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["modle=x"], "did you mean model?"),
        (["optim.lr=-1"], "optim.lr=-1"),
        (["--prompts", "-1"], "opd doctor --help"),
        (["-m", "hydra/sweeper=optuna", "optim.lr=interval(1e-5,1e-4)"], "-m"),
    ],
)
def test_a_command_line_that_does_not_compose_is_one_line(
    words: list[str], remedy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *words]) == errors.USAGE
    output = capfd.readouterr()
    assert remedy in output.err and output.err.count("\n") == 1 and output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_first_member_of_a_sweep_is_read_as_by_train(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.main(["doctor", "-m", "experiment=debug", "teacher.path=~/none", "optim.lr=1e-4,1e-3"]) == errors.NOT_READY
    assert "teacher.path=/home/me/none: there is no such folder" in capfd.readouterr().out
    assert cli.main(["doctor", "-m", "experiment=debug", "optim.lrr=1e-4,1e-3", "train.max_step=2"]) == errors.USAGE
    err = capfd.readouterr().err
    assert "optim.lrr" in err and "train.max_step" in err


def test_help_shows_the_doctors_own_flags(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "doctor"]) == errors.OK
    assert "Usage: opd doctor [-m] [--json] [--prompts N] [--plan [MINUTES]]" in capfd.readouterr().out


def test_swapped_token_ids_fail_before_the_data_are_checked(doctor: Any, tmp_path: Path) -> None:
    teacher = copy_of("tiny-teacher", tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    file.write_text(file.read_text().replace('"A": 32', '"A": X').replace('"B": 33', '"B": 32').replace('"A": X', '"A": 33'))
    code, found, _ = doctor(f"teacher.path={teacher}")
    assert code == errors.NOT_READY
    assert found["tokenizers"]["status"] == "fail" and "'A' (student 32, teacher 33)" in found["tokenizers"]["what"]
    assert "teacher.path" in found["tokenizers"]["remedy"]
    assert not {"training prompts", "memory", "time"} & found.keys()


def test_different_end_of_sequence_warns(doctor: Any, tmp_path: Path) -> None:
    teacher = copy_of("tiny-teacher", tmp_path / "t", config={"eos_token_id": 255}, generation_config={"eos_token_id": 255})
    _, found, _ = doctor(f"teacher.path={teacher}", "--prompts", "0")
    assert found["end of sequence"]["status"] == "warn"
    assert "(255)" in found["end of sequence"]["what"] and "eos_token_id" in found["end of sequence"]["remedy"]


def test_template_that_ends_turns_with_another_token_warns(doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s")
    template = tmp_path / "s" / "chat_template.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|pad|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    _, found, _ = doctor(f"model.path={student}", "--prompts", "0")
    turn = found["end of a turn of the student"]
    assert turn["status"] == "warn" and "'<|pad|>'" in turn["what"] and "add 257 to eos_token_id" in turn["remedy"]
    assert found["chat templates"]["status"] == "warn", "the teacher renders the prompt differently"


def test_missing_padding_token_warns(doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s", tokenizer_config={"pad_token": None})
    code, found, _ = doctor(f"model.path={student}", "--prompts", "0")
    assert code == errors.OK, "transformers adds one for this kind of model, with an id that the model does not have: it is masked"
    assert "only the student has '<|endoftext|>'" in found["tokenizers"]["what"]
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    assert tokens.check_pad(tokenizer, "student")[0].status is Status.ok
    tokenizer.pad_token = None
    (missing,) = tokens.check_pad(tokenizer, "student")
    assert missing.status is Status.warn and "'<|end|>'" in missing.what and "pad_token" in missing.remedy


@pytest.mark.parametrize(
    ("template", "status", "what"),
    [
        ("hello", "fail", "does not contain the prompt's text"),
        ("{{ messages[0].content }}", "warn", "add_generation_prompt"),
    ],
)
def test_wrong_chat_template(template: str, status: str, what: str, doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s")
    (tmp_path / "s" / "chat_template.jinja").write_text(template)
    code, found, report = doctor(f"model.path={student}", "--prompts", "0")
    first = next(finding for finding in report["findings"] if finding["check"] == "chat template of the student")
    assert first["status"] == status and what in first["what"]
    assert found["chat templates"]["status"] == "warn" and report["rendered"]["student"] != report["rendered"]["teacher"]
    assert (code == errors.NOT_READY) == (status == "fail")


def test_thinking_switch_of_one_model_warns(doctor: Any, tmp_path: Path) -> None:
    teacher = copy_of("tiny-teacher", tmp_path / "t")
    file = tmp_path / "t" / "chat_template.jinja"
    file.write_text(file.read_text() + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}")
    _, found, _ = doctor(f"teacher.path={teacher}", "--prompts", "0", "+data.chat_template_kwargs.enable_thinking=true")
    assert found["thinking"]["status"] == "warn" and "enable_thinking=True" in found["thinking"]["what"]


def test_models_that_think_by_default_need_room_for_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    tokenizer.chat_template += "{% if enable_thinking %}{% endif %}"
    for kwargs, length, status in (({}, 256, Status.warn), ({}, 4096, Status.ok), ({"enable_thinking": False}, 256, Status.ok)):
        [found] = tokens.check_switches(tokenizer, tokenizer, kwargs, length)
        assert found.status is status and (status is Status.ok or "enable_thinking=false" in found.remedy)


def test_an_open_turn_unused_options_and_a_dropped_system_message_are_told() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    messages = [{"role": "user", "content": "1", "name": "n"}, {"role": "assistant", "content": "2"}]

    def findings(template: str) -> dict[str, Finding]:
        tokenizer.chat_template = template
        return {finding.check: finding for finding in tokens.check_templates(tokenizer, tokenizer, messages, config)[0]}

    config = Config()
    config.data.chat_template_kwargs, config.teacher.system = {"enable_thinking": False, "mode": "x"}, "hint"
    rendered = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ mode }}"
    found = findings(rendered)
    assert found["chat template of the student"].status is Status.warn and "continued" in found["chat template of the student"].what
    assert found["data.chat_template_kwargs"].what.endswith("does not use enable_thinking")
    assert found["fields of messages"].what.endswith("does not use name")
    assert "teacher.system" not in found
    dropped = findings(rendered.replace("in messages", "in messages if m.role != 'system'"))["teacher.system"]
    assert dropped.status is Status.fail and "teacher.system=null" in dropped.remedy


def test_repetition_penalty_in_generation_config_warns(doctor: Any, tmp_path: Path) -> None:
    student = copy_of("tiny-student", tmp_path / "s", generation_config={"repetition_penalty": 1.1, "do_sample": True, "top_k": 20})
    _, found, _ = doctor(f"model.path={student}", "--prompts", "0")
    finding = found["generation_config of the student"]
    assert finding["status"] == "warn" and finding["what"].startswith("repetition_penalty=1.1, top_k=20: ")


def test_teacher_worse_than_the_student_fails(doctor: Any) -> None:
    code, found, report = doctor("model.path=bundled:tiny-teacher", "teacher.path=bundled:tiny-student", "eval.limit=64", "--prompts", "64")
    assert code == errors.NOT_READY
    assert found["rewards before training"]["status"] == "fail"
    assert "take a better teacher" in found["rewards before training"]["remedy"]
    assert len(report["figures"]["rewards"]["teacher"]) == 50


def test_reward_that_is_never_1_fails_before_models_are_loaded(doctor: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import opd\n\n@opd.reward\ndef never(completion, answer):\n    return 0.0\n")
    code, found, _ = doctor("eval.reward=mine:never")
    assert code == errors.NOT_READY
    reward = found["reward of reference answers"]
    assert reward["status"] == "fail" and "gives 1 for 0 of" in reward["what"] and "eval.reward" in reward["remedy"]
    assert "time" not in found


def test_references_that_the_reward_cannot_judge_are_counted() -> None:
    prompts = [Prompt(place, (place,), "", (answer,)) for place, answer in enumerate(["1/2", "3", "\\sqrt{2}"])]
    config = Config()
    config.eval.reward = "number"
    finding = rows.check_reward(prompts, make_grader("number"), config)[0]
    assert finding.status is Status.warn and "1 of 3" in finding.what and "cannot judge 2" in finding.what
    assert "eval.reward=math" in finding.remedy


def test_reward_for_empty_completions_and_a_reward_that_raises_fail(doctor: Any, tmp_path: Path) -> None:
    reward = "import opd\n\n@opd.reward\ndef always(completion, answer):\n    return 1.0\n"
    (tmp_path / "yes.py").write_text(reward)
    code, found, _ = doctor("eval.reward=yes:always")
    assert code == errors.NOT_READY and found["reward of empty texts"]["status"] == "fail"
    (tmp_path / "bad.py").write_text(reward.replace("1.0", "1 / 0"))
    code, found, _ = doctor("eval.reward=bad:always")
    assert code == errors.NOT_READY and "ZeroDivisionError" in found["reward"]["what"]


def test_missing_column_fails_and_dropped_or_shared_prompts_warn(doctor: Any, tmp_path: Path) -> None:
    code, found, _ = doctor("data.answer=solution")
    assert code == errors.NOT_READY and found["data"]["status"] == "fail" and "solution" in found["data"]["what"]
    lines = [{"prompt": f"{i}+1=" + "9" * 40 * (i % 2), "answer": "1"} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ["data=jsonl", "data.train_path=p.jsonl", "data.eval_path=p.jsonl", "data.max_prompt_tokens=20"]
    code, found, _ = doctor(*data, "--prompts", "0")
    assert found["training prompts"]["status"] == "warn" and "10 of 20 left out" in found["training prompts"]["what"]
    assert "data.max_prompt_tokens=20" in found["training prompts"]["remedy"]
    assert found["held out"]["status"] == "warn" and "10 of 10 evaluation prompts" in found["held out"]["what"]


def test_what_keeps_a_run_from_learning_by_its_options_warns(doctor: Any) -> None:
    code, found, _ = doctor("--prompts", "0", "optim.warmup_steps=1000")
    assert code == errors.OK and found["learning rate"]["status"] == "warn"
    assert found["learning rate"]["remedy"] == "set optim.warmup_steps=0"
    finding, *_ = rows.check_prompts([Prompt(0, (1,), "1+1="), Prompt(1, (1,), "")], [])
    assert finding.status is Status.warn and finding.what == "1 of 2 training prompts have no text and are trained on all the same"


def test_more_tokens_than_the_vocabulary_has_fail(doctor: Any) -> None:
    code, found, _ = doctor("--prompts", "0", "ppo.estimator=topk", "ppo.k=262")
    assert code == errors.NOT_READY and found["models"]["status"] == "fail"
    assert "ppo.k=262: there are only 261 tokens" in found["models"]["what"] and "set ppo.k" in found["models"]["remedy"]


def test_too_little_memory_fails_before_models_are_loaded(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.doctor.free_memory", lambda device: 20 * 2**20)
    monkeypatch.setattr("opd.models.load.load_model", lambda *_: pytest.fail("a model was loaded"))
    code, found, _ = doctor("train.batch_size=200")
    assert code == errors.NOT_READY
    assert found["memory"]["status"] == "fail" and "train.max_tokens_per_micro_batch" in found["memory"]["remedy"]


@pytest.mark.parametrize(
    ("option", "value", "package"),
    [("model.adapter", "x", "peft"), ("teacher.adapter", "x", "peft"), ("teacher.quantization", "nf4", "bitsandbytes"),
     ("optim.name", "adamw8bit", "bitsandbytes")],
)  # fmt: skip
def test_a_missing_package_is_named_with_the_option_that_needs_it(option: str, value: str, package: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == package else name)
    (found,) = [finding for finding in machine.check_packages(from_options({option: value})) if finding.check == "packages"]
    assert option in found.remedy and "pip install" in found.remedy and package in found.what


def test_a_worse_teacher_is_not_ranked_higher_for_a_smaller_overlap() -> None:
    def score(gap: float | None, overlap: float) -> float:
        return candidates.Candidate("t", True, "", gap, 1.0, 0.5, overlap, 1.0, 1.0).score

    assert score(0.2, 0.5) > score(0.2, 0.1) > score(0.0, 0.5) > score(-0.1, 0.1) == score(-0.1, 0.9) > score(-0.2, 0.1)
    assert score(None, 0.9) > score(None, 0.1)


def test_candidates_with_rewards_that_are_no_shares_have_gaps_without_percent(capfd: pytest.CaptureFixture[str]) -> None:
    best = {"a": 1.0, "b": 4.0}
    reports = {name: Report(figures={"rewards": {"student": [0.0, 1.0], "teacher": [1.0, value]}}) for name, value in best.items()}
    candidates.show(reports)
    table = capfd.readouterr().out
    assert "+2" in table and "+0.5" in table and "%" not in table
    candidates.show({"a": reports["a"]})
    assert "+50.0%" in capfd.readouterr().out


def test_missing_package_of_the_tracker_fails(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr("opd.training.logs.find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest))
    code, found, _ = doctor("track=wandb", "--prompts", "0")
    assert code == errors.NOT_READY and "pip install" in found["tracker"]["remedy"] + found["tracker"]["what"]


def test_trial_step_leaves_weights_gradients_and_optimizer_as_they_were(doctor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def watched(trainer: Any) -> first_step.Step:
        before = [weight.detach().clone() for weight in trainer.student.parameters()]
        optimizer = trainer.strategy.optimizer
        optimizer.optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        step = trial(trainer)
        assert all(torch.equal(*pair) for pair in zip(before, trainer.student.parameters(), strict=True))
        assert not optimizer.state and all(weight.grad is None for weight in trainer.student.parameters())
        return step

    trial = first_step.trial_step
    monkeypatch.setattr(first_step, "trial_step", watched)
    assert doctor("--prompts", "0")[0] == errors.OK
    assert rates == [0.0, 0.0], "a short step is repeated"


def test_the_trial_step_samples_nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step's sampling at the same time would slow what is timed, and would still run when the trial is over."""
    built: list[Config] = []

    def build(config: Config, *rest: Any) -> None:
        built.append(config)
        raise errors.OpdError("far enough")

    monkeypatch.setattr("opd.doctor.build", build)
    lagging = {"sampling.engine": "vllm", "sampling.vllm.url": "http://127.0.0.1:9", "sampling.lag": 1, "device": "cpu"}
    with pytest.raises(errors.OpdError, match="far enough"):
        check_models(from_options(lagging), AutoTokenizer.from_pretrained(PACKAGE / "assets/tiny-student"), ([], []), 0, Report())
    assert [config.sampling.lag for config in built] == [0]


def test_commands_of_a_warm_start_replace_the_data_and_keep_the_rest(doctor: Any, tmp_path: Path) -> None:
    file = Path(copy_of("tiny-student", tmp_path / "blank")) / "model.safetensors"
    save_file({name: -weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    words = ["model.path=blank", "optim.lr=1e-3", "data.seed=3", "train.max_steps=8"]
    _, found, _ = doctor("--prompts", "16", *words)
    commands = found["rewards before training"]["remedy"].partition("opd sample")
    sample, _, train = (commands[1] + commands[2]).partition(" && ")
    assert shlex.split(sample) == ["opd", "sample", "experiment=debug", "device=cpu", *words, "--out", "teacher.jsonl"]
    data = ["data=jsonl", "data.train_path=teacher.jsonl", "data.eval_path=teacher-eval.jsonl", "data.completion=completion"]
    kept = ["experiment=debug", "device=cpu", "model.path=blank", "optim.lr=1e-3", "train.max_steps=8"]
    assert shlex.split(train) == ["opd", "train", *kept, *data, "train.given_share={0: 1.0, 2: 0.25, 4: 0}"]


def test_rewards_of_student_and_teacher_decide() -> None:
    def finding(student: list[float], teacher: list[float]) -> Finding:
        (only,) = first_step.check_rewards(student, teacher)
        return only

    assert "the command" in first_step.check_rewards([0.0] * 20, [1.0] * 20, "the command")[0].remedy
    assert "the command" in first_step.check_rewards([0.0] * 20 + [1.0], [1.0] * 21, "the command")[0].remedy, "nearly never right"
    assert first_step.check_rewards([0.0] * 20, [1.0] * 20, "the command", takes_given=True)[0].status is Status.ok
    assert "eval.max_new_tokens" in finding([0.0] * 20, [0.0] * 20).remedy
    assert finding([1.0, 0.0] * 10, [1.0] * 20).status is Status.ok
    assert finding([1.0] * 20, [0.0] * 20).status is Status.fail
    few = finding([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    assert few.status is Status.warn and "--prompts" in few.remedy, "three prompts decide nothing"
    assert "+25.0% [-96.5, +100.0]" in finding([1.0, 1.0, 1.0, 0.0], [1.0] * 4).what, "a difference of 1 in one of four may be chance"
    assert "+0.0% [-" in finding([0.0] * 6, [0.0] * 6).what, "six prompts that agree leave an interval"
    assert first_step.check_rewards([None], [1.0])[0].status is Status.fail
    assert finding([-2.0] * 20, [-1.0] * 20).status is Status.ok, "negative rewards say nothing of how often the student is right"


def test_kl_entropy_and_truncation_of_the_first_step_decide() -> None:
    def findings(config: Config | None = None, **metrics: float) -> dict[str, Finding]:
        step = first_step.Step(
            {}, {"reverse_kl": 0.5, "entropy": 1.0, "truncated": 0.0, "length": 9.0, **metrics}, Tokens([], torch.device("cpu"))
        )
        return {finding.check: finding for finding in first_step.check_start(step, config or Config())}

    assert all(finding.status is Status.ok for finding in findings().values())
    noisy = findings(reverse_kl=4.0)["distance to the teacher"]
    assert noisy.status is Status.warn and "lower sampling.temperature" in noisy.remedy
    assert "raise sampling.temperature" in findings(entropy=0.001)["distance to the teacher"].remedy
    assert "raise sampling.max_new_tokens" in findings(truncated=0.9)["truncation"].remedy
    config = Config()
    config.sampling.truncated = Truncated.drop
    assert [findings(config, truncated=share)["truncation"].status for share in (0.4, 0.9, 1.0)] == [Status.ok, Status.warn, Status.fail]


def test_too_few_answers_to_evaluate_on_warn() -> None:
    config = Config()
    few, enough = (rows.check_answers([Prompt(0, (1,), "", ("1",))] * count, config)[0] for count in (rows.FEW - 1, rows.FEW))
    assert few.status is Status.warn and "data.eval_path" in few.remedy and enough.status is Status.ok


def test_reward_that_misses_some_reference_answers_warns() -> None:
    class Grader:
        def grade(self, items: list[dict[str, str]]) -> list[float | None]:
            return [float(item["answer"] == "1") if item["completion"] else None for item in items]

    prompts = [Prompt(0, (1,), "", ("1",)), Prompt(1, (1,), "", ("many",))]
    reference, empty = rows.check_reward(prompts, Grader(), Config())  # type: ignore[arg-type]
    assert reference.status is Status.warn and "1 for 1 of 2" in reference.what and "'many' gets 0.0" in reference.what
    assert empty.status is Status.ok


def test_memory_is_compared_with_what_is_free() -> None:
    gib = 2**30
    needed = Memory({"the process": gib, "student": gib, "optimizer": 2 * gib}, {"KV cache": gib}, {"activations": 3 * gib})
    findings = [machine.check_memory(needed, int(free * gib), torch.device("cpu"))[0] for free in (5, 6.5, 8)]
    assert [finding.status for finding in findings] == [Status.fail, Status.warn, Status.ok]
    assert REMEDIES["activations"] in findings[0].remedy and "7.00 GiB" in findings[0].what


@pytest.mark.slow
@pytest.mark.parametrize("setting", [["train.batch_size=4", "sampling.max_new_tokens=16"]])
def test_memory_estimate_is_within_15_percent_of_the_measured_peak(setting: list[str], tmp_path: Path) -> None:
    weights = ROOT / "models"
    if not (weights / "student").is_dir():
        pytest.skip("run scripts/fetch_smollm2 models first")
    pytest.importorskip("reasoning_gym")
    models = [f"model.path={weights / 'student'}", f"teacher.path={weights / 'teacher'}", "device=cpu"]
    short = ["train.max_steps=2", "eval.kl_prompts=4", "eval.kl_max_new_tokens=8", "name=run"]
    words = ["experiment=smollm2", *models, *short, *setting]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    train = subprocess.run([sys.executable, "-m", "opd", "train", *words], env=environment, capture_output=True, text=True, timeout=300)
    assert train.returncode == 0, train.stderr
    doctor = subprocess.run([sys.executable, "-m", "opd", "doctor", *words, "--json"], capture_output=True, text=True, timeout=300)
    measured = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["peak_memory_bytes"]
    assert json.loads(doctor.stdout)["figures"]["memory"]["peak"] == pytest.approx(measured, rel=0.15)


@pytest.mark.long
def test_candidate_teachers_are_ranked_by_gap_and_overlap(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The bundled teacher against the student itself, from which nothing can be learned, and one that cannot be loaded."""
    words = ["doctor", "experiment=debug", "device=cpu", "--prompts", "16"]
    listed = "teacher.path=bundled:tiny-student,./nowhere,bundled:tiny-teacher"
    assert cli.main([*words, listed, "--json"]) == errors.OK
    output = capfd.readouterr()
    found = json.loads(output.out)
    assert output.err == ""
    best, same, broken = found["ranking"]
    assert [each["teacher"] for each in (best, same, broken)] == ["bundled:tiny-teacher", "bundled:tiny-student", "./nowhere"]
    assert (best["ready"], broken["ready"], same["overlap_mass"]) == (True, False, pytest.approx(1.0))
    assert best["reward_gap"] > 0 == same["reward_gap"] and 0 < best["overlap_mass"] < 1 and best["memory"] > 0
    assert found["teachers"]["bundled:tiny-teacher"]["ready"]
    assert cli.main([*words, "teacher.path=./nowhere,./no"]) == errors.NOT_READY
    assert "./nowhere: tokenizer of the teacher" in capfd.readouterr().out
    assert cli.main([*words, listed, "ppo.steps=0"]) == errors.USAGE  # once, not for each teacher
    assert capfd.readouterr().err.count("ppo.steps") == 1


def test_time_has_the_evaluations_and_all_members_of_a_sweep(doctor: Any) -> None:
    small = ("--prompts", "2", "eval.limit=16", "eval.kl_prompts=4")
    code, found, report = doctor("-m", "optim.lr=1e-4,2e-4", "seed=0,1,2", *small)
    assert code == errors.OK
    time, step, evaluation = (report["figures"][name] for name in ("time", "step", "evaluation_seconds"))
    assert time["members"] == 6 and "6 members" in found["time"]["what"] and "6 members" in found["disk"]["what"]
    assert "3 evaluations of the student, 1 of the teacher" in found["time"]["what"]  # before, after 3 and after 6 steps
    assert time["evaluations"] == pytest.approx(3 * evaluation["student"] + evaluation["teacher"])
    assert time["training"] == pytest.approx(step["steps"] * machine.step_seconds(step["seconds"], Config(ppo=PPOConfig(steps=2))))
    assert "first of 6" in found["config"]["what"]


def test_evaluations_that_take_longer_than_training_warn() -> None:
    [finding] = machine.check_time(600.0, 700.0, "", "")
    assert finding.status is Status.warn and "eval.limit" in finding.remedy
    assert machine.check_time(600.0, 500.0, "", "")[0].status is Status.ok
    assert machine.check_time(1.0, 2.0, "", "")[0].status is Status.ok


def test_by_default_evaluations_generate_no_more_tokens_than_training() -> None:
    config = Config()
    sampling, evaluation = config.sampling, config.eval
    trained = (config.train.max_steps or 0) * config.train.batch_size * sampling.n * sampling.max_new_tokens
    student = (evaluation.limit or 0) * evaluation.max_new_tokens + evaluation.kl_prompts * evaluation.kl_max_new_tokens
    assert (1 + count_evaluations(evaluation, config.train.max_steps or 0)) * student <= trained
