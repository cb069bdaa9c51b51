"""The config: every shipped file composes into a valid one, YAML and dataclasses agree, and wrong combinations are refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override, open_dict

from opd.cli import hydra_errors as mistakes
from opd.config import compose as store
from opd.config.schema import Config
from opd.errors import ConfigError

CONF = store.conf_dir()
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
    return yaml.safe_load(file.read_text()) or {}


def assert_holds(config: dict[str, Any], part: dict[str, Any], where: str = "") -> None:
    for key, value in part.items():
        if isinstance(value, dict) and value:
            assert_holds(config[key], value, f"{where}{key}.")
        elif value != "???" and "${" not in str(value):
            actual = config[key]
            same = actual == float(value) if isinstance(actual, float) else actual == value
            assert same, f"{where}{key}: the file says {value!r}, the config {actual!r}"


def test_there_are_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_file_is_a_valid_choice_and_means_what_it_says(file: Path) -> None:
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


def test_a_real_teacher_file_wins_over_the_model_of_its_name() -> None:
    assert compose("model=tiny").model.path == "bundled:tiny-student"
    assert compose("teacher=tiny").teacher.path == "bundled:tiny-teacher"


def test_models_and_teachers_of_the_users_own_folder(tmp_path: Path) -> None:
    for group, name, path in [("model", "mine", "my/student"), ("teacher", "qwen3b", "my/teacher")]:
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(f"path: {path}\n")
    assert compose("model=mine", extra=tmp_path).model.path == "my/student"
    assert compose("teacher=mine", extra=tmp_path).teacher.path == "my/student"
    assert compose("model=qwen3b", "teacher=qwen3b", extra=tmp_path).teacher.path == "my/teacher"


def test_yaml_and_dataclasses_have_the_same_defaults() -> None:
    config = compose()
    assert store.to_dict(config) == store.to_dict(Config(name=config.name))


def test_the_default_files_explain_every_option() -> None:
    config = content(CONF / "config.yaml")
    chosen = {group: name for entry in config["defaults"] if isinstance(entry, dict) for group, name in entry.items()}
    for field in dataclasses.fields(Config):
        if field.name == "teacher":
            continue
        if field.name in chosen:
            file = CONF / field.name / f"{chosen[field.name]}.yaml"
            assert set(content(file)) == {item.name for item in dataclasses.fields(field.type)}, file
        else:
            assert field.name in config


def test_the_name_says_student_teacher_data_and_seed() -> None:
    assert compose().name == "qwen05b-from-qwen15b-on-gsm8k"
    assert compose("model=qwen3b", "teacher=qwen7b", "data=arithmetic", "seed=2").name == "qwen3b-from-qwen7b-on-arithmetic-seed2"
    assert compose("experiment=tiny").name == "tiny-from-tiny-on-arithmetic"
    assert compose("model.path=./my models/student/", "teacher.path=Org/Big-7B").name == "student-from-Big-7B-on-gsm8k"
    assert compose("name=mine", "seed=2").name == "mine"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["model.path=' '"], "hub id or a local folder"),
        (["model.trust_remote_code=true"], "pinned commit"),
        (["teacher.trust_remote_code=true"], "pinned commit"),
        (["data.source=jsonl"], "data.train_path"),
        (["data.source=parquet"], "data.train_path"),
        (["data.source=gym", "data.path=null"], "data.path"),
        (["data.path=null"], "data.path"),
        (["data.max_prompt_tokens=0"], "data.max_prompt_tokens=0"),
        (["data.size=1"], "data.size=1"),
        (["sampling.temperature=0"], "sampling.temperature=0"),
        (["sampling.temperature=.inf"], "sampling.temperature=inf"),
        (["sampling.temperature=.nan"], "sampling.temperature=nan"),
        (["sampling.top_p=0"], "sampling.top_p=0"),
        (["sampling.top_p=1.1"], "sampling.top_p=1.1"),
        (["sampling.top_k=-1"], "sampling.top_k=-1"),
        (["sampling.n=0"], "sampling.n=0"),
        (["sampling.max_new_tokens=0"], "sampling.max_new_tokens=0"),
        (["sampling.batch_size=0"], "sampling.batch_size=0"),
        (["ppo.steps=0"], "ppo.steps=0"),
        (["ppo.clip_eps=0"], "ppo.clip_eps=0"),
        (["ppo.advantage_clip=-1"], "ppo.advantage_clip=-1"),
        (["optim.lr=0"], "optim.lr=0"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]"),
        (["optim.betas=[0.9,1.0]"], "optim.betas=[0.9, 1.0]"),
        (["optim.eps=0"], "optim.eps=0"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps=-1"),
        (["optim.max_grad_norm=0"], "optim.max_grad_norm=0"),
        (["train.max_steps=0"], "train.max_steps=0"),
        (["train.max_steps=null"], "set one of"),
        (["train.epochs=1"], "set one of"),
        (["train.max_steps=null", "train.epochs=0"], "train.epochs=0"),
        (["train.batch_size=0"], "train.batch_size=0"),
        (["train.max_tokens_per_micro_batch=0"], "train.max_tokens_per_micro_batch=0"),
        (["eval.steps=-1"], "eval.steps=-1"),
        (["eval.limit=0"], "eval.limit=0"),
        (["eval.temperature=-1"], "eval.temperature=-1"),
        (["eval.max_new_tokens=0"], "eval.max_new_tokens=0"),
        (["eval.batch_size=0"], "eval.batch_size=0"),
        (["eval.kl_prompts=-1"], "eval.kl_prompts=-1"),
        (["eval.kl_max_new_tokens=0"], "eval.kl_max_new_tokens=0"),
        (["checkpoint.every=0"], "checkpoint.every=0"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last=0"),
        (["track.rollouts_per_step=-1"], "track.rollouts_per_step=-1"),
        (["seed=-1"], "seed=-1"),
        (["seed=4294967296"], "seed=4294967296"),
        (["resume=' '"], "resume="),
        *((["name=" + name], "run folder") for name in ["../x", "..", ".x", "a/b", "/a", "''", "'a b'", "'a\\b'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused(defaults: DictConfig, overrides: list[str], complaint: str) -> None:
    with flag_override(defaults, "struct", False):
        composed = OmegaConf.merge(defaults, OmegaConf.from_dotlist(overrides))
    assert isinstance(composed, DictConfig)
    with pytest.raises(ConfigError) as refused:
        store.to_config(composed)
    assert complaint in str(refused.value)


@pytest.mark.parametrize("key", ["colour", "optim.momentum"])
def test_a_plus_adds_no_option_that_nothing_reads(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"\+{key}"):
        compose(f"+{key}=1")


def test_options_that_hold_anything_take_new_keys() -> None:
    config = compose("data=gym", "data.options={min_terms: 2}", "data.chat_template_kwargs.enable_thinking=false")
    assert config.data.options == {"min_terms": 2}
    assert config.data.chat_template_kwargs == {"enable_thinking": False}


def test_a_config_without_the_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="schema"):
        store.to_config(OmegaConf.create({"seed": 0}))


def test_a_sweep_members_folder_is_one_short_level_and_tells_members_apart() -> None:
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


def test_every_option_stands_in_the_commented_yaml() -> None:
    told = "\n".join(file.read_text() for file in store.conf_dir().rglob("*.yaml"))
    missing = [key for key in mistakes.options() if not re.search(rf"\b{key.rpartition('.')[2]}\b", told)]
    assert not missing
