"""The Python API: a trainer that people who know transformers.Trainer find their way in."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from opd.api import OnPolicyDistillationTrainer
from opd.config.compose import PACKAGE
from opd.config.python_names import in_python
from opd.data.python_rows import as_rows
from opd.errors import ConfigError, DataError, OpdError, OutputError, RewardError
from opd.training.events import Evaluated, Saved, StepDone

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft

STUDENT, TEACHER = (PACKAGE / "assets" / f"tiny-{role}" for role in ("student", "teacher"))
OPTIONS = {"device": "cpu", "eval.kl_prompts": 4}


ROWS = [{"prompt": f"{i}+27=", "answer": str(i + 27)[::-1]} for i in range(10, 40)]


def make_trainer(folder, model=STUDENT, rows=ROWS, **arguments):
    settings = {"eval_steps": 0, "max_steps": 2, "batch_size": 2, "max_new_tokens": 8, "options": OPTIONS, "eval_dataset": rows[:4]}
    return OnPolicyDistillationTrainer(model, str(TEACHER), rows, output_dir=folder, **{**settings, **arguments})


def loaded_student():
    return AutoModelForCausalLM.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(STUDENT)


def test_a_loaded_model_is_trained_in_place_and_the_summary_is_returned(tmp_path):
    model, tokenizer = loaded_student()
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = make_trainer(tmp_path / "out", model, processing_class=tokenizer)
    assert trainer.model is model, "also before training"
    summary = trainer.train()
    assert summary["steps"] == 2 and summary["reward_after"] is not None
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert trainer.model is model and not torch.equal(model.get_input_embeddings().weight, before)


def test_a_finished_run_loads_its_weights_into_the_given_model(tmp_path):
    first, tokenizer = loaded_student()
    trainer = make_trainer(tmp_path / "out", first, processing_class=tokenizer)
    trainer.train()
    second, tokenizer = loaded_student()
    again = make_trainer(tmp_path / "out", second, processing_class=tokenizer)
    summary = again.train()
    assert again.state.global_step == summary["steps"] == 2
    assert again.state.log_history == trainer.state.log_history and "eval_kl" in again.state.log_history[-1]
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_a_finished_run_with_adapters_loads_its_merged_weights_into_the_given_model(tmp_path):
    trained = []
    for _ in range(2):
        model, tokenizer = loaded_student()
        make_trainer(tmp_path / "out", model, processing_class=tokenizer, peft_config=adapters(), learning_rate=1e-2).train()
        trained.append(model)
    assert all(torch.equal(one, other) for one, other in zip(*(model.parameters() for model in trained), strict=True))
    assert not torch.equal(trained[1].lm_head.weight, torch.zeros(())) and not hasattr(trained[1], "peft_config")


def test_a_finished_run_of_another_shape_says_that_it_does_not_fit(tmp_path):
    make_trainer(tmp_path / "out", loaded_student()[0], processing_class=loaded_student()[1]).train()
    other, tokenizer = loaded_student()
    other.resize_token_embeddings(300)
    with pytest.raises(ConfigError, match="weights do not fit it; load"):
        make_trainer(tmp_path / "out", other, processing_class=tokenizer).train()


def interrupt(event):
    if isinstance(event, StepDone) and event.step == 2:
        raise KeyboardInterrupt


def test_a_resumed_run_has_the_history_of_the_steps_before(tmp_path):
    options = {**OPTIONS, "checkpoint.every": 1}
    whole = make_trainer(tmp_path / "whole", max_steps=3, eval_steps=1, options=options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "out", max_steps=3, eval_steps=1, options=options, callbacks=[interrupt]).train()
    resumed = make_trainer(tmp_path / "out", max_steps=3, eval_steps=1, options=options)
    resumed.train()

    def reproducible(line):
        return {name: value for name, value in line.items() if not name.startswith(("time/", "perf/", "memory/", "tokens_per_second"))}

    assert [*map(reproducible, resumed.state.log_history)] == [*map(reproducible, whole.state.log_history)]


# Frozen parameters and adapters.


def frozen_student():
    model, tokenizer = loaded_student()
    for parameter in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
        parameter.requires_grad_(False)
    return model, tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_that_require_no_gradient_are_not_trained(tmp_path, dtype):
    model, tokenizer = frozen_student()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    options = {**OPTIONS, "model.dtype": dtype}
    make_trainer(tmp_path / "out", model, processing_class=tokenizer, learning_rate=1e-3, options=options).train()
    assert {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])} == frozen
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    stored = load_file(tmp_path / "out" / "checkpoints" / "step_000002" / "model.safetensors")
    assert frozen.isdisjoint(stored) and before.keys() - frozen <= stored.keys()


def test_a_run_with_frozen_parameters_resumes_bitwise_and_only_with_the_same_ones(tmp_path):
    def train(folder, student, **arguments):
        model, tokenizer = student
        options = {**OPTIONS, "checkpoint.every": 1}
        make_trainer(tmp_path / folder, model, processing_class=tokenizer, max_steps=3, options=options, **arguments).train()
        return model

    whole = train("whole", frozen_student())
    with pytest.raises(KeyboardInterrupt):
        train("out", frozen_student(), callbacks=[interrupt])
    with pytest.raises(ConfigError, match="frozen weights changed"):
        train("out", loaded_student())
    resumed = train("out", frozen_student())
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluate_leaves_a_loaded_model_as_it_is(tmp_path, dtype, low_rank):
    model, tokenizer = loaded_student()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"options": {**OPTIONS, "model.dtype": dtype}, "peft_config": adapters() if low_rank else None}
    make_trainer(tmp_path / "out", model, processing_class=tokenizer, **settings).evaluate()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("dtype", "low_rank", "said"), [("bfloat16", True, True), ("bfloat16", False, False), ("float32", True, False)])
def test_a_loaded_model_whose_weights_stay_rounded_is_told(tmp_path, caplog, dtype, low_rank, said):
    model, tokenizer = loaded_student()
    model.float()
    settings = {"options": {**OPTIONS, "model.dtype": dtype}, "peft_config": adapters() if low_rank else None}
    make_trainer(tmp_path / "out", model, processing_class=tokenizer, max_steps=1, **settings).train()
    assert ("rounded to bf16" in caplog.text) is said
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16 if said else torch.float32}


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_trained_again_after_an_interruption_and_after_a_run(tmp_path, dtype, low_rank):
    model, tokenizer = loaded_student()
    settings = {"options": {**OPTIONS, "model.dtype": dtype, "checkpoint.every": 1}, "peft_config": adapters() if low_rank else None}
    trainer = make_trainer(tmp_path / "out", model, processing_class=tokenizer, max_steps=3, callbacks=[interrupt], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.handler.callbacks.clear()
    assert trainer.train()["steps"] == 3
    assert make_trainer(tmp_path / "next", model, processing_class=tokenizer, **settings).train()["steps"] == 2


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    model, tokenizer = loaded_student()
    with pytest.raises(ConfigError, match=r"requires_grad=False.*peft_config"):
        make_trainer(tmp_path / "out", model.requires_grad_(False), processing_class=tokenizer).train()


def adapters(**settings):
    return pytest.importorskip("peft").LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})


def test_peft_config_trains_the_adapters_that_it_describes(tmp_path):
    named = make_trainer(tmp_path / "a", peft_config=adapters(target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"))
    assert named.config.lora.targets == ["q_proj", "v_proj"]
    model, tokenizer = loaded_student()
    options = {**OPTIONS, "model.dtype": "float32", "sampling.dtype": "trainer"}
    settings = {"peft_config": adapters(), "learning_rate": 1e-2, "options": options}
    trainer = make_trainer(tmp_path / "b", model, processing_class=tokenizer, **settings)
    assert (trainer.config.lora.rank, trainer.config.lora.alpha, trainer.config.lora.targets) == (4, 8, ["all-linear"])
    before = trainer.evaluate()
    assert not hasattr(model, "peft_config") and all(parameter.requires_grad for parameter in model.parameters())
    summary = trainer.train()
    assert before["eval_kl"] == pytest.approx(summary["eval_kl_before"], rel=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert trainer.evaluate()["eval_kl"] == pytest.approx(summary["eval_kl_after"], rel=1e-3) != before["eval_kl"]


def test_a_loaded_teacher_is_the_teacher_also_with_adapters(tmp_path):
    (model, tokenizer), (same, _) = loaded_student(), loaded_student()
    arguments = {"output_dir": tmp_path / "out", "processing_class": tokenizer, "peft_config": adapters(), "max_steps": 1}
    arguments |= {"options": OPTIONS, "max_new_tokens": 8, "batch_size": 2, "reward_funcs": None}
    rows = [{"prompt": f"{i}+27="} for i in range(10, 20)]
    with pytest.raises(ConfigError, match=r"^teacher_model=.*pass its path"):
        OnPolicyDistillationTrainer(model, same, rows, rows, **{**arguments, "options": {**OPTIONS, "teacher.system": "1"}}).train()
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    model.name_or_path = teacher.name_or_path = ""
    assert OnPolicyDistillationTrainer(model, teacher, rows, rows, **arguments).train()["eval_kl_before"] > 1


@pytest.mark.parametrize(
    "settings", [{"lora_dropout": 0.05}, {"use_rslora": True}, {"bias": "all"}, {"target_modules": None}, {"target_modules": ".*_proj"}]
)
def test_peft_settings_without_a_counterpart_are_refused(tmp_path, settings):
    with pytest.raises(ConfigError, match=f"peft_config: {next(iter(settings))}="):
        make_trainer(tmp_path / "out", peft_config=adapters(**settings))


def test_other_adapters_than_lora_are_refused(tmp_path):
    config = pytest.importorskip("peft").PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"peft_config is a PrefixTuningConfig.*LoraConfig"):
        make_trainer(tmp_path / "out", peft_config=config)


def test_the_adapter_of_a_peft_model_is_trained_further_as_the_refusal_says(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(loaded_student()[0], adapters())
    with pytest.raises(ConfigError, match=r"^model is a PeftModel: .*peft_config.*\"model\.adapter\"") as refused:
        make_trainer(tmp_path / "out", model)
    assert len(str(refused.value)) < 300
    model.save_pretrained(tmp_path / "adapter")
    options = {**OPTIONS, "model.adapter": str(tmp_path / "adapter")}
    assert make_trainer(tmp_path / "out", peft_config=adapters(), options=options).train()["steps"] == 2


def test_modules_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^model must be .*PreTrainedModel, not Linear$"):
        make_trainer(tmp_path / "out", torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"^teacher_model must be .*not Linear$"):
        OnPolicyDistillationTrainer(str(STUDENT), torch.nn.Linear(2, 2), [{"prompt": "1"}])
    with pytest.raises(ConfigError, match=r"^processing_class must be a tokenizer.*not dict$"):
        make_trainer(tmp_path / "out", processing_class={})


def test_a_model_from_nowhere_needs_a_processing_class(tmp_path):
    model, tokenizer = loaded_student()
    model.name_or_path = ""
    with pytest.raises(ConfigError, match=r"^model: .*processing_class"):
        make_trainer(tmp_path / "out", model)
    trainer = make_trainer(tmp_path / "out", model, processing_class=tokenizer)
    assert trainer.processing_class is tokenizer and make_trainer(tmp_path / "x").processing_class.get_vocab() == tokenizer.get_vocab()


def test_log_history_and_callbacks_get_every_step_and_evaluation(tmp_path):
    events = []
    trainer = make_trainer(tmp_path / "out", callbacks=[events.append])
    trainer.train()
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2] and trainer.state.global_step == 2
    assert [line["step"] for line in trainer.state.log_history] == [0, 1, 2, 2]
    assert "reverse_kl" in trainer.state.log_history[1] and "eval_kl" in trainer.state.log_history[-1]


class Recorder(TrainerCallback):
    def __init__(self):
        self.calls = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.calls.append(("begin", state.global_step, args.learning_rate, kwargs["processing_class"]))

    def on_step_end(self, args, state, control, **kwargs):
        self.calls.append(("step", state.global_step))

    def on_log(self, args, state, control, logs, **kwargs):
        self.calls.append(("log", "loss" in logs))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.calls.append(("evaluate", "eval_reward" in metrics and "eval_kl" in metrics))

    def on_save(self, args, state, control, **kwargs):
        self.calls.append(("save", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.calls.append(("end", state.best_metric is not None))


def test_callbacks_of_transformers_get_the_calls_that_a_run_has(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "out")
    trainer.add_callback(recorder)
    trainer.add_callback(Recorder)  # a class, as transformers' own trainer accepts it
    trainer.train()
    evaluated = [("log", False), ("evaluate", True)]
    steps = [("step", 1), ("log", True), ("step", 2), ("log", True), ("save", 2)]  # once, for the last and the best one
    assert recorder.calls == [("begin", 0, None, None), *evaluated, *steps, *evaluated, ("end", True)]


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def test_a_callback_may_stop_the_run_which_is_then_finished(tmp_path, capfd):
    events = []
    trainer = make_trainer(tmp_path / "out", max_steps=9, callbacks=[StopAfter(2), events.append])
    assert trainer.train()["steps"] == 2
    assert [type(event) for event in events] == [Evaluated, StepDone, StepDone, Saved, Saved, Evaluated]
    capfd.readouterr()
    assert trainer.model is not None and make_trainer(tmp_path / "out", max_steps=9).train()["steps"] == 2
    assert "finished at step 2 of 9, where a callback stopped it; nothing to do" in capfd.readouterr().out


def test_early_stopping_of_transformers_ends_a_run_that_does_not_improve(tmp_path):
    callback = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)  # a reward never improves by so much
    assert make_trainer(tmp_path / "out", max_steps=9, eval_steps=1, callbacks=[callback]).train()["steps"] == 2


def test_evaluate_gives_the_metrics_of_the_run_before_and_after_training(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    before = trainer.evaluate()
    summary = trainer.train()
    after = trainer.evaluate()
    assert before["eval_kl"] == pytest.approx(summary["eval_kl_before"], rel=1e-3)
    assert after["eval_kl"] == pytest.approx(summary["eval_kl_after"], rel=1e-3) and before != after


def test_the_trained_model_is_there_and_can_be_saved(tmp_path):
    trainer = make_trainer(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"output_dir=.*call train\(\) first"):
        trainer.save_model(tmp_path / "early")
    with pytest.raises(ConfigError, match=r"call train\(\) first"):  # a path names weights that are not those to come
        _ = trainer.model
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(one, other) for one, other in zip(saved.parameters(), trainer.model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == AutoTokenizer.from_pretrained(STUDENT).get_vocab()


def test_model_and_tokenizer_are_pushed_to_the_hub(tmp_path, monkeypatch):
    pushed = []
    for kind in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, *args, **kwargs: pushed.append((type(self).__name__, args, kwargs)))
    trainer = make_trainer(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"call train\(\) first"):
        trainer.push_to_hub("me/student")
    trainer.train()
    trainer.push_to_hub("me/student", private=True)
    assert [(args, kwargs) for _, args, kwargs in pushed] == [(("me/student",), {"private": True})] * 2
    assert pushed[0][0] == type(trainer.model).__name__ and "Tokenizer" in pushed[1][0]

    def refuse(*args, **kwargs):
        raise OSError("401 Unauthorized\nmore")

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", refuse)
    with pytest.raises(OutputError, match=r"^push_to_hub: me/student: 401 Unauthorized; .*hf auth login"):
        trainer.push_to_hub("me/student")


def test_resume_from_checkpoint_takes_a_checkpoint_of_the_run_itself(tmp_path):
    options = {**OPTIONS, "checkpoint.every": 1}
    trainer = make_trainer(tmp_path / "out", options=options)
    trainer.train()
    checkpoints = tmp_path / "out" / "checkpoints"
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint=.*step_000001.*output_dir"):
        make_trainer(tmp_path / "other", options=options).train(resume_from_checkpoint=checkpoints / "step_000001")
    with pytest.raises(ConfigError, match=r"^resume_from_checkpoint=False"):
        make_trainer(tmp_path / "out", options=options).train(resume_from_checkpoint=False)
    assert make_trainer(tmp_path / "out", options=options).train(resume_from_checkpoint=True)["steps"] == 2
    events = []
    again = make_trainer(tmp_path / "out", options=options, callbacks=[events.append])
    again.train(resume_from_checkpoint=checkpoints / "step_000001")
    assert [event.step for event in events if isinstance(event, StepDone)] == [2]


def test_a_run_without_an_output_dir_gets_a_new_folder_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = make_trainer(None), make_trainer(None, learning_rate=2e-5)
    assert [str(trainer.output_dir) for trainer in (first, second)] == ["runs/from-python", "runs/from-python-2"]
    assert second.train()["steps"] == first.train()["steps"] == 2 and second.config.name == "from-python-2"
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=True.*output_dir"):
        make_trainer(None).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="learning_rate=-1"):
        make_trainer(None, learning_rate=-1)
    assert len(list((tmp_path / "runs").iterdir())) == 3, "a refused trainer leaves no folder"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^output_dir: "):
        make_trainer(None)


@dataclass
class Item:
    prompt: str
    answer: str

    def get_reward(self, completion):
        return float(completion == self.answer)


@pytest.mark.parametrize(("folder", "name"), [(".", "my-runs"), ("a b/ü c", "ü-c"), (".hidden", "-hidden"), ("../b:c", "b-c")])
def test_any_folder_can_be_the_output_dir_and_names_the_run(tmp_path, monkeypatch, folder, name):
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    Path("mine.txt").write_text("mine")
    trainer = make_trainer(folder)
    trainer.train()
    assert trainer.config.name == name
    assert [file.parent.resolve() for file in tmp_path.rglob("summary.json")] == [Path(folder).resolve()]
    assert Path("mine.txt").read_text() == "mine" and make_trainer(folder).train()["steps"] == 2


def test_items_may_be_objects_with_a_get_reward_method(tmp_path):
    summary = make_trainer(tmp_path / "out", rows=[Item(f"{i}+27=", str(i + 27)[::-1]) for i in range(10, 40)]).train()
    assert 0 <= summary["reward_after"] <= 1


def test_objects_keep_the_attributes_that_options_of_the_data_name(tmp_path):
    rows = [SimpleNamespace(prompt="11+11=", answer="22", text="22", role="S", other=1)] * 4
    options = {**OPTIONS, "data.completion": "text", "data.system": "role", "train.given_share": 0.5}
    trainer = make_trainer(tmp_path / "out", rows=rows, options=options)
    assert trainer.given.train_rows[0] == {"prompt": "11+11=", "answer": "22", "text": "22", "role": "S"}


def test_reward_functions_get_what_their_parameters_name() -> None:
    def of_columns(prompt, completion, hint):
        return float((prompt, completion, hint) == ("last", "right", "h"))

    def of_lists(completions, answers):
        return [2.0 * (completion == answer) for completion, answer in zip(completions, answers, strict=True)]

    async def slow(completion, answer):
        await asyncio.sleep(0)
        return 4.0 * (completion == answer)

    messages = [{"role": "system", "content": "first"}, {"role": "user", "content": "last"}]
    row = {"prompt": messages, "answer": ["other", "right"], "hint": "h"}
    (judged,) = as_rows([row], [of_columns, of_lists, slow])
    assert judged["get_reward"]("right") == 7.0 and judged["get_reward"]("other") == 6.0 and judged["get_reward"]("wrong") == 0.0

    async def in_a_notebook():
        return judged["get_reward"]("right")

    assert asyncio.run(in_a_notebook()) == 7.0


def test_reward_functions_of_completion_and_answer_are_summed(tmp_path):
    judged = []

    def reward(completion, answer):
        judged.append((completion, answer))
        return 0.25

    functions = [reward, lambda completion, answer: 0.5, lambda completion, answer: None]
    assert make_trainer(tmp_path / "out", reward_funcs=functions).train()["reward_after"] == 0.75
    assert {answer for _, answer in judged} == {str(i + 27)[::-1] for i in range(10, 14)}
    assert make_trainer(tmp_path / "one", reward_funcs=reward).train()["reward_after"] == 0.25
    assert make_trainer(tmp_path / "none", reward_funcs=None).train().get("reward_after") is None
    with pytest.raises(ConfigError, match=r"^reward_funcs=.*a list of functions"):
        make_trainer(tmp_path / "mixed", reward_funcs=[reward, "number"])


def failing_reward(completion):
    raise ValueError("my bug")


def named_right(completion, answer):
    return "right"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [{"prompt": "1+1=", "get_reward": failing_reward}] * 4}, r"test_api\.py:\d+: .*ValueError: my bug.*on the completion"),
        ({"rows": [{"prompt": "1+1=", "get_reward": lambda completion: "right"}] * 4}, r"returned 'right'.*finite number"),
        ({"rows": [{"prompt": "1+1=", "get_reward": lambda completion: float("nan")}] * 4}, r"returned nan.*finite number"),
        ({"reward_funcs": named_right}, r"^named_right returned 'right'; it must return a finite number, or None"),
        ({"reward_funcs": [lambda completion, answer: 1.0, named_right]}, r"^named_right returned 'right'; it must return a finite number"),
        ({"reward_funcs": lambda completion, answer: "1"}, r"^<lambda> returned '1'; it must return a finite number"),
        ({"reward_funcs": lambda completion, answer: float("nan")}, r"^<lambda> returned nan; it must return a finite number"),
        ({"reward_funcs": lambda completion, answer: failing_reward(completion)}, r"test_api\.py:\d+: .*ValueError: my bug"),
    ],
)
def test_a_reward_that_fails_is_a_mistake_in_the_data_with_its_line(tmp_path, arguments, message):
    with pytest.raises(RewardError, match=message) as caught:
        make_trainer(tmp_path / "out", **arguments).train()
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["exit_code"] == caught.value.exit_code == 65 and "\n" not in str(caught.value)


def test_what_a_run_prints_and_stores_names_arguments(tmp_path, capfd):
    for _ in range(2):
        make_trainer(tmp_path / "out").train()
    assert "for a new run, set output_dir=…" in capfd.readouterr().out
    with pytest.raises(OpdError) as caught:
        make_trainer(tmp_path / "worse", learning_rate=1e30, max_steps=30).train()
    reason = json.loads((tmp_path / "worse" / "status.json").read_text())["reason"]
    assert str(caught.value) in reason and "learning_rate" in reason and "optim.lr" not in reason


def test_datasets_may_be_generators(tmp_path):
    rows = [{"prompt": f"{i}+27=", "answer": str(i + 27)[::-1]} for i in range(10, 40)]
    listed = make_trainer(tmp_path / "list", rows=rows).train()
    settings = {"eval_steps": 0, "max_steps": 2, "batch_size": 2, "max_new_tokens": 8, "options": OPTIONS}
    datasets = iter(rows), (row for row in rows[:4])
    given = OnPolicyDistillationTrainer(str(STUDENT), str(TEACHER), *datasets, output_dir=tmp_path / "generator", **settings).train()
    assert given["eval_kl_after"] == listed["eval_kl_after"]


def judges_nothing(completion, answer):
    return None


@pytest.mark.parametrize(
    ("functions", "named"), [(judges_nothing, "judges_nothing"), ([judges_nothing, lambda one, other: None], "judges_nothing + <lambda>")]
)
def test_functions_that_judge_nothing_are_named_once(tmp_path, capfd, functions, named):
    warning = f"{named} judged none of 4 answers: '73' was not judged; return a number instead of None, or set reward_funcs=None"
    assert make_trainer(tmp_path / "out", reward_funcs=functions).train()["warnings"] == [warning]
    shown = capfd.readouterr().out
    assert shown.count("judged none of") == shown.count(f"warning: {warning}") == 1 and "eval.reward" not in shown and "exact" not in shown


def test_rows_without_an_answer_are_not_judged(tmp_path):
    rows = [{"prompt": "11+11="}, {"prompt": "12+11=", "answer": "32"}, {"prompt": "13+11="}, {"prompt": "14+11="}]
    assert make_trainer(tmp_path / "out", rows=rows).train()["reward_after"] is not None


def test_mistakes_name_the_argument(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"^train_dataset: "):
        OnPolicyDistillationTrainer(str(STUDENT), str(TEACHER), [], output_dir=tmp_path / "empty", options=OPTIONS)
    with pytest.raises(ConfigError, match=r"^learning_rate=-1"):
        make_trainer(tmp_path / "lr", learning_rate=-1)
    with pytest.raises(ConfigError, match=r"^max_steps='many': must be a whole number"):
        make_trainer(tmp_path / "steps", max_steps="many")
    with pytest.raises(ConfigError, match=r"^train_dataset: row 0 is a str"):
        OnPolicyDistillationTrainer("a", "b", ["1+1="])
    with pytest.raises(ConfigError, match=r"^eval_dataset: row 0 is a str"):
        OnPolicyDistillationTrainer("a", "b", [{"prompt": "1"}], ["1+1="])
    make_trainer(tmp_path / "out", learning_rate=1e-5).train()
    with pytest.raises(ConfigError, match=r"learning_rate was 1e-05, is 2e-05.*output_dir=") as refused:
        make_trainer(tmp_path / "out", learning_rate=2e-5).train()
    assert "name=" not in str(refused.value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use_accelerate=True"):
        make_trainer(tmp_path / "processes", use_accelerate=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ppo.advantage_clop": 2}, r"^ppo\.advantage_clop: no such option; did you mean ppo\.advantage_clip"),
        ({"lora": "default"}, r"lora.*a section; give the options in it one by one"),
        ({"seed": "first"}, r'^options=\{"seed": "first"\}: must be a whole number'),
        ({"ppo.beta": 3.0}, r'^options=\{"ppo\.beta": 3\.0\}: '),
        ({"data.mix.a.wait": 1}, r"^data\.mix\.a\.wait: no such option; did you mean weight"),
    ],
)
def test_mistakes_in_options_are_named_as_they_are_passed(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "out", options={**OPTIONS, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_step": 3}, "no argument max_step; did you mean max_steps"),
        ({"bf16": True}, "no argument bf16; other options are passed in"),
        ({"tokenizer": None}, "no argument tokenizer; it is processing_class"),
        ({"num_train_epochs": 1}, 'no argument num_train_epochs; it is options={"train.epochs": NUMBER}'),
    ],
)
def test_an_argument_that_does_not_exist_is_refused_with_the_one_that_was_meant(tmp_path, arguments, message):
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path / "out", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 5e-4, "options": {"optim.lr": 1e-3}}, r"^learning_rate=0\.0005: options has 0\.001 for it; leave one out"),
        ({"reward_funcs": len, "options": {"eval.reward": "number"}}, "^reward_funcs="),
        ({"rows": "rows.jsonl"}, r"^train_dataset='rows\.jsonl': must be rows, .*load_dataset\('json', data_files='rows\.jsonl'"),
        ({"eval_dataset": Path("rows.jsonl")}, r"^eval_dataset='rows\.jsonl': must be rows"),
        ({"options": ["a=1"]}, r'^options must be a mapping, for example \{"ppo\.advantage_clip": 2\.0\}, not list'),
        ({"options": []}, "^options must be a mapping"),
        ({"callbacks": [print, 3]}, "^callbacks: 3 must be a function of an event, or a transformers"),
        ({"callbacks": print}, "^callbacks must be a list"),
        ({"folder": ""}, "^output_dir='': name a folder"),
    ],
)
def test_arguments_that_say_two_things_or_are_of_another_kind_are_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**{"folder": tmp_path / "out", **arguments})


def test_an_added_callback_is_checked_and_made_of_its_class(tmp_path):
    trainer = make_trainer(tmp_path / "out", callbacks=(print, TrainerCallback))
    trainer.add_callback(TrainerCallback())
    with pytest.raises(ConfigError, match=r"^callbacks: 'log' must be a function"):
        trainer.add_callback("log")
    assert [type(callback) for callback in trainer.handler.callbacks] == [type(print), TrainerCallback, TrainerCallback]


def test_an_option_may_say_what_the_argument_says_or_refine_it(tmp_path):
    options = {**OPTIONS, "optim.lr": 1e-3, "train.max_steps": 2, "eval.max_new_tokens": 16}
    config = make_trainer(tmp_path / "out", max_steps=2, options=options).config
    assert (config.optim.lr, config.train.max_steps, config.eval.max_new_tokens, config.sampling.max_new_tokens) == (1e-3, 2, 16, 8)


def test_a_finished_run_is_not_that_of_other_rows_or_rewards(tmp_path):
    def finish(rows=ROWS, reward=lambda completion, answer: float(completion == answer)):
        return make_trainer(tmp_path / "out", rows=rows, eval_dataset=ROWS[:4], reward_funcs=reward, max_steps=1).train()

    assert finish() == finish()
    with pytest.raises(ConfigError, match=r"contains another run: train_dataset has other content than it had\. Set another output_dir"):
        finish(rows=ROWS[:20])
    with pytest.raises(ConfigError, match="reward_funcs has other content than it had"):
        finish(reward=lambda completion, answer: float(completion != answer))


def test_rows_that_are_none_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train_dataset=None: must be a list of rows"):
        OnPolicyDistillationTrainer(str(STUDENT), str(TEACHER), None, output_dir=tmp_path / "out")


def test_a_run_without_evaluation_rows_shows_no_empty_results(tmp_path, capfd):
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "out", eval_dataset=None, callbacks=[recorder])
    assert trainer.train()["reward_after"] is None and trainer.evaluate() == {}
    assert [line["step"] for line in trainer.state.log_history] == [1, 2]
    assert {call[0] for call in recorder.calls} == {"begin", "step", "log", "save", "end"} and ("log", False) not in recorder.calls
    assert make_trainer(tmp_path / "out", eval_dataset=None).train() and len(trainer.state.log_history) == 2
    shown = capfd.readouterr().out
    assert 'reaches only 18 % of learning_rate in 2 steps; set options={"optim.warmup_steps": 0}' in shown
    assert "nothing is evaluated" in shown and "step 2/2" in shown and "evaluation after" not in shown and "result" not in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=-1.0: must be above 0", "learning_rate=-1.0: must be above 0"),
        ("train.max_steps=-1: must be at least 1, or null for none", "max_steps=-1: must be at least 1, or None for none"),
        ("set another name=…, or resume=auto to resume it", "set another output_dir=…, or resume_from_checkpoint=True to resume it"),
        ("or set hydra.run.dir=FOLDER", "or set output_dir=FOLDER"),
        ("set eval.reward=null, or", "set reward_funcs=None, or"),
        ("set data.prompt=COLUMN", 'set options={"data.prompt": COLUMN}'),
        ("(resume_force=true resumes)", '(options={"resume_force": True} resumes)'),
        ("lower sampling.max_new_tokens or data.max_prompt_tokens", "lower max_new_tokens or data.max_prompt_tokens"),
        ("experiment=tiny needs no download", 'model="bundled:tiny-student" needs no download'),
        ("the name of /a/model.path=b in train.log, i.e. x=1", "the name of /a/model.path=b in train.log, i.e. x=1"),
        ("sampling.n_total=3", "sampling.n_total=3"),
    ],
)
def test_messages_are_in_the_words_of_the_api(text, expected):
    assert in_python(text) == expected
