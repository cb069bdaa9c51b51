"""The teacher's own view of a row: which chat it is, what it costs, and that every part of a run reads it."""

import json
import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import UNEVEN, FixedSampler, make_trainer, rollout_lists, rollout_of, weights
from transformers import AutoTokenizer

from opd.api import from_options
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.options import DataConfig, Source, TeacherConfig, TeacherWeights
from opd.config.templates import columns_of
from opd.data.prompts import Encoder, Prompt, encode_rows
from opd.data.rollouts import Request, collate, micro_batches
from opd.data.rows import fill
from opd.doctor.findings import Report, show_end
from opd.errors import DATA, OK, USAGE, ConfigError, DataError
from opd.models import policy
from opd.objective import discounted
from opd.runs.text import make_console
from opd.teachers import LocalTeacher
from opd.train import main
from opd.training.identity import differences, digest, rows

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
ROW = {"prompt": "27+85=", "answer": "#211", "hint": 7, "right": True, "none": None, "chat": CHAT}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")


def encode(tokenizer: Any, *rows_: dict[str, Any], which: str = "training", teacher: dict[str, Any], **data: Any) -> list[Prompt]:
    options = {"source": Source.jsonl, "train_path": "x", "prompt": "prompt", "answer": "answer", "answer_after": "#", **data}
    return encode_rows(rows_ or [ROW], Encoder(tokenizer, DataConfig(**options), TeacherConfig(**teacher)), which)


# Templates.


@given(st.text())
@settings(max_examples=30)
def test_an_escaped_text_is_itself(text):
    assert fill(text.replace("{", "{{").replace("}", "}}"), {}, "teacher.prompt", 0) == text


def test_a_template_takes_the_columns_that_it_names():
    assert columns_of("{a b} {{no}} {c.d}") == ["a b", "c.d"] and columns_of(None) == []
    assert fill("{a b}{{{c.d}}}{e}", {"a b": "{c.d}", "c.d": 1.5, "e": False}, "teacher.prompt", 0) == "{c.d}{1.5}false"


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        ({"prompt": "{prompt}{hint}{answer}"}, "<|user|>27+85=7211"),
        ({"prompt": "{right}"}, "<|user|>true"),
        ({"prompt": "{chat}"}, "<|system|>S<|end|><|user|>U"),
        ({"prompt": "{chat}", "system": "T"}, "<|system|>T<|end|><|user|>U"),
        ({"prompt": "{hint}", "system": "T"}, "<|system|>T<|end|><|user|>7"),
        ({"prompt": "without"}, "<|user|>without"),
    ],
)
def test_the_template_replaces_the_message_and_a_list_of_messages_the_chat(tokenizer, teacher, text):
    (prompt,) = encode(tokenizer, teacher=teacher)
    assert tokenizer.decode(prompt.teacher_ids) == f"{text}<|end|><|assistant|>"
    assert tokenizer.decode(prompt.ids) == "<|user|>27+85=<|end|><|assistant|>" and prompt.contrast_ids is None


def test_only_the_last_message_of_the_user_is_replaced_and_a_begun_answer_stays(tokenizer):
    roles = ("system", "user", "assistant", "user", "assistant")
    row = {"prompt": [{"role": role, "content": text} for role, text in zip(roles, "abcde", strict=True)], "answer": "#1", "hint": "h"}
    continued = {"continue_final_message": True}
    (prompt,) = encode(tokenizer, row, teacher={"prompt": "{prompt}{hint}", "contrast": "x"}, chat_template_kwargs=continued)
    start = "<|system|>a<|end|><|user|>b<|end|><|assistant|>c<|end|><|user|>"
    assert tokenizer.decode(prompt.teacher_ids) == f"{start}dh<|end|><|assistant|>e"
    assert tokenizer.decode(prompt.contrast_ids) == f"{start}x<|end|><|assistant|>e"


def test_arguments_of_the_teachers_chat_template_go_over_those_of_the_data(monkeypatch, tokenizer):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}{{ one }}{{ two }}")
    (prompt,) = encode(tokenizer, teacher={"chat_template_kwargs": {"two": "T"}}, chat_template_kwargs={"one": "1", "two": "2"})
    assert (tokenizer.decode(prompt.ids), tokenizer.decode(prompt.teacher_ids)) == ("27+85=12", "27+85=1T")


@pytest.mark.parametrize(
    ("teacher", "option", "remedy"),
    [
        ({"prompt": "{nope}"}, "teacher.prompt: row 0 has no column nope", "answer, chat, hint"),
        ({"contrast": "{none}"}, "teacher.contrast: row 0 has nothing in the column none", "leave the row out"),
        ({"prompt": "see {chat}"}, "teacher.prompt: row 0 has a list in the column chat", "whole template"),
        ({"prompt": "{numbers}"}, "teacher.prompt: row 0: must be a text or a list of messages", '"role": "user"'),
        ({"contrast": "{prompt}"}, "teacher.contrast: ", "another text"),
        ({"prompt": "{hint}", "contrast": "{also}"}, "teacher.contrast: ", "another text"),
    ],
)
def test_a_view_that_cannot_be_made_or_says_nothing_is_one_line(tokenizer, teacher, option, remedy):
    with pytest.raises(DataError) as refused:
        encode(tokenizer, {**ROW, "numbers": [1], "also": "7"}, teacher=teacher)
    message = str(refused.value)
    assert message.startswith(option) and remedy in message and "\n" not in message


def test_a_chat_without_a_user_and_a_view_without_tokens_are_refused(monkeypatch, tokenizer):
    with pytest.raises(DataError, match=r"^teacher\.prompt: row 0 has no message of the user"):
        encode(tokenizer, {"prompt": [{"role": "system", "content": "a"}], "answer": "#1"}, teacher={"prompt": "b"})
    with pytest.raises(ConfigError, match=r"^teacher\.chat_template_kwargs\.chat_template=none: .*set it to default"):
        encode(tokenizer, teacher={"chat_template_kwargs": {"chat_template": "none"}})
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="teacher's view: the prompt has no tokens"):
        encode(tokenizer, teacher={"prompt": ""})


@pytest.mark.parametrize(
    ("options", "option", "remedy"),
    [
        ({"teacher.prompt": "{a} {"}, "teacher.prompt=", "{{ or }}"),
        ({"teacher.contrast": "}"}, "teacher.contrast=", "{{ or }}"),
        ({"teacher.contrast": "a", "teacher.prompt": "a"}, "teacher.contrast='a'", "teacher.prompt"),
        ({"teacher.contrast": "a", "ppo.estimator": "exact"}, "ppo.estimator=exact", "ppo.estimator=sampled"),
        ({"teacher.contrast": "a", "ppo.estimator": "topk"}, "ppo.estimator=topk", "ppo.estimator=sampled"),
        ({"teacher.contrast": "a", "ppo.baseline": True}, "ppo.baseline=True", "ppo.baseline=false"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, option, remedy):
    with pytest.raises(ConfigError) as refused:
        from_options(options)
    message = str(refused.value)
    assert message.startswith(option) and remedy in message and "\n" not in message


def test_a_view_makes_a_teacher_of_the_students_base():
    same = {"model.path": "a/b", "teacher.path": "a/b", "lora.rank": 8}
    for view in ({"teacher.prompt": "{prompt}{hint}"}, {"teacher.chat_template_kwargs": {"enable_thinking": True}}):
        assert from_options({**same, **view}).teacher_weights is TeacherWeights.base
    with pytest.raises(ConfigError, match=r"^lora\.rank=8: .*teacher\.prompt"):
        from_options({**same, "teacher.contrast": "x"})


# Length.


def test_rows_with_a_view_that_is_too_long_are_left_out_and_counted(tokenizer, caplog):
    lines = [{"prompt": "1" * own, "answer": "#1", "hint": "2" * more} for own, more in ((5, 5), (30, 1), (5, 30), (5, 15), (6, 31))]
    with caplog.at_level(logging.WARNING):
        prompts = encode(tokenizer, *lines, teacher={"prompt": "{prompt}{hint}"}, max_prompt_tokens=25)
    assert [prompt.sample_id for prompt in prompts] == [0, 3]
    own, view = [record.getMessage() for record in caplog.records]
    assert own.startswith("data.max_prompt_tokens=25: 1 of 5 training prompts")
    assert view.startswith("data.max_prompt_tokens=25: 2 of 4 training prompts") and "teacher's view" in view
    with pytest.raises(DataError, match=r"^data\.max_prompt_tokens=25: all evaluation prompts .*teacher's view; the shortest has 38"):
        encode(tokenizer, *lines[2:3], which="evaluation", teacher={"prompt": "{prompt}{hint}"}, max_prompt_tokens=25)
    caplog.clear()
    assert len(encode(tokenizer, *lines, teacher={"contrast": "{hint}"}, max_prompt_tokens=25)) == 2


def test_the_longest_view_counts_in_micro_batches():
    prompt = Prompt(0, (3, 4), "", teacher_ids=(3,), contrast_ids=(3, 4, 5, 6))
    assert prompt.longest == 4 and replace(rollout_of((3,), (5, 1)), request=Request(prompt)).length == 6


# Identity.


def test_a_prompt_is_identified_by_all_of_its_views_and_their_dated_chats(monkeypatch, tokenizer):
    plain, viewed = Prompt(0, (1,), "", teacher_ids=(2,)), Prompt(0, (1,), "", teacher_ids=(2,), contrast_ids=(3,))
    assert digest(rows([plain])) != digest(rows([viewed])) != digest(rows([replace(viewed, contrast_ids=(4,))]))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%d') }}{{ messages[0].content }}")
    found = [digest(rows(encode(tokenizer, {**ROW, "hint": hint}, teacher={"prompt": "{hint}"}))) for hint in (7, 8, 7)]
    assert found[0] == found[2] != found[1]
    assert encode(tokenizer, teacher={"system": "s"})[0].chats == encode(tokenizer, teacher={})[0].chats != ()


def test_a_mapping_that_older_versions_did_not_have_is_empty_there():
    assert differences({"a": {}}, {"a": {"kwargs": {}}}) == []
    assert differences({"a": {}}, {"a": {"kwargs": {"x": 1}}}) != [] != differences({"a": {}}, {"a": {"list": []}})


# The contrast in a step.


def with_contrast(rollouts: list[Any]) -> list[Any]:
    """Add to each prompt a contrast of its own length."""
    views = [tuple(range(2, 4 + index % 5)) for index in range(len(rollouts))]
    return [
        replace(rollout, request=replace(rollout.request, prompt=replace(rollout.request.prompt, contrast_ids=view)))
        for rollout, view in zip(rollouts, views, strict=True)
    ]


@settings(max_examples=20)
@given(rollouts=rollout_lists(), packed=st.booleans(), budget=st.sampled_from([1, 30, 1000]))
def test_every_batch_has_the_contrast_before_the_same_completions(rollouts, packed, budget):
    chosen = with_contrast(rollouts)
    for batch in micro_batches(chosen, budget, 0, packed):
        inputs = batch.contrast_inputs
        assert inputs.ids_BT.flatten()[inputs.predicting_N + 1].tolist() == batch.ids_N.tolist()
        flat = inputs.ids_BT.flatten().tolist()
        width = inputs.ids_BT.shape[1]
        place = 0
        for row, index in enumerate(batch.rollouts):
            view = chosen[index].request.prompt.contrast_ids + chosen[index].read
            start = place if packed else row * width
            assert tuple(flat[start : start + len(view)]) == view
            place += len(view)


@pytest.mark.parametrize("options", [{}, {"train__max_tokens_per_micro_batch": 30}, {"train__packing": True}])
def test_the_contrast_column_is_the_teachers_score_of_the_second_view(tmp_path, options):
    trainer = make_trainer(tmp_path, teacher__contrast="x", **UNEVEN, **options)
    tokens = trainer.begin_step()
    teacher: LocalTeacher = trainer.scoring.teacher
    for index, rollout in enumerate(tokens.rollouts):
        alone = collate([rollout_of(rollout.request.prompt.contrast_ids, rollout.completion)], [0], 0)
        expected = teacher.logp(alone.inputs, alone.ids_N, 0.7)
        assert torch.allclose(tokens.of_rollout(index)["contrast_logp"], expected, atol=1e-5)
        assert not torch.allclose(tokens.of_rollout(index)["teacher_logp"], expected, atol=1e-2)


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_the_advantage_is_the_difference_of_the_views_in_every_inner_step(tmp_path, discount):
    trainer = make_trainer(tmp_path, teacher__contrast="x", ppo__steps=2, ppo__advantage_clip=None, ppo__discount=discount)
    done = trainer.train_step()
    columns = done.tokens.columns
    expected = discounted(columns["teacher_logp"] - columns["contrast_logp"], done.tokens.rollout_N, discount)
    assert torch.allclose(columns["advantage"], expected, atol=1e-6)
    assert torch.allclose(columns["reverse_kl"], columns["logp"] - columns["teacher_logp"], atol=1e-6)
    assert done.metrics["contrast_nll"] == pytest.approx(-float(columns["contrast_logp"].mean()), rel=1e-5)
    off = make_trainer(tmp_path / "off").train_step()
    assert "contrast_logp" not in off.tokens.columns and "contrast_nll" not in off.metrics


def test_micro_batches_do_not_matter_to_an_update_with_a_contrast(tmp_path):
    found = []
    for budget in (8192, 40):
        trainer = make_trainer(tmp_path / str(budget), teacher__contrast="x", train__max_tokens_per_micro_batch=budget, **UNEVEN)
        trainer.train_step()
        found.append(weights(trainer))
    assert torch.allclose(*found, atol=1e-6)


def test_a_contrast_that_is_not_finite_skips_the_update_and_names_the_rollout(tmp_path):
    trainer = make_trainer(tmp_path, teacher__contrast="x")
    tokens = trainer.begin_step()
    tokens.columns["contrast_logp"][0] = torch.nan
    before = weights(trainer)
    problem = trainer.scoring.update(tokens)
    assert problem is not None and problem.suspects == [int(tokens.rollout_N[0])] and torch.equal(before, weights(trainer))


def test_a_contrast_equal_to_the_teachers_view_teaches_nothing(tmp_path):
    trainer = make_trainer(tmp_path, teacher__contrast="x")
    same = replace(rollout_of((3, 4), (5, 6, 1)), request=Request(Prompt(0, (3, 4), "", teacher_ids=(9, 3), contrast_ids=(9, 3))))
    trainer.sampler = FixedSampler([same])
    done = trainer.train_step()
    assert not done.tokens.columns["advantage"].any() and done.metrics["optim/grad_norm"] == 0


# Runs.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with rows whose prompt is a mere name of the sum that the teacher reads."""
    monkeypatch.chdir(tmp_path)
    lines = [
        {"prompt": f"{i:02}", "answer": str(2 * i + 11)[::-1], "sum": f"{i}+{i + 11}=", "wrong": f"{i}+{i + 50}="} for i in range(10, 40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


VIEW = 'teacher.prompt="{sum}"'
DEBUG = ["experiment=debug", "device=cpu", "data=jsonl", "data.train_path=rows.jsonl", "data.eval_path=rows.jsonl", "eval.limit=8"]


def test_a_run_trains_evaluates_and_resumes_with_the_views(folder, capfd):
    words = [*DEBUG, VIEW, 'teacher.contrast="{wrong}"', "name=run", "train.max_steps=2", "checkpoint.every=1", "eval.steps=0"]
    assert main(words) == OK
    run = folder / "runs" / "run"
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    teacher = next(line for line in evaluations if line["model"] == "teacher")
    assert teacher["rewards"]["mean"] == 1.0, "it answers the sum that it reads, not the prompt"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["contrast_nll"] > 0 for line in metrics)
    record = json.loads((run / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert len(record["contrast_logp"]) == len(record["ids"])
    capfd.readouterr()
    for more, what in (('teacher.prompt="{sum} "', "teacher.prompt was {sum}"), ("teacher.contrast=null", "teacher.contrast was {wrong}")):
        assert main([*words, more]) == USAGE
        assert what in capfd.readouterr().err


def test_a_column_that_is_not_there_ends_the_run_before_it_loads_anything(folder, capfd):
    assert main([*DEBUG, 'teacher.prompt="{nope}"', "name=run"]) == DATA
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("opd: error: teacher.prompt: row 0 has no column nope") and "answer, prompt, sum, wrong" in error


def test_the_teachers_positions_bound_its_views(folder, capfd, monkeypatch):
    monkeypatch.setattr(policy, "position_limit", lambda model: 24 if sum(weight.numel() for weight in model.parameters()) > 5e5 else None)
    assert main([*DEBUG, "name=run", "eval.kl_prompts=0", "eval.max_new_tokens=4", 'teacher.contrast="{sum} {sum} {sum}"']) == USAGE
    error = capfd.readouterr().err.splitlines()[-1]
    assert "sampling.max_new_tokens=" in error and "(teacher)" in error and "data.max_prompt_tokens" in error


def test_doctor_shows_the_views_and_their_lengths(folder, capfd):
    assert cli.main(["doctor", *DEBUG, VIEW, 'teacher.contrast="{prompt}"', "--json", "--prompts", "0"]) == OK
    report = json.loads(capfd.readouterr().out)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["teacher's view"]["what"].startswith("9 tokens in the first row, +4 to the student's 5: '10+21=' in place of '10'")
    assert found["teacher's contrast"]["status"] == "warn" and "teacher.contrast" in found["teacher's contrast"]["remedy"]
    assert report["rendered"]["teacher's view"] == "<|user|>10+21=<|end|><|assistant|>" != report["rendered"]["student"]
    assert "up to 9 tokens" in found["training prompts"]["what"]
    assert found["teacher = student"]["status"] == "ok", "the student is its own teacher in its own view"
    show_end(make_console(), Report(rendered=report["rendered"]))
    out = capfd.readouterr().out
    assert "first prompt, teacher's view" in out and "template" not in out, "both templates render the prompt alike"


def test_score_and_sample_use_the_view(capfd):
    words = ["model=tiny", "teacher=tiny", "device=cpu"]
    found = []
    for more in ([], ['teacher.prompt="{prompt}5="']):
        assert cli.main(["score", *words, "--prompt", "27+8", "--text", "211", "--json", *more]) == OK
        found.append(json.loads(capfd.readouterr().out))
    assert found[0]["student_logp"] == found[1]["student_logp"]
    assert sum(found[1]["teacher_logp"]) > -0.1 > -5 > sum(found[0]["teacher_logp"]), "the right answer to what the teacher reads"
    assert cli.main(["sample", *words, "--prompt", "27+8", 'teacher.prompt="{prompt}5="', "sampling.temperature=0.01", "--json"]) == OK
    assert "211" in capfd.readouterr().out


def test_rows_from_python_have_views_too(tmp_path):
    from opd.api import OnPolicyDistillationTrainer

    @dataclass
    class Item:
        prompt: str
        answer: str
        sum: str

    items = [Item(f"{i}", str(2 * i + 11)[::-1], f"{i}+{i + 11}=") for i in range(10, 20)]
    options = {"device": "cpu", "eval.kl_prompts": 0, "teacher.prompt": "{sum}", "teacher.contrast": "{prompt}"}
    for number, dataset in enumerate((items, [vars(item) for item in items])):
        paths = (str(PACKAGE / "assets" / f"tiny-{role}") for role in ("student", "teacher"))
        settings = {"max_steps": 1, "batch_size": 2, "max_new_tokens": 4, "eval_steps": 0, "output_dir": tmp_path / str(number)}
        trainer = OnPolicyDistillationTrainer(*paths, dataset, options=options, **settings)
        trainer.train()
        assert trainer.state.log_history[0]["contrast_nll"] > 0


@pytest.mark.long
def test_a_student_learns_answers_to_questions_that_only_the_teacher_reads(folder):
    """Four numbers, whose sums only the teacher sees: the student, never right at first, learns the answers by heart."""
    lines = (folder / "rows.jsonl").read_text().splitlines()[::9]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    loss = ["ppo.estimator=exact", "ppo.divergence=forward_kl", "optim.lr=2e-3", "optim.schedule=constant"]
    words = ["experiment=tiny", "train.max_steps=120", "train.batch_size=8", "eval.kl_prompts=4", "eval.steps=0", "name=run"]
    assert main([*words, *loss, *DEBUG[1:], VIEW]) == OK
    summary = json.loads((folder / "runs" / "run" / "summary.json").read_text())
    assert summary["reward_before"] == 0 and summary["reward_after"] == summary["reward_teacher"] == 1
    assert summary["eval_kl_after"] < 0.2 * summary["eval_kl_before"]
