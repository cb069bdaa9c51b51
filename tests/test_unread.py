"""Options that nothing reads are refused, unless a shipped file sets them or a member of the sweep reads them."""

import json
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_config import compose, raw

from opd.api import from_options
from opd.cli import hydra_app
from opd.cli import main as cli
from opd.cli.implied import implied_data
from opd.config import compose as store
from opd.config.unread import READERS
from opd.errors import DATA, OK, USAGE, ConfigError
from opd.runs.reader import open_run
from opd.train import main as train

GYM, JSONL = {"data.source": "gym"}, {"data.source": "jsonl", "data.train_path": "a.jsonl"}
ARITHMETIC, EXACT, TOPK = {"data.source": "arithmetic"}, {"ppo.estimator": "exact"}, {"ppo.estimator": "topk"}
VLLM, SERVED = {"sampling.engine": "vllm"}, {"teacher.url": "http://a:1"}
BY_SERVER = {**VLLM, "sampling.vllm.url": "http://a:2"}
NOTHING: dict[str, Any] = {}
NO_REWARD, NO_KL = {"eval.reward": None}, {"eval.kl_prompts": 0}
# Options with which each conditional one is read, with which it is not, and a value other than the default.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "data.path": (NOTHING, ARITHMETIC, "a/b"),
    "data.subset": (NOTHING, GYM, "socratic"),
    "data.train_split": (NOTHING, ARITHMETIC, "train[:9]"),
    "data.eval_split": (NOTHING, JSONL, "train[:9]"),
    "data.train_path": (JSONL, NOTHING, "b.jsonl"),
    "data.eval_path": (JSONL, ARITHMETIC, "b.jsonl"),
    "data.size": (ARITHMETIC, NOTHING, 20),
    "data.options": (GYM, JSONL, {"a": 1}),
    "data.seed": (ARITHMETIC, NOTHING, 1),
    "data.answer_after": (NOTHING, {"data.answer": None}, "Answer:"),
    "lora.alpha": ({"lora.rank": 4}, NOTHING, 8),
    "lora.targets": ({"lora.rank": 4}, NOTHING, ["q_proj"]),
    "teacher.timeout": (SERVED, NOTHING, 5.0),
    "teacher.canary_every": (SERVED, NOTHING, 5),
    "teacher.ema": ({"teacher.weights": "ema", "teacher.system": "x"}, NOTHING, 0.5),
    "teacher.device": ({"teacher.placement": "device"}, NOTHING, "cuda:1"),
    "sampling.memory_share": (VLLM, BY_SERVER, 0.5),
    "sampling.vllm.url": (VLLM, NOTHING, "http://a:3"),
    "sampling.vllm.weights_folder": (BY_SERVER, VLLM, "folder"),
    "sampling.vllm.timeout": (BY_SERVER, NOTHING, 5.0),
    "ppo.divergence": (TOPK, NOTHING, "forward_kl"),
    "ppo.k": (TOPK, EXACT, 5),
    "ppo.beta": ({**EXACT, "ppo.divergence": "jsd"}, TOPK, 0.25),
    "ppo.clip_eps": ({"ppo.steps": 2}, NOTHING, 0.3),
    "ppo.advantage_clip": (NOTHING, EXACT, 2.0),
    "ppo.importance_cap": (NOTHING, TOPK, None),
    "ppo.baseline": (NOTHING, EXACT, True),
    "ppo.discount": (NOTHING, TOPK, 0.5),
    "ppo.reward_coef": ({"sampling.n": 2}, {**EXACT, "sampling.n": 2}, 0.5),
    "eval.limit": (NOTHING, NO_REWARD, 5),
    "eval.max_new_tokens": (NOTHING, NO_REWARD, 5),
    "eval.reward_seconds": ({"eval.reward": "math"}, {"eval.reward": "exact"}, 1.0),
    "eval.reward_memory": ({"eval.reward": "a:b"}, NO_REWARD, 10),
    "eval.batch_size": (NO_REWARD, {**NO_REWARD, **NO_KL}, 5),
    "eval.kl_max_new_tokens": (NOTHING, NO_KL, 5),
    "track.project": ({"track.tool": "tensorboard"}, NOTHING, "mine"),
}


@pytest.mark.parametrize("key", [key for key in store.options() if key in CASES])
def test_each_conditional_option_is_accepted_where_it_is_read_and_refused_where_it_is_not(key: str) -> None:
    read, unread, value = CASES[key]
    assert attrgetter(key)(from_options({**read, key: value})) == value
    with pytest.raises(ConfigError) as refused:
        from_options({**unread, key: value})
    assert str(refused.value).startswith(f"{key}=") and READERS[key].choice in str(refused.value) and "\n" not in str(refused.value)


def test_every_conditional_option_is_an_option_and_has_a_case() -> None:
    assert READERS.keys() == CASES.keys() | {"eval.samples"} <= store.options().keys()


def test_answers_per_prompt_are_read_by_opd_eval_alone(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "device=cpu", "eval.samples=2", "eval.temperature=0.7"]
    for verb in ("train", "doctor"):
        assert cli.main([verb, *words]) == USAGE
        shown = capfd.readouterr()
        assert "eval.samples=2: is only read by opd eval: remove it" in shown.err + shown.out
    assert cli.main(["eval", *words, "eval.reward=null"]) == USAGE
    assert "eval.samples=2: is only read with eval.reward: set that" in capfd.readouterr().err
    assert store.to_config(raw(*words), words, verb="eval").eval.samples == 2
    with pytest.raises(ConfigError, match=r"eval\.samples=2: .*opd eval"):
        from_options({"eval.samples": 2, "eval.temperature": 0.7})
    stored = store.to_dict(store.to_config(raw(*words), words, verb="eval"))
    assert store.to_unchecked_config(store.restore_config(stored)).eval.samples == 2, "of runs that were begun with it"


def test_values_of_shipped_files_that_another_choice_leaves_unread_are_accepted_unless_they_are_typed() -> None:
    assert compose("experiment=tiny", "ppo.estimator=exact").ppo.advantage_clip == 2
    assert compose("experiment=tiny", "eval.reward=null").eval.max_new_tokens == 8
    assert compose("experiment=smollm2", "data=jsonl", "data.train_path=a").data.path == "chain_sum"
    words = ["experiment=tiny", "ppo.estimator=exact", "ppo.advantage_clip=2.0"]
    with pytest.raises(ConfigError, match=r"ppo\.advantage_clip=2\.0: .*ppo\.estimator=sampled"):
        store.to_config(raw(*words), words)
    assert store.to_config(raw(*words), words, frozenset({"ppo.estimator"})).ppo.advantage_clip == 2  # another member reads it
    assert store.to_config(raw(*words[:2], "ppo.k=64"), ["ppo.k=64"]).ppo.k == 64  # the default


def test_an_unread_value_of_a_file_of_ones_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nppo:\n  divergence: forward_kl\n")
    with pytest.raises(ConfigError, match=r"ppo\.divergence=forward_kl: .*ppo\.estimator=exact"):
        compose("experiment=mine", extra=tmp_path)
    assert compose("experiment=mine", "ppo.estimator=exact", extra=tmp_path).ppo.divergence == "forward_kl"


def test_each_dataset_and_teacher_of_several_reads_its_own_options() -> None:
    mix = {"sums": {"path": "chain_sum"}, "own": {"source": "jsonl", "train_path": "a"}}
    options = {"data.source": "gym", "data.answer_after": None, "data.mix": mix}
    assert from_options({**options, "data.size": 10}).data.size == 10
    with pytest.raises(ConfigError, match=r"data\.train_split='x': "):
        from_options({**options, "data.train_split": "x"})
    with pytest.raises(ConfigError, match=r"data\.mix\.own\.path='x': .*data\.mix\.own\.source=hub"):
        from_options({**options, "data.mix": {**mix, "own": {**mix["own"], "path": "x"}}})
    with pytest.raises(ConfigError, match=r"teachers\.own\.timeout=5\.0: .*teachers\.own\.url"):
        from_options({**options, "teachers": {"own": {"path": "a", "timeout": 5}}})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{index}+12=", "answer": str(index + 12)[::-1]} for index in range(10, 50)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.csv").write_text("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows[:20]))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    (tmp_path / "parts").mkdir()
    for name in ("own.jsonl", "own.csv"):
        (tmp_path / "parts" / name).write_text((tmp_path / name).read_text())
    return tmp_path


def started(*words: str) -> dict[str, Any]:
    """The options of a run of one step."""
    assert train(["experiment=debug", "train.max_steps=1", "eval.limit=2", "eval.kl_prompts=0", "name=run", *words]) == OK
    return open_run(Path("runs/run")).config["data"]


@pytest.mark.parametrize(
    ("path", "source", "rows"),
    [
        ("own.jsonl", "jsonl", 36),
        ("own.csv", "jsonl", 18),
        ("own.parquet", "parquet", 36),
        ("parts", "jsonl", 54),
        ("*.jsonl", "jsonl", 36),
    ],
)
def test_a_file_of_ones_own_is_trained_on_without_a_choice_of_data(folder: Path, path: str, source: str, rows: int) -> None:
    data = started(f"data.train_path={path}")
    assert data["source"] == source and data["prompt"] == "prompt"
    assert json.loads((folder / "runs" / "run" / "run.json").read_text())["prompts"] == rows


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["data.mix.a.train_path=own.jsonl"], ["data=jsonl"]),
        (["data.mix.a.train_path=own.jsonl", "data.mix.b.train_path=own.parquet"], ["data=jsonl", "data.mix.b.source=parquet"]),
        (["data.mix={a: {train_path: own.csv}}"], ["data=jsonl"]),
        (["data.mix.a.train_path=own.jsonl", "data.mix.b.path=x"], ["data.mix.a.source=jsonl"]),
        (["data=parquet", "data.mix.a.train_path=own.parquet"], []),
        (["data.mix.a.train_path=own.jsonl", "data.mix.a.source=parquet"], []),
        (["data=arithmetic", "data.mix.a.train_path=own.jsonl", "data.mix.a.prompt=x"], ["data.mix.a.source=jsonl"]),
        (["data.train_path=own.jsonl", "data=parquet"], []),
    ],
)
def test_the_files_of_a_mix_choose_what_reads_them(folder: Path, words: list[str], wanted: list[str]) -> None:
    store.register()
    assert implied_data(hydra_app.parse(words)) == wanted


def test_a_file_is_evaluated_on_in_place_of_the_data_of_a_run(debug_run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(debug_run, "runs/run")
    small = ["eval.limit=2", "eval.kl_prompts=0", "--json"]
    for target in ("runs/run", f"runs/run/checkpoints/{min(path.name for path in Path('runs/run/checkpoints').glob('step_*'))}"):
        assert cli.main(["eval", target, "data.train_path=own.csv", *small]) == OK
        assert json.loads(capfd.readouterr().out)["tasks"]["evaluation"]["data"] == "own.csv"
    file = Path("runs/run/run.json")
    state = json.loads(file.read_text())
    state["config"]["data"] = {"source": "jsonl", "train_path": "own.jsonl", "prompt": "answer", "answer": "prompt"}
    file.write_text(json.dumps(state))
    assert implied_data(hydra_app.parse(["data.train_path=own.csv"]), Path("runs/run")) == []
    assert implied_data(hydra_app.parse(["data.train_path=own.parquet"]), Path("runs/run")) == []


def test_a_file_beside_another_choice_of_data_is_refused_and_leaves_no_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words, remedy in (
        (["data=arithmetic", "data.train_path=own.jsonl"], "data=jsonl"),
        (["data.eval_path=own.jsonl"], "data=jsonl"),
        (["ppo.k=5"], "ppo.estimator=topk"),
    ):
        assert train(["experiment=debug", "name=run", *words]) == USAGE
        shown = capfd.readouterr().err
        assert words[-1].partition("=")[0] in shown and remedy in shown and shown.count("\n") == 1
    assert train(["experiment=debug", "data=jsonl", "data.train_path=own.parquet"]) == DATA
    assert "data=parquet" in capfd.readouterr().err and not list(Path("runs").glob("*"))


@pytest.mark.long
def test_a_sweep_may_have_an_option_that_only_some_members_read(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "experiment=debug", "train.max_steps=1", "eval.limit=2", "eval.kl_prompts=0", "ppo.k=5"]
    assert train([*words, "name=read", "ppo.estimator=sampled,topk"]) == OK
    assert train([*words, "name=unread", "seed=1,2"]) == USAGE
    assert "ppo.k=5" in capfd.readouterr().err


def test_eval_checks_what_is_typed_against_the_config_of_the_run(debug_run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(debug_run, "runs/run", ignore=shutil.ignore_patterns("checkpoints"))
    file = Path("runs/run/run.json")
    state = json.loads(file.read_text())
    state["config"]["ppo"]["k"] = 5  # as a run of an older version may have it
    file.write_text(json.dumps(state))
    assert cli.main(["eval", "runs/run", "data.seed=1", "eval.limit=2", "eval.kl_prompts=1"]) == OK
    capfd.readouterr()
    assert cli.main(["eval", "runs/run", "data.subset=x"]) == USAGE
    assert "data.subset=" in capfd.readouterr().err
