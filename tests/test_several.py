"""Several datasets and several teachers: options, order, who scores what, loss weights, results of each dataset, resume."""

import copy
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import random_model
from fake_vllm import ScoringServer, running
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import compose
from test_served import Tokenizer
from test_step import PROMPTS, old_logp
from training_helpers import VOCABULARY, FixedSampler, make_prompts, make_sampler, make_trainer, rollout_lists, rollout_of, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.api import from_options
from opd.cli import main as cli
from opd.config.compose import PACKAGE, to_dict
from opd.config.options import TeacherConfig
from opd.data import arithmetic
from opd.data.order import Order, take
from opd.data.prompts import Prompt, first_of_each, labelled
from opd.data.rollouts import Rollout, collate, micro_batches
from opd.doctor import examine
from opd.errors import OK, USAGE, ConfigError, DataError, EngineError, TeacherError
from opd.evaluation.sample_score import load_pair
from opd.models.memory import estimate
from opd.objective.overlap import OVERLAP
from opd.report import render_report
from opd.runs.reader import open_run
from opd.samplers import of_teachers
from opd.teachers import LocalTeacher, ServedTeacher, as_one
from opd.train import main
from opd.training.build import build
from opd.training.checkpoint import Checkpoints
from opd.training.checks import COMPARED, check_scores
from opd.training.identity import check_same, differences
from opd.training.inputs import Given, load_prompts
from opd.training.loop import Trainer
from opd.training.tokens import Tokens

TEACHER = "bundled:tiny-teacher"
ARITHMETIC = {"data.source": "arithmetic", "data.path": None, "data.prompt": "prompt", "data.answer_after": None, "eval.reward": "exact"}
MODELS = {"model.path": "bundled:tiny-student", "teacher.path": TEACHER}


def mixed(**options):
    """Two datasets of the bundled task, `add` with `teacher`, `more` with one of its own."""
    own = "seed" if options.get("data.source", "arithmetic") == "arithmetic" else "weight"
    values = {"data.mix.add.weight": 2, f"data.mix.more.{own}": 1, "teachers.more.path": TEACHER}
    return from_options({**ARITHMETIC, **MODELS, **values, **{name.replace("__", "."): value for name, value in options.items()}})


# Options.


@pytest.mark.parametrize(
    ("options", "key", "remedy"),
    [
        ({"data.mix.add.promt": "x"}, "data.mix.add.promt: ", "prompt"),
        ({"data.mix.add.mix": {}}, "data.mix.add.mix: ", "loss_weight"),
        ({"data.mix.add.source": "gim"}, "data.mix.add.source=gim: ", "gym"),
        ({"data.mix.add.size": "x"}, "data.mix.add.size=x: ", "whole number"),
        ({"data.mix.add.size": 1}, "data.mix.add.size=1: ", "at least 2"),
        ({"data.mix.add.weight": 0}, "data.mix.add.weight=0.0: ", "above 0"),
        ({"data.mix.add.loss_weight": -1}, "data.mix.add.loss_weight=-1.0: ", "above 0"),
        ({"data.mix.add.source": "jsonl"}, "data.mix.add.train_path=None: ", "data.mix.add.train_path=FILE"),
        ({"data.mix": {"add": 3}}, "data.mix.add=3: ", "mapping"),
        ({"data.mix": {"a.b": {}}}, "data.mix=", "letters"),
        ({"teachers.ad.path": TEACHER}, "teachers.ad: ", "add"),
        ({"teachers.add.placement": "same"}, "teachers.add.path", "teachers.add.path=PATH"),
        ({"teachers.add": {"path": "a", "url": "a"}}, "teachers.add.url='a': ", "http://"),
        ({"teachers.add": {"path": "a", "pth": "a"}}, "teachers.add.pth: ", "path"),
        ({"teachers.add": {"path": "a", "placement": "device"}}, "teachers.add.device=None: ", "teachers.add.placement=device"),
        ({"teachers.add": {"path": "a", "url": "http://a"}, "ppo.estimator": "exact"}, "ppo.estimator=exact: ", "ppo.estimator=sampled"),
        ({"teachers.add": {"path": "bundled:tiny-student"}, "lora.rank": 2}, "lora.rank=2: ", "teachers.add.system"),
        ({"train.given_share": 0.5}, "train.given_share=0.5: ", "data.completion=COLUMN"),
        ({"control": "shuffled"}, "control=shuffled: ", "teachers={}"),
        ({"control": "self"}, "control=self: ", "teachers={}"),
        ({"teachers.add": {"path": "a", "weights": "ema"}}, "teachers.add.weights=ema: ", "teacher.weights"),
        ({"teachers.add": {"weights": "base"}}, "teachers.add.weights=base: ", "teachers.add.prompt"),
        ({"teachers.add": {"weights": "bse"}}, "teachers.add.weights=bse: ", "current"),
        ({"teachers.add": {"weights": "current", "prompt": "x", "dtype": "float32"}}, "teachers.add.dtype=", "teachers.add.dtype=auto"),
        ({"teachers.add": {"path": "a", "contrast": "x"}}, "teachers.add.contrast=x: ", "teacher.contrast"),
        ({"teacher.contrast": "x"}, "teacher.contrast='x': ", "teacher.contrast=null"),
        ({"teachers.add": {"path": "a", "alignment": "spans"}}, "teachers.add.alignment=spans: ", "without teachers"),
        ({"teacher.alignment": "spans"}, "teacher.alignment=spans: ", "teachers={}"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_mistake_in_an_entry_names_the_entry_and_the_remedy(options, key, remedy):
    with pytest.raises(ConfigError) as refused:
        mixed(**options)
    assert str(refused.value).startswith(key) and remedy in str(refused.value) and "\n" not in str(refused.value)


def test_an_entry_has_the_options_of_data_that_it_does_not_set_and_a_teacher_the_defaults():
    config = mixed(**{"data.max_prompt_tokens": 9, "data.mix.more.max_prompt_tokens": 8, "teacher.system": "s"})
    add, more = config.parts["add"], config.parts["more"]
    assert list(config.parts) == ["add", "more"] and list(config.parts_by_teacher) == ["", "more"]
    assert (add.data.max_prompt_tokens, more.data.max_prompt_tokens) == (9, 8)
    assert (add.teacher.system, more.teacher.system) == ("s", None)
    assert config.data.datasets["add"].weight == 2 and config.data.datasets["more"].weight == 1
    assert list(from_options(MODELS).parts) == [""]
    assert config.parts is config.parts and config == replace(config) == copy.deepcopy(config), "made once, and no part of the options"
    other = replace(config, seed=config.seed + 1)
    assert {part.seed for part in other.parts.values()} == {config.seed + 1} and to_dict(other) == {**to_dict(config), "seed": other.seed}


def test_the_command_line_and_an_experiment_set_single_options_and_whole_mappings(tmp_path):
    (tmp_path / "experiment").mkdir()
    content = "# @package _global_\ndata:\n  mix:\n    a: {path: x, weight: 2}\n    b: {path: y}\nteachers:\n  b: {path: z}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(content)
    config = compose("data=gym", "experiment=mine", "data.mix.a.weight=3", "data.mix.c.path=w", "teachers.c={path: v}", extra=tmp_path)
    assert {label: data.path for label, data in config.data.datasets.items()} == {"a": "x", "b": "y", "c": "w"}
    assert config.data.datasets["a"].weight == 3
    assert {label: part.teacher.path for label, part in config.parts_by_teacher.items() if label} == {"b": "z", "c": "v"}
    assert compose("data=gym", "data.mix={a: {path: x}, b: {}}").data.datasets["a"].path == "x"


def test_a_loaded_teacher_does_not_go_with_several(make_model, tmp_path):
    with pytest.raises(ConfigError, match=r"^teachers: .*leave one of them out"):
        build(mixed(), Accelerator(cpu=True), Checkpoints(tmp_path, 1, False), Given(teacher=make_model()), ExitStack(), None)


def test_teacher_is_not_used_where_every_dataset_has_one_and_one_server_sets_the_temperature():
    served = {"teachers.more.url": "http://a", "sampling.temperature": 0.7}
    assert "" not in mixed(**{"teachers.add.path": "x", "teacher.url": "http://a"}).parts_by_teacher
    assert not mixed(**{"teachers.add.path": "x", "teacher.url": "http://a"}).is_served
    assert mixed(**served).temperature == 1 and {part.temperature for part in mixed(**served).parts.values()} == {1.0}


def test_where_a_teacher_is_may_change_on_resume_and_which_it_is_may_not():
    old = {"teachers": {"a": {"path": "x"}}}
    assert differences(old, {"teachers": {"a": {"path": "x", "placement": "offload", "url": "http://a"}}}) == []
    assert differences(old, {"teachers": {"a": {"path": "y"}}}) == ["teachers.a.path was x, is y"]
    assert differences({"data": {}}, {"data": {"mix": {}}, "teachers": {}}) == []  # an older run


def test_a_run_of_before_an_option_existed_resumes_with_the_options_default(tmp_path):
    wanted = {"config": to_dict(from_options(MODELS)), "files": {}, "prompts_per_step": 4}
    stored = copy.deepcopy(wanted)
    for option in ("weights", "ema", "prompt", "url"):
        del stored["config"]["teacher"][option]
    del stored["config"]["ppo"]["temperature"], stored["config"]["teachers"], stored["config"]["data"]["mix"]
    assert check_same(stored, wanted, tmp_path, force=False) == []
    wanted["config"]["teacher"]["weights"] = "base"
    with pytest.raises(ConfigError, match=r"teacher\.weights was own, is base"):
        check_same(stored, wanted, tmp_path, force=False)


# The order.


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    shares=st.lists(st.sampled_from([0.1, 1.0, 2.5, 7.0]), min_size=4, max_size=4),
    seed=st.integers(0, 3),
)
@settings(max_examples=60)
def test_each_dataset_has_its_share_and_every_prompt_once_per_epoch(sizes, shares, seed):
    datasets = [label for label, size in zip("abcd", sizes, strict=False) for _ in range(size)]
    weights = dict(zip("abcd", shares, strict=True))
    drawn = [Order(seed, datasets, weights).at(position) for position in range(60)]
    jumping = Order(seed, datasets, weights)
    assert [jumping.at(position) for position in reversed(range(60))] == drawn[::-1]
    total = sum(weights[label] for label in set(datasets))
    for label in set(datasets):
        own = [(epoch, index) for epoch, index in drawn if datasets[index] == label]
        size = datasets.count(label)
        assert [epoch for epoch, _ in own] == [place // size for place in range(len(own))]
        assert len(set(own)) == len(own)
        for count in range(61):
            had = sum(datasets[index] == label for _, index in drawn[:count])
            assert abs(had - count * weights[label] / total) <= len(sizes) - 1


def test_one_dataset_has_the_order_that_it_always_had_and_several_are_shuffled_apart():
    order = Order(3, [""] * 7, {})
    assert [order.at(position) for position in range(30)] == take(3, 7, 0, 30)
    both = Order(0, ["a"] * 50 + ["b"] * 50, {"a": 1.0, "b": 1.0})
    drawn = [both.at(position)[1] for position in range(100)]
    assert [index for index in drawn if index < 50] != [index - 50 for index in drawn if index >= 50]


def test_sample_ids_are_unique_over_datasets_and_count_rows_that_were_dropped():
    first, second = [Prompt(0, (1,), ""), Prompt(2, (1,), "")], [Prompt(0, (1,), "")]
    prompts = labelled({"a": first, "b": second}, {"a": 3, "b": 1}, {"a": "", "b": "b"})
    assert [(prompt.sample_id, prompt.dataset, prompt.teacher) for prompt in prompts] == [(0, "a", ""), (2, "a", ""), (3, "b", "b")]
    assert first_of_each(prompts, 1) == [prompts[0], prompts[2]] and first_of_each(prompts, None) == prompts


def test_an_error_in_the_rows_of_a_dataset_names_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    for name, extra in (("add", ', "answer": "2"'), ("more", "")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "1"{extra}}}\n' * 20)
    files = {f"data.mix.{label}.train_path": str(tmp_path / f"{label}.jsonl") for label in ("add", "more")}
    options = {"data.source": "jsonl", **files}
    with pytest.raises(DataError, match=r"^data\.mix\.more\.answer=answer: .*data\.mix\.more\.answer=COLUMN"):
        load_prompts(mixed(**options), tokenizer, Given())
    config = mixed(**options, **{"data.mix.more.answer": None})
    train, evaluation = load_prompts(config, tokenizer, Given())  # the rewards are those of `add`
    assert [prompt.sample_id for prompt in train] == list(range(36))
    assert [(prompt.dataset, prompt.teacher, prompt.answers) for prompt in evaluation] == [("add", "", ("2",))] * 2 + [
        ("more", "more", ())
    ] * 2
    with pytest.raises(ConfigError, match=r"^data\.mix: rows were passed"):
        load_prompts(config, tokenizer, Given(train_rows=[{"prompt": "1"}]))


# Given completions.


def test_each_dataset_may_have_completions(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    options = {**write_rows(tmp_path), "data.mix.add.completion": "answer", "train.given_share": 0.5}
    config = mixed(**options)
    assert [part.train.given_share for part in config.parts.values()] == [0.5, 0]
    train, evaluation = load_prompts(config, tokenizer, Given())
    assert {prompt.dataset for prompt in train if prompt.given} == {"add"} != {prompt.dataset for prompt in train}
    assert all(prompt.given for prompt in train if prompt.dataset == "add") and not any(prompt.given for prompt in evaluation)
    with pytest.raises(DataError, match=r"^data\.mix\.add\.completion=none: .*data\.mix\.add\.completion"):
        load_prompts(mixed(**{**options, "data.mix.add.completion": "none"}), tokenizer, Given())


@pytest.mark.parametrize("label", ["a", "b"])
def test_the_share_of_given_completions_holds_in_a_dataset_that_takes_turns_with_another(tmp_path, label):
    """Over all rows a quarter would be every fourth, which always belongs to the same dataset."""
    prompts = [replace(prompt, dataset="ab"[index >= 5]) for index, prompt in enumerate(make_prompts())]
    prompts = [replace(prompt, given=((5, 1),)) if prompt.dataset == label else prompt for prompt in prompts]
    mix = {name: {"source": "arithmetic", "completion": "answer" if name == label else None} for name in "ab"}
    options = {"data__mix": mix, "train__given_share": 0.25, "sampling__n": 1, "train__batch_size": 2}
    trainer = make_trainer(tmp_path, prompts=prompts, **options)
    counts = [len(trainer.batch(step)[1]) for step in range(40)]
    assert 9 <= sum(counts) <= 11


# Who scores what.


def assigned(rollout: Rollout, label: str) -> Rollout:
    """Return the rollout of a dataset with a teacher of its own or, for an empty label, of `teacher`."""
    request = replace(rollout.request, prompt=replace(rollout.request.prompt, dataset=label or "plain", teacher=label))
    return replace(rollout, request=request)


@given(rollouts=rollout_lists(), labels=st.lists(st.sampled_from(["", "a", "b"]), min_size=7, max_size=7), budget=st.integers(5, 60))
@settings(max_examples=60)
def test_a_micro_batch_has_one_teacher_and_is_a_slice_of_the_table(rollouts, labels, budget):
    rollouts = [assigned(rollout, label) for rollout, label in zip(rollouts, labels, strict=False)]
    batches = micro_batches(rollouts, budget, pad_id=0)
    seen = [batch.teacher_inputs.teacher for batch in batches]
    assert seen == sorted(seen)  # teachers take turns once
    for batch in batches:
        assert {rollouts[index].request.prompt.teacher for index in batch.rollouts} == {batch.inputs.teacher}
    table = Tokens(rollouts, torch.device("cpu"))
    assert table.rollout_N.tolist() == [index for batch in batches for index in batch.rollouts for _ in rollouts[index].trained]


def two_teachers(folder: Path, rollouts: list[Rollout], **options) -> tuple[Trainer, list[torch.nn.Module]]:
    """Return a trainer on these rollouts whose teacher `a` is another model, and both models."""
    models = [random_model(VOCABULARY, seed=seed, hidden=24).requires_grad_(False) for seed in (2, 5)]
    trainer = make_trainer(folder, teacher=models[0], train__max_tokens_per_micro_batch=9, **options)
    trainer.scoring.teacher = as_one({label: LocalTeacher(model, VOCABULARY) for label, model in zip(("", "a"), models, strict=True)})
    trainer.sampler = FixedSampler(rollouts)
    return trainer, models


def two_datasets() -> list[Rollout]:
    """Return rollouts of two datasets in turns, of unequal lengths."""
    completions = [(5,), (7, 8, 9, 10, 11, 12, 1), (6, 1), (13, 14, 15)]
    rollouts = [rollout_of(PROMPTS[index % 3], completion, index=index) for index, completion in enumerate(completions)]
    return [assigned(rollout, label) for rollout, label in zip(rollouts, ["a", "", "a", ""], strict=True)]


def test_each_rollout_has_the_scores_of_its_own_teacher(tmp_path):
    trainer, models = two_teachers(tmp_path, two_datasets())
    tokens = trainer.begin_step()
    for index, rollout in enumerate(tokens.rollouts):
        expected = old_logp(trainer, models[rollout.request.prompt.teacher == "a"], rollout)
        torch.testing.assert_close(tokens.of_rollout(index)["teacher_logp"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["sampled", "exact", "topk"])
def test_the_gradient_is_the_weighted_mean_of_those_of_the_datasets_alone(tmp_path, estimator, reduction):
    """Each with its own teacher; the mean over tokens, or sequences, times the weights of their datasets."""
    options = {"ppo__estimator": estimator, "ppo__reduction": reduction}

    def gradient(rollouts: list[Rollout], loss_weights: dict[str, float]) -> tuple[torch.Tensor, float]:
        trainer, _ = two_teachers(tmp_path, rollouts, **options)
        trainer.scoring.loss_weights = loss_weights
        tokens = trainer.begin_step()
        weight_R, total = trainer.scoring.token_weights(tokens.rollouts)
        trainer.scoring.gradients(tokens, weight_R[tokens.rollout_N], total)
        return torch.cat([parameter.grad.double().flatten() for parameter in trainer.student.parameters()]), total

    rollouts = two_datasets()
    own, own_count = gradient([rollout for rollout in rollouts if rollout.request.prompt.teacher == "a"], {})
    plain, plain_count = gradient([rollout for rollout in rollouts if rollout.request.prompt.teacher == ""], {})
    assert (own_count, plain_count) == ((2, 2) if reduction == "sequence" else (3, 10))
    for weight in (1.0, 4.0):
        both, total = gradient(rollouts, {"a": weight})
        assert total == weight * own_count + plain_count
        torch.testing.assert_close(both, (weight * own_count * own + plain_count * plain) / total, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(own, plain, atol=1e-3)


def test_one_of_the_teachers_may_be_served_and_its_errors_name_it(tmp_path):
    trainer, models = two_teachers(tmp_path, two_datasets(), ppo__temperature=1.0, teacher__url="http://a")
    local = trainer.begin_step().columns["teacher_logp"]
    with running(ScoringServer(models[1], Tokenizer())) as fake:
        remote = ServedTeacher(TeacherConfig(url=fake.url, timeout=5.0), Tokenizer(), VOCABULARY, 40, [1, 5, 9])
        trainer.scoring.teacher = as_one({"": LocalTeacher(models[0], VOCABULARY), "a": remote})
        tokens = trainer.begin_step()
        torch.testing.assert_close(tokens.columns["teacher_logp"], local, atol=1e-4, rtol=0)

        tokens.columns["logp"] = tokens.columns["behaviour_logp"]
        tokens.columns["teacher_logp"][:10] = 0.0  # those of the other teacher, which nobody checks
        check_scores(trainer.scoring, ["a"], tokens)
        tokens.columns["teacher_logp"][10:] = 0.0
        check_scores(trainer.scoring, ["a"], tokens)  # once a run
        del trainer.scoring.choices[COMPARED]
        with pytest.raises(EngineError, match=r"^teachers\.a\.url: two scorings"):
            check_scores(trainer.scoring, ["a"], tokens)
        fake.fault = lambda handler, body, answer: handler.reply({})
        with pytest.raises(TeacherError, match=r"^teachers\.a\.url="):
            trainer.begin_step()


def test_a_served_and_a_local_teacher_have_the_same_columns_where_the_server_sends_few_ids(tmp_path):
    options = {"ppo__temperature": 1.0, "ppo__estimator": "topk", "ppo__k": 8, "teacher__url": "http://a"}
    trainer, models = two_teachers(tmp_path, two_datasets(), **options)
    with running(ScoringServer(models[1], Tokenizer())) as fake:
        remote = ServedTeacher(TeacherConfig(url=fake.url, timeout=5.0), Tokenizer(), VOCABULARY, 40, [1, 5, 9], 8)
        for teachers in ({"": LocalTeacher(models[0], VOCABULARY), "a": remote}, {"": remote, "a": LocalTeacher(models[0], VOCABULARY)}):
            trainer.scoring.teacher = as_one(teachers)
            tokens = trainer.begin_step()
            assert trainer.scoring.update(tokens) is None
            assert len(tokens.columns["reverse_kl"]) == 13 and not set(OVERLAP) & set(tokens.columns)


def mixed_trainer(folder: Path) -> Trainer:
    """Return a trainer that samples from two datasets, each with a teacher."""
    names = ["a"] * 6 + ["plain"] * 4
    prompts = [replace(prompt, dataset=name, teacher="a" * (name == "a")) for prompt, name in zip(make_prompts(), names, strict=True)]
    mix = {"a": {"weight": 2, "source": "arithmetic"}, "plain": {"source": "arithmetic", "loss_weight": 3}}
    options = {"data__mix": mix, "teachers": {"a": {"path": "x"}}, "ppo__steps": 2, "optim__schedule": "constant"}
    trainer, _ = two_teachers(folder, [], prompts=prompts, **options)
    trainer.sampler = make_sampler(trainer.student)
    trainer.scoring.loss_weights = {"plain": 3.0}
    return trainer


def test_a_run_resumed_between_inner_steps_is_bitwise_the_undisturbed_one(tmp_path):
    undisturbed = mixed_trainer(tmp_path / "one")
    labels = [[rollout.request.prompt.dataset for rollout in undisturbed.train_step().tokens.rollouts] for _ in range(3)]
    assert labels == [["a", "a", "plain", "plain", "a", "a"]] * 3
    stopped = mixed_trainer(tmp_path / "two")
    stopped.train_step()
    stopped.tokens = stopped.begin_step()
    stopped.inner_step(stopped.tokens)
    stopped.save()
    resumed = mixed_trainer(tmp_path / "two")
    resumed.resume(resumed.checkpoints.newest())
    assert {rollout.request.prompt.teacher for rollout in resumed.tokens.rollouts} == {"", "a"}
    done = [resumed.train_step() for _ in range(2)][-1]
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert done.metrics["data/a/tokens"] + done.metrics["data/plain/tokens"] == done.metrics["tokens"]
    means = [done.metrics[f"data/{label}/tokens"] * done.metrics[f"data/{label}/reverse_kl"] for label in ("a", "plain")]
    assert sum(means) == pytest.approx(done.metrics["tokens"] * done.metrics["reverse_kl"])


# Whole runs.

RUN = ["experiment=debug", "device=cpu", "eval.limit=6", "eval.kl_prompts=3", "eval.steps=0", "train.max_steps=2", "ppo.estimator=exact"]
RUN += ["train.given_share=0.5", "ppo.reference_coef=0.1"]
ADD = "add: {weight: 2, train_path: add.jsonl, completion: answer}"
MIX = [f"data.mix={{{ADD}, more: {{train_path: more.jsonl, loss_weight: 2}}}}", "data=jsonl"]
MIX += [f"teachers.more.path={TEACHER}", "teachers.more.dtype=float32"]


def write_rows(folder: Path) -> dict[str, str]:
    """Write a file of 100 rows for each dataset. Returns the options that name them."""
    for seed, name in enumerate(("add", "more")):
        rows = arithmetic.rows("eval", seed)[:100]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.source": "jsonl", **{f"data.mix.{name}.train_path": str(folder / f"{name}.jsonl") for name in ("add", "more")}}


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    """A finished run on two datasets with two teachers."""
    root = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_rows(root)
        assert main([*RUN, *MIX, "name=run", "teachers.more.placement=offload"]) == OK
    return root / "runs" / "run"


def test_results_of_each_dataset_are_logged_summarised_and_reported(mixed_run):
    evaluations = [json.loads(line) for line in (mixed_run / "evaluations.jsonl").read_text().splitlines()]
    for line in evaluations:
        results = line["datasets"]
        assert list(results) == ["add", "more"] and [result["rewards"]["count"] for result in results.values()] == [6, 6]
        assert sum(result["rewards"]["mean"] for result in results.values()) / 2 == pytest.approx(line["rewards"]["mean"])
        assert [reward for result in results.values() for reward in result["rewards"]["each"]] == line["rewards"]["each"]
        masses = [result["overlap"]["mass"] for result in results.values() if result["overlap"]]
        assert line["model"] == "teacher" or min(masses) <= line["overlap"]["mass"] <= max(masses)
    summary = json.loads((mixed_run / "summary.json").read_text())
    assert summary["datasets"]["more"]["reward_teacher"] == evaluations[0]["datasets"]["more"]["rewards"]["mean"] > 0.9
    assert summary["datasets"]["add"]["eval_kl_after"] == evaluations[-1]["datasets"]["add"]["kl"] > 0
    assert sum(result["graded_tokens"] for result in summary["datasets"].values()) == summary["graded_tokens"]
    kl = sorted(result["kl"] for result in evaluations[-1]["datasets"].values())
    assert kl[0] < evaluations[-1]["kl"] < kl[1]
    metrics = [json.loads(line) for line in (mixed_run / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("given/rollouts", 0) for line in metrics) > 0 and all("reference_kl" in line for line in metrics)
    page = render_report([open_run(mixed_run)])
    assert 'id="datasets"' in page and ">add<" in page and f"{TEACHER} (more)" in page
    stored = [json.loads(line)["dataset"] for line in (mixed_run / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert stored[0] == "add"


def test_the_same_command_resumes_and_another_teacher_or_weight_does_not(mixed_run, tmp_path, monkeypatch, capfd):
    shutil.copytree(mixed_run.parent.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, *MIX, "name=run"]) == OK  # another placement
    for change in ("teachers.more.path=bundled:tiny-student", "data.mix.add.weight=3"):
        assert main([*RUN, *MIX, "name=run", change]) == USAGE
        assert change.partition("=")[0] in capfd.readouterr().err


def test_the_doctor_and_the_memory_estimate_know_all_teachers_and_datasets(tmp_path):
    options = {"sampling.max_new_tokens": 4, "eval.max_new_tokens": 8, "device": "cpu", "model.dtype": "float32"}
    options |= write_rows(tmp_path)
    report = examine(mixed(**options, **{"sampling.dtype": "trainer", "eval.kl_prompts": 2}), prompts=2)
    assert report.ready, report.findings
    found = {finding.check: finding.what for finding in report.findings}
    assert "90 rows" in found["columns"] and found["answers"].startswith("20 of 20")
    assert len(report.figures["rewards"]["student"]) == 4 and set(report.rendered) == {
        f"{label}: {role}" for label in ("add", "more") for role in ("student", "teacher")
    }
    cpu = torch.device("cpu")
    one = estimate(from_options({**ARITHMETIC, **MODELS}), 1, cpu).resident["teacher"]
    assert estimate(mixed(), 1, cpu).resident["teacher"] == 2 * one


def test_teachers_that_are_the_student_share_its_copy(tmp_path):
    """Each scores with the weights that it names, and what it reads."""
    views = {label: {"weights": weights, "system": label} for label, weights in (("a", "base"), ("b", "base"), ("c", "current"))}
    write_rows(tmp_path)
    mix = {label: {"source": "jsonl", "train_path": str(tmp_path / "add.jsonl")} for label in views}
    options = {**ARITHMETIC, **MODELS, "device": "cpu", "model.dtype": "float32", "data.mix": mix, "teachers": views, "sampling.n": 1}
    config = from_options({**options, "sampling.max_new_tokens": 4, "train.batch_size": 3})
    trainer = build(config, Accelerator(cpu=True), Checkpoints(tmp_path, 1, False), Given(), ExitStack(), None).trainer
    modules = {label: teacher.model for label, teacher in trainer.scoring.teacher.teachers.items()}
    assert modules["a"] is modules["b"] is not trainer.student and modules["c"] is trainer.student
    start = copy.deepcopy(trainer.student)
    with torch.no_grad():
        trainer.student.get_input_embeddings().weight *= 1.1
    tokens = trainer.begin_step()
    assert {rollout.request.prompt.teacher for rollout in tokens.rollouts} == {*views}
    for index, rollout in enumerate(tokens.rollouts):
        batch = collate([rollout], [0], pad_id=0)
        scorer = trainer.student if rollout.request.prompt.teacher == "c" else start
        expected = LocalTeacher(scorer, trainer.scoring.teacher.teachers["a"].vocabulary).logp(
            batch.teacher_inputs, batch.ids_N, config.temperature
        )
        torch.testing.assert_close(tokens.of_rollout(index)["teacher_logp"], expected, atol=1e-5, rtol=0)
        assert rollout.request.prompt.teacher_ids != rollout.request.prompt.ids
    cpu, weights = torch.device("cpu"), sum(weight.numel() for weight in start.parameters()) * start.dtype.itemsize
    assert estimate(config, 1, cpu).resident["teacher"] == pytest.approx(weights, rel=0.01)


def test_each_teacher_is_active_while_its_own_prompts_are_answered():
    """Of two that are the student, one without its adapters and one with them."""

    class Adapters:
        are_on = True

        def disable_adapter_layers(self):
            self.are_on = False

        def enable_adapter_layers(self):
            self.are_on = True

    class Recorder(FixedSampler):
        def sample(self, requests, *_):
            seen.append((requests[0].prompt.teacher, adapters.are_on))
            return self.rollouts

    adapters, seen, rollouts = Adapters(), [], two_datasets()[:2]
    models = {"": LocalTeacher(random_model(), VOCABULARY), "a": LocalTeacher(random_model(), VOCABULARY, adapters)}
    sampler = of_teachers({label: Recorder(rollouts[:1]) for label in models}, models)
    with as_one(models).active():
        sampler.sample([rollout.request for rollout in rollouts], None, "evaluation")
    assert sorted(seen) == [("", True), ("a", False)] and adapters.are_on


def test_a_run_whose_student_teaches_one_of_the_datasets_is_evaluated_against_its_start(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    words = ["data=jsonl", "data.mix={add: {train_path: add.jsonl}, more: {train_path: more.jsonl}}", "optim.lr=1e-3"]
    words += ["teachers.more.weights=base", "teachers.more.system='12'", "train.max_steps=1", "eval.limit=1", "eval.kl_prompts=2"]
    assert main([*RUN[:-2], *words, "name=run"]) == OK
    summary = json.loads(Path("runs/run/summary.json").read_text())["datasets"]
    capfd.readouterr()
    assert cli.main(["eval", "runs/run", "--json"]) == OK
    tasks = json.loads(capfd.readouterr().out)["tasks"]
    for label in ("add", "more"):
        assert tasks[f"data.mix.{label}"]["models"]["model"]["kl"] == pytest.approx(summary[label]["eval_kl_after"], rel=1e-4)
    assert "the student itself (base) (more)" in Path("runs/run/report.html").read_text()


def test_a_text_of_no_dataset_needs_a_teacher_that_is_named():
    with pytest.raises(ConfigError, match=rf"^teachers: .*--teacher {TEACHER}"):
        load_pair(mixed(**{"teachers.add.path": TEACHER}))
    assert load_pair(mixed(device="cpu")).config.teacher.path == TEACHER


# Two teachers and one student.


def digits_without_carry() -> list[dict[str, str]]:
    """Return a task like addition, in another notation: digits are added without carry, the last one first ("27*85=" -> "20")."""
    generator = torch.Generator().manual_seed(0)
    pairs = [divmod(index, 90) for index in torch.randperm(8100, generator=generator).tolist()]
    numbers = [(a + 10, b + 10) for a, b in pairs]
    return [{"prompt": f"{a}*{b}=", "answer": f"{(a + b) % 10}{(a // 10 + b // 10) % 10}"} for a, b in numbers]


def teach(rows: list[dict[str, str]], folder: Path, steps: int = 60) -> None:
    """Train the bundled teacher on the answers to another task, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-teacher")
    model = AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / "tiny-teacher", dtype=torch.float32)
    chats = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    ids_RT = torch.tensor([tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"] for chat in chats])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        batch_BT = ids_RT[torch.randint(7000, (64,))]
        logits_BTV = model(batch_BT[:, :-1]).logits[:, -3:]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, -3:].flatten()).backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.long
def test_one_student_learns_two_tasks_from_two_teachers_and_not_from_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = digits_without_carry()
    teach(rows, tmp_path / "digits")
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["experiment=tiny", "device=cpu", "data.mix.sums.weight=1", "ppo.estimator=exact", "optim.lr=2e-3"]
    command += ["data.mix.digits={source: jsonl, train_path: digits.jsonl}", "eval.limit=100", "eval.steps=0"]
    command += ["train.max_steps=80", "train.batch_size=32", "checkpoint.every=80"]
    assert main([*command, "name=two", "teachers.digits.path=./digits", "teachers.digits.dtype=float32"]) == OK
    assert main([*command, "name=one"]) == OK
    two, one = (json.loads((tmp_path / "runs" / name / "summary.json").read_text())["datasets"] for name in ("two", "one"))
    assert two["digits"]["reward_teacher"] > 0.9 and one["digits"]["reward_teacher"] < 0.2
    assert two["digits"]["reward_before"] < 0.2
    assert two["digits"]["reward_after"] > 0.5 and one["digits"]["reward_after"] < 0.2
    for run in (two, one):
        assert run["sums"]["reward_after"] > run["sums"]["reward_before"] + 0.1


class Expecting:
    """A teacher that records the rollouts it is to expect."""

    def expect(self, rollouts):
        self.expected = [rollout.request.prompt.sample_id for rollout in rollouts]


def test_each_teacher_is_told_of_its_own_finished_rollouts():
    rollouts = [rollout_of((3,), (4, 1), index=index) for index in range(3)]
    rollouts = [
        replace(one, request=replace(one.request, prompt=replace(one.request.prompt, teacher="a" * (index % 2))))
        for index, one in enumerate(rollouts)
    ]
    teachers = {"": Expecting(), "a": Expecting()}
    as_one(teachers).expect(rollouts)
    assert [teacher.expected for teacher in teachers.values()] == [[0, 2], [1]]
