"""The config: shipped files, documentation of all options, refused combinations, removed options, configs of older runs."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override, open_dict

from opd.api import from_options
from opd.cli import main as cli
from opd.config import compose as store
from opd.config.compose import REMOVED
from opd.config.options import TeacherWeights
from opd.config.schema import Config
from opd.errors import OK, USAGE, ConfigError
from opd.runs.reader import flatten
from opd.train import main as train

CONF = store.conf_dir()
SPANS = "teacher.alignment=spans"
URL = "teacher.url=http://127.0.0.1:8000"
QUOTED = "teacher.url='http://127.0.0.1:8000'"
OPTIONS = Path(__file__).with_name("options.txt")
FILES = sorted(file for file in CONF.glob("*/*.yaml"))
NEEDS = {("data", "hub"): ["data.path=a/b"], ("data", "jsonl"): ["data.train_path=a"], ("data", "parquet"): ["data.train_path=a"]}


def raw(*overrides: str, extra: Path | None = None) -> DictConfig:
    """What Hydra composes from the arguments of `opd train`."""
    folders = [] if extra is None else [extra]
    ConfigStore.instance().repo.pop("teacher", None)  # what another test registered with another extra folder
    store.register(folders)
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", [*search, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    with open_dict(composed):
        composed.pop("hydra")
    return composed


def compose(*overrides: str, extra: Path | None = None) -> Config:
    return store.to_config(raw(*overrides, extra=extra))


@pytest.fixture(scope="module")
def defaults() -> DictConfig:
    return raw()


def content(file: Path) -> dict[str, Any]:
    """The options in a file, with those of the choice that it begins from."""
    own = yaml.safe_load(file.read_text()) or {}
    is_choice = file.parent != CONF and file.parent.name != "experiment"
    bases = [base for base in own.pop("defaults", ()) if base != "_self_"] if is_choice else []
    return {key: value for base in bases for key, value in content(file.with_name(f"{base}.yaml")).items()} | own


def assert_holds(config: dict[str, Any], part: dict[str, Any], where: str = "") -> None:
    for key, value in part.items():
        if isinstance(value, dict) and value:
            assert_holds(config[key], value, f"{where}{key}.")
        elif value != "???" and "${" not in str(value):
            actual = config[key]
            same = actual == float(value) if isinstance(actual, float) else actual == value
            assert same, f"{where}{key}: {value!r} in the file, {actual!r} in the config"


def test_there_are_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_file_is_a_valid_choice_and_sets_what_it_contains(file: Path) -> None:
    group, name = file.parent.name, file.stem
    config = store.to_dict(compose(f"{group}={name}", *NEEDS.get((group, name), [])))
    part = content(file)
    if group == "experiment":
        for choice in part.pop("defaults"):
            [(key, chosen)] = choice.items()
            section = key.removeprefix("override /")
            folder = section if (CONF / section / f"{chosen}.yaml").is_file() else "model"
            overridden = content(CONF / folder / f"{chosen}.yaml") | part.get(section, {})
            assert_holds(config, {section: overridden})
        assert_holds(config, part)
    else:
        given = {override.partition("=")[0].rpartition(".")[2] for override in NEEDS.get((group, name), [])}
        assert_holds(config, {group: {key: value for key, value in part.items() if key not in given}})


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
def test_every_model_is_a_teacher(name: str) -> None:
    real = CONF / "teacher" / f"{name}.yaml"
    file = real if real.is_file() else CONF / "model" / f"{name}.yaml"
    assert compose(f"teacher={name}").teacher.path == content(file)["path"]


def test_a_teacher_file_takes_precedence_over_the_model_of_its_name() -> None:
    assert compose("model=tiny").model.path == "bundled:tiny-student"
    assert compose("teacher=tiny").teacher.path == "bundled:tiny-teacher"


def test_models_and_teachers_of_a_config_dir(tmp_path: Path) -> None:
    for group, name, path in [("model", "mine", "my/student"), ("teacher", "qwen3b", "my/teacher")]:
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(f"path: {path}\n")
    assert compose("model=mine", extra=tmp_path).model.path == "my/student"
    assert compose("teacher=mine", extra=tmp_path).teacher.path == "my/student"
    assert compose("model=qwen3b", "teacher=qwen3b", extra=tmp_path).teacher.path == "my/teacher"


def test_yaml_and_dataclasses_have_the_same_defaults() -> None:
    config = compose()
    assert store.to_dict(config) == store.to_dict(Config(name=config.name))


def options() -> dict[str, Any]:
    """Every option under its dotted name, with its default."""
    return flatten(store.to_dict(Config()))


def commented_keys(file: Path, group: str = "") -> dict[str, bool]:
    """The dotted keys of a YAML file that have a value, and whether a comment explains the key on its line."""
    keys: dict[str, bool] = {}
    section = group
    for line in file.read_text().splitlines():
        match = re.fullmatch(r"( *)(\w+):(?: +([^#]\S*.*?))??(?: +# (.+))?", line)
        if match is None:
            continue
        indent, key, value, comment = match.groups()
        section = section if indent else group
        if value is None:
            section = f"{group}{key}."
        else:
            keys[section + key] = comment is not None
    return keys


def test_the_default_file_of_each_group_has_every_option_under_its_full_name_with_a_comment() -> None:
    config = content(CONF / "config.yaml")
    chosen = {group: name for entry in config["defaults"] if isinstance(entry, dict) for group, name in entry.items()}
    keys = commented_keys(CONF / "config.yaml")
    for group in store.to_dict(Config()):
        if group in chosen:
            keys |= commented_keys(CONF / group / f"{chosen[group]}.yaml", f"{group}.")
    assert sorted(key for key in options() if key not in keys) == [], "options without a key"
    assert sorted(key for key in options() if not keys[key]) == [], "keys without a comment"


def test_the_readme_has_every_option_with_its_default() -> None:
    rows = [line.split(" | ") for line in (CONF / "README.md").read_text().splitlines() if line.startswith("| `")]
    documented = {key: row[1].strip("`") for row in rows for key in re.findall(r"`([^`]+)`", row[0])}
    defaults = {key: value for key, value in options().items() if key != "name"}
    assert set(documented) == {*defaults, "name"}
    for key, value in defaults.items():
        shown = yaml.safe_load(documented[key])
        assert (float(shown) if isinstance(value, float) else shown) == value, key


def test_the_list_of_options_is_frozen() -> None:
    """A new option needs a line in tests/options.txt, and names the one that it replaces: there are at most 125."""
    frozen = OPTIONS.read_text().splitlines()
    assert sorted(options()) == frozen
    assert len(frozen) <= 125


def test_the_default_name_has_student_teacher_data_and_seed() -> None:
    assert compose().name == "qwen05b-from-qwen15b-on-gsm8k"
    assert compose("model=qwen3b", "teacher=qwen7b", "data=arithmetic", "seed=2").name == "qwen3b-from-qwen7b-on-arithmetic-seed2"
    assert compose("experiment=tiny").name == "tiny-from-tiny-on-arithmetic"
    assert compose("experiment=tiny", "teacher.weights=ema", "teacher.system=x").name == "tiny-from-itself-on-arithmetic"
    assert compose("model.path=./my models/student/", "teacher.path=Org/Big-7B").name == "student-from-Big-7B-on-gsm8k"
    for path, name in (
        ("a/sums.jsonl", "sums"),
        ("b v1.csv.gz", "b_v1"),
        ("parts/", "parts"),
        ("part-*.jsonl", "part-"),
        ("*.csv", "jsonl"),
    ):
        found = compose("experiment=tiny", "data=jsonl", f"data.train_path='{path}'").name
        assert found == f"tiny-from-tiny-on-{name}", path
    assert compose("name=mine", "seed=2").name == "mine"


@pytest.mark.parametrize(
    ("overrides", "option", "remedy"),
    [
        (["model.path=' '"], "model.path=", "hub id"),
        (["model.trust_remote_code=true"], "model.trust_remote_code=True", "model.revision=COMMIT"),
        (["teacher.trust_remote_code=true"], "teacher.trust_remote_code=True", "teacher.revision=COMMIT"),
        (["teacher.placement=device"], "teacher.device=None", "teacher.device=cuda:1"),
        (["teacher.device=cuda:1"], "teacher.device='cuda:1'", "teacher.placement=device"),
        (["teacher.placement=device", "teacher.device=cuda"], "teacher.device='cuda'", "cuda:1"),
        (["teacher.placement=offload", "teacher.quantization=nf4"], "teacher.quantization=nf4", "teacher.placement=same"),
        (["teacher.url=localhost:8000"], "teacher.url='localhost:8000'", "http://127.0.0.1:8000"),
        (["teacher.url=[http://a:1,b]"], "teacher.url=['http://a:1', 'b']", "http://127.0.0.1:8000"),
        (["eval.reward='__main__:f'"], "eval.reward=__main__:f", "pass the function itself"),
        (["eval.reward=exat"], "eval.reward=exat", "did you mean exact?"),
        (["eval.reward=my rewards:f"], "eval.reward=my rewards:f", "module:function"),
        (["teacher.canary_every=-1"], "teacher.canary_every=-1", "0: only before each checkpoint"),
        (["teacher.url=[]"], "teacher.url=[]", "null for a local teacher"),
        ([URL, "teacher.quantization=nf4"], QUOTED, "teacher.quantization=none"),
        ([URL, "teacher.placement=offload"], QUOTED, "teacher.placement=same"),
        ([URL, "ppo.estimator=exact"], "ppo.estimator=exact", "ppo.estimator=sampled"),
        ([URL, "ppo.estimator=exact"], "ppo.estimator=exact", "ppo.estimator=topk"),
        ([URL, "ppo.baseline=true"], "ppo.baseline=True", "ppo.baseline=false"),
        ([URL, "ppo.temperature=0.7"], "ppo.temperature=0.7", "ppo.temperature=1"),
        ([URL, "ppo.importance_cap=null"], "ppo.importance_cap=None", "sampling.temperature=1"),
        ([URL, "sweep.metric=eval_kl_after"], "sweep.metric='eval_kl_after'", "another metric"),
        ([SPANS, "ppo.estimator=exact"], "ppo.estimator=exact", "ppo.estimator=sampled"),
        ([SPANS, "ppo.estimator=topk"], "ppo.estimator=topk", "ppo.estimator=sampled"),
        ([SPANS, "ppo.baseline=true"], "ppo.baseline=True", "ppo.baseline=false"),
        ([SPANS, "ppo.discount=0.5"], "ppo.discount=0.5", "ppo.discount=0"),
        ([SPANS, "sweep.metric=eval_kl_after"], "sweep.metric='eval_kl_after'", "another metric"),
        (["ppo.temperature=1", "ppo.discount=0.5"], "ppo.discount=0.5", "sampling.temperature=1"),
        (["teacher.gguf_file=x", "teacher.quantization=int8"], "teacher.quantization=int8", "teacher.quantization=none"),
        (["model.gguf_file=x", "model.quantization=int8"], "model.quantization=int8", "model.quantization=none"),
        (["model.quantization=nf4"], "model.quantization=nf4", "lora=default"),
        (["model.quantization=nf4", "lora.rank=4", "sampling.dtype=bfloat16"], "sampling.dtype=bfloat16", "sampling.dtype=auto"),
        (["model.adapter=''"], "model.adapter=''", "or null"),
        ([URL, "teacher.adapter=x"], "teacher.adapter='x'", "teacher.adapter=null"),
        (["lora.rank=-1"], "lora.rank=-1", "at least 0"),
        (["lora.alpha=0"], "lora.alpha=0", "at least 1"),
        (["lora.targets=[]"], "lora.targets=[]", "[all-linear]"),
        (["data.source=jsonl"], "data.train_path=None", "data.train_path=FILE.jsonl"),
        (["data.source=parquet"], "data.train_path=None", "data.train_path=FILE.parquet"),
        (["data.source=gym", "data.path=null"], "data.path=None", "data.path=chain_sum"),
        (["data.path=null"], "data.path=None", "data.path=OWNER/DATASET"),
        (["data.max_prompt_tokens=0"], "data.max_prompt_tokens=0", "at least 1"),
        (["data.size=1"], "data.size=1", "at least 2"),
        (["sampling.temperature=0"], "sampling.temperature=0.0", "above 0"),
        (["sampling.temperature=.inf"], "sampling.temperature=inf", "above 0"),
        (["sampling.temperature=.nan"], "sampling.temperature=nan", "above 0"),
        (["sampling.top_p=0"], "sampling.top_p=0.0", "above 0 and at most 1"),
        (["sampling.top_p=1.1"], "sampling.top_p=1.1", "above 0 and at most 1"),
        (["sampling.top_k=-1"], "sampling.top_k=-1", "0 is off"),
        (["sampling.top_k=1"], "sampling.top_k=1", "sampling.top_k=0"),
        (["sampling.n=0"], "sampling.n=0", "at least 1"),
        (["sampling.max_new_tokens=0"], "sampling.max_new_tokens=0", "at least 1"),
        (["sampling.batch_size=0"], "sampling.batch_size=0", "at least 1"),
        (["sampling.memory_share=1"], "sampling.memory_share=1.0", "below 1"),
        (["sampling.max_gap=0"], "sampling.max_gap=0.0", "above 0"),
        (["sampling.lag=2"], "sampling.lag=2", "sampling.lag=0"),
        (["sampling.lag=1"], "sampling.lag=1", "sampling.vllm.url=URL"),
        (["sampling.lag=2", "sampling.vllm.url=http://x"], "sampling.lag=2", "at most 1"),
        (["sampling.lag=1", "sampling.vllm.url=http://x", "ppo.importance_cap=null"], "ppo.importance_cap=None", "ppo.importance_cap=2.0"),
        (["sampling.vllm.url=x"], "sampling.vllm.url='x'", "http://127.0.0.1:8000"),
        (["sampling.vllm.timeout=0"], "sampling.vllm.timeout=0.0", "above 0"),
        (["sampling.engine=vllm", "sampling.temperature=3"], "sampling.temperature=3.0", "between 0.01 and 2"),
        (["sampling.engine=vllm", "eval.temperature=0.001"], "eval.temperature=0.001", "between 0.01 and 2"),
        (["ppo.steps=0"], "ppo.steps=0", "at least 1"),
        (["ppo.clip_eps=0"], "ppo.clip_eps=0.0", "0.2 is usual"),
        (["ppo.clip_eps=2"], "ppo.clip_eps=2.0", "must be above 0 and below 1 (0.2 is usual)"),
        (["ppo.advantage_clip=-1"], "ppo.advantage_clip=-1.0", "null"),
        (["ppo.importance_cap=0"], "ppo.importance_cap=0.0", "null"),
        (["ppo.beta=1.5"], "ppo.beta=1.5", "at most 1"),
        (["ppo.k=0"], "ppo.k=0", "at least 1"),
        (["ppo.discount=2"], "ppo.discount=2.0", "at most 1"),
        (["ppo.discount=.5", "sampling.top_k=5"], "ppo.discount=0.5", "sampling.top_k=0"),
        (["ppo.importance_cap=null", "sampling.top_p=.5"], "ppo.importance_cap=None", "sampling.top_p=1"),
        (["ppo.loss_prefix=0"], "ppo.loss_prefix=0", "null"),
        (["ppo.reward_coef=-1"], "ppo.reward_coef=-1.0", "0 is off"),
        (["ppo.reward_coef=1", "sampling.n=1"], "ppo.reward_coef=1.0", "sampling.n above 1"),
        (["ppo.reward_coef=1", "eval.reward=null"], "ppo.reward_coef=1.0", "eval.reward=NAME"),
        (["ppo.baseline=true", "ppo.estimator=exact"], "ppo.baseline=True", "ppo.estimator=sampled"),
        (["ppo.discount=.5", "ppo.estimator=topk"], "ppo.discount=0.5", "ppo.estimator=sampled"),
        (["optim.lr=0"], "optim.lr=0.0", "1e-5"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1.0", "at least 0"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]", "[0.9,0.95]"),
        (["optim.betas=[0.9,1.0]"], "optim.betas=[0.9, 1.0]", "[0.9,0.95]"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps=-1", "at least 0"),
        (["optim.max_grad_norm=0"], "optim.max_grad_norm=0.0", "1.0 is usual"),
        (["train.max_steps=0"], "train.max_steps=0", "at least 1"),
        (["train.max_steps=null"], "train.max_steps=None", "train.epochs"),
        (["train.epochs=1"], "train.max_steps=200", "the other to null"),
        (["train.max_steps=null", "train.epochs=0"], "train.epochs=0.0", "above 0"),
        (["train.batch_size=0"], "train.batch_size=0", "at least 1"),
        (["train.max_tokens_per_micro_batch=0"], "train.max_tokens_per_micro_batch=0", "at least 1"),
        (["train.watchdog_minutes=0"], "train.watchdog_minutes=0.0", "null"),
        (["eval.steps=-1"], "eval.steps=-1", "at least 0"),
        (["eval.limit=0"], "eval.limit=0", "null"),
        (["eval.temperature=-1"], "eval.temperature=-1.0", "0 is greedy"),
        (["eval.max_new_tokens=0"], "eval.max_new_tokens=0", "at least 1"),
        (["eval.batch_size=0"], "eval.batch_size=0", "at least 1"),
        (["eval.kl_prompts=-1"], "eval.kl_prompts=-1", "0 is off"),
        (["eval.kl_max_new_tokens=0"], "eval.kl_max_new_tokens=0", "at least 1"),
        (["eval.samples=0"], "eval.samples=0", "eval.samples=1"),
        (["eval.samples=2"], "eval.samples=2", "eval.temperature=0.7"),
        (["checkpoint.every=0"], "checkpoint.every=0", "at least 1"),
        (["checkpoint.keep_last=-1"], "checkpoint.keep_last=-1", "0: none once the run is done"),
        (["track.rollouts_per_step=-1"], "track.rollouts_per_step=-1", "at least 0"),
        (["launch.processes=0"], "launch.processes=0", "null"),
        (["sweep.metric=gap_closed", "eval.reward=null"], "sweep.metric='gap_closed'", "eval.reward=NAME"),
        (["seed=-1"], "seed=-1", "at least 0"),
        (["seed=4294967296"], "seed=4294967296", "at most 4294967295"),
        (["resume=' '"], "resume=' '", "auto, never"),
        *((["name=" + name], "name=", "letters, digits") for name in ["../x", "..", ".x", "a/b", "/a", "''", "'a b'", "'a\\b'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_combination_that_makes_no_sense_is_refused_with_a_remedy(
    defaults: DictConfig, overrides: list[str], option: str, remedy: str
) -> None:
    with flag_override(defaults, "struct", False):
        composed = OmegaConf.merge(defaults, OmegaConf.from_dotlist(overrides))
    assert isinstance(composed, DictConfig)
    with pytest.raises(ConfigError) as refused:
        store.to_config(composed)
    message = str(refused.value)
    assert message.startswith(option) and remedy in message and "\n" not in message


def test_a_served_teacher_is_scored_at_temperature_1_and_never_the_students_base() -> None:
    assert compose().temperature == 0.7 and compose("ppo.temperature=1.2").temperature == 1.2
    one, two = compose(URL), compose("teacher.url=[http://a:1,https://b]", "sampling.temperature=1")
    assert one.temperature == 1 and one.teacher.urls == ["http://127.0.0.1:8000"] and not one.draws_from_scored
    assert two.teacher.urls == ["http://a:1", "https://b"] and two.draws_from_scored
    assert not from_options({"model.path": "a/b", "teacher.path": "a/b", "lora.rank": 8, "teacher.url": "http://a"}).teaches_itself


def test_a_teacher_that_is_the_students_base_needs_its_own_system_prompt_and_no_place_of_its_own() -> None:
    same = {"model.path": "a/b", "teacher.path": "a/b", "lora.rank": 8}
    with pytest.raises(ConfigError, match=r"lora\.rank=8: .*teacher\.system"):
        from_options(same)
    with pytest.raises(ConfigError, match=r"teacher\.placement=offload: .*teacher\.placement=same"):
        from_options({**same, "teacher.system": "s", "teacher.placement": "offload"})
    assert from_options({**same, "teacher.system": "s"}).teacher_weights is TeacherWeights.base
    assert from_options({**same, "teacher.revision": "main"}).teacher_weights is TeacherWeights.own


@pytest.mark.parametrize(("key", "remedy"), [("colour", ""), ("optim.momentum", ""), ("ppo.clip_eps_high", "ppo.clip_eps")])
def test_an_option_that_does_not_exist_cannot_be_added_with_a_plus(key: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: .*{remedy}"):
        compose(f"+{key}=1")


def test_mapping_options_accept_new_keys() -> None:
    config = compose("data=gym", "data.options={min_terms: 2}", "data.chat_template_kwargs.enable_thinking=false")
    assert config.data.options == {"min_terms": 2}
    assert config.data.chat_template_kwargs == {"enable_thinking": False}


def test_a_config_without_the_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="schema"):
        store.to_config(OmegaConf.create({"seed": 0}))


def test_a_sweep_members_folder_is_one_short_level_and_differs_between_members() -> None:
    assert store.member_name("optim.lr=1e-5,seed=1") == "optim.lr=1e-5,seed=1"
    hostile = [
        "data.train_path=../../etc/x",
        "data.train_path=.._.._etc_x",
        "data.train_path=.. .. etc x",
        "x=" + "é" * 300,
        "x=" + "é" * 301,
    ]
    names = [store.member_name(overrides) for overrides in hostile]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name
        assert len(name.encode()) <= 255


VALUES = {"sampling.guard.action": "stop", "sampling.max_new_tokens_schedule": "{0:4}", "eval.tasks": "{a: {}}"}


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_is_refused_in_one_line_with_what_to_use(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    key, _, value = name.partition("=")
    word = name if value else f"{key}={VALUES.get(key, 1)}"
    assert train(["experiment=debug", word]) == USAGE
    shown = capfd.readouterr().err
    assert name in shown and REMOVED[name] in shown and shown.count("\n") == 1
    with pytest.raises(ConfigError) as refused:
        from_options({key: value or 1})
    assert name in str(refused.value) and REMOVED[name] in str(refused.value)
    assert not list(tmp_path.iterdir())


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config as an older version wrote it: with options and values that have been removed since."""
    stored = copy.deepcopy(config)
    stored["sampling"] |= {"guard": {"action": "stop", "truncated": 0.9, "repetition": 0.5, "steps": 3}, "engine": "continuous"}
    stored["sampling"] |= {"static_cache": None, "max_new_tokens_schedule": {"0": 4}}
    stored["ppo"] |= {"alpha": 0.1, "clip_eps_high": None, "divergence": "skew"}
    stored["optim"]["eps"] = 1e-8
    stored["eval"]["tasks"] = {}
    stored["track"]["alternatives"] = 5
    stored["gone"] = {"entirely": 1}
    del stored["lora"], stored["sampling"]["vllm"]
    return stored


def test_a_config_of_an_older_run_is_restored_without_what_no_longer_exists() -> None:
    stored = store.to_dict(Config(seed=7))
    stored["data"]["options"] = {"min_terms": 2, "a.b": {"c": [1]}}
    stored["ppo"]["importance_cap"] = None
    stored["ppo"]["k"] = 16  # which ppo.estimator=sampled does not read
    assert store.to_dict(store.to_unchecked_config(store.restore_config(stored))) == stored
    assert store.to_dict(store.to_unchecked_config(store.restore_config(older(stored)))) == stored


def test_ls_report_compare_and_eval_read_a_run_of_an_older_version(
    debug_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(debug_run, "runs/old", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(debug_run, "runs/new", ignore=shutil.ignore_patterns("checkpoints"))
    file = tmp_path / "runs" / "old" / "run.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "config": older(state["config"])}))
    for words in (
        ["ls", "runs", "--json"],
        ["report", "runs/old"],
        ["compare", "runs/old", "runs/new"],
        ["eval", "runs/old", "eval.limit=2", "eval.kl_prompts=1", "device=cpu"],
    ):
        assert cli.main(words) == OK, capfd.readouterr().err
