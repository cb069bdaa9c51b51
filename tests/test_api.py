"""The Python API: a trainer that people who know transformers.Trainer find their way in."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.api import OnPolicyDistillationTrainer
from opd.config.compose import PACKAGE
from opd.errors import ConfigError, DataError
from opd.training.events import StepDone

STUDENT, TEACHER = (PACKAGE / "assets" / f"tiny-{role}" for role in ("student", "teacher"))
OPTIONS = {"device": "cpu", "eval.kl_prompts": 4}


def make_trainer(folder, model=STUDENT, rows=None, **arguments):
    rows = rows or [{"prompt": f"{i}+27=", "answer": str(i + 27)[::-1]} for i in range(10, 40)]
    settings = {"eval_steps": 0, "max_steps": 2, "batch_size": 2, "max_new_tokens": 8, "options": OPTIONS, "eval_dataset": rows[:4]}
    return OnPolicyDistillationTrainer(model, str(TEACHER), rows, output_dir=folder, **{**settings, **arguments})


def loaded_student():
    return AutoModelForCausalLM.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(STUDENT)


def test_a_loaded_model_is_trained_in_place_and_the_summary_is_returned(tmp_path):
    model, tokenizer = loaded_student()
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = make_trainer(tmp_path / "out", model, tokenizer=tokenizer)
    summary = trainer.train()
    assert summary["steps"] == 2 and summary["reward_after"] is not None
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert trainer.model is model and not torch.equal(model.get_input_embeddings().weight, before)


def test_a_finished_run_loads_its_weights_into_the_given_model(tmp_path):
    first, tokenizer = loaded_student()
    make_trainer(tmp_path / "out", first, tokenizer=tokenizer).train()
    second, tokenizer = loaded_student()
    again = make_trainer(tmp_path / "out", second, tokenizer=tokenizer)
    summary = again.train()
    assert again.state.global_step == summary["steps"] == len(again.state.log_history) and "loss" in again.state.log_history[-1]
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_log_history_and_callbacks_get_every_step_and_evaluation(tmp_path):
    events = []
    trainer = make_trainer(tmp_path / "out", callbacks=[events.append])
    trainer.train()
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2] and trainer.state.global_step == 2
    assert [line["step"] for line in trainer.state.log_history] == [0, 1, 2, 2]
    assert "reverse_kl" in trainer.state.log_history[1] and "eval/kl" in trainer.state.log_history[-1]


def test_evaluate_gives_the_metrics_of_the_run_before_and_after_training(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    before = trainer.evaluate()
    summary = trainer.train()
    after = trainer.evaluate()
    assert before["eval/kl"] == pytest.approx(summary["eval_kl_before"], rel=1e-3)
    assert after["eval/kl"] == pytest.approx(summary["eval_kl_after"], rel=1e-3) and before != after


def test_the_trained_model_is_there_and_can_be_saved(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"output_dir=.*call train\(\) first"):
        trainer.save_model(tmp_path / "early")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(one, other) for one, other in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == AutoTokenizer.from_pretrained(STUDENT).get_vocab()


@dataclass
class Item:
    prompt: str
    answer: str

    def get_reward(self, completion):
        return float(completion == self.answer)


def test_items_may_be_objects_with_a_get_reward_method(tmp_path):
    summary = make_trainer(tmp_path / "out", rows=[Item(f"{i}+27=", str(i + 27)[::-1]) for i in range(10, 40)]).train()
    assert 0 <= summary["reward_after"] <= 1


def test_objects_keep_the_attributes_that_options_of_the_data_name(tmp_path):
    rows = [SimpleNamespace(prompt="11+11=", answer="22", text="22", role="S", other=1)] * 4
    options = {**OPTIONS, "data.completion": "text", "data.system": "role", "train.given_share": 0.5}
    trainer = make_trainer(tmp_path / "out", rows=rows, options=options)
    assert trainer.given.train_rows[0] == {"prompt": "11+11=", "answer": "22", "text": "22", "role": "S"}


def test_a_reward_may_be_a_function_of_completion_and_answer(tmp_path):
    judged = []

    def reward(completion, answer):
        judged.append((completion, answer))
        return 0.25

    assert make_trainer(tmp_path / "out", reward=reward).train()["reward_after"] == 0.25
    assert {answer for _, answer in judged} == {str(i + 27)[::-1] for i in range(10, 14)}


def test_rows_without_an_answer_are_not_judged(tmp_path):
    rows = [{"prompt": "11+11="}, {"prompt": "12+11=", "answer": "32"}, {"prompt": "13+11="}, {"prompt": "14+11="}]
    assert make_trainer(tmp_path / "out", rows=rows).train()["reward_after"] is not None


def test_mistakes_name_the_argument(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"training set of data\.source=python is empty"):
        OnPolicyDistillationTrainer(str(STUDENT), str(TEACHER), [], output_dir=tmp_path / "empty", options=OPTIONS).train()
    with pytest.raises(ConfigError, match=r"optim\.lr=-1"):
        make_trainer(tmp_path / "lr", learning_rate=-1)
    with pytest.raises(ConfigError, match=r"train_dataset.*item 0 is a str"):
        OnPolicyDistillationTrainer("a", "b", ["1+1="])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use_accelerate=True"):
        make_trainer(tmp_path / "processes", use_accelerate=False)
