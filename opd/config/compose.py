"""The YAML files and the typed config: what Hydra needs to compose one, and conversions from and to plain JSON types."""

import copy
import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import EnumType
from functools import cache
from pathlib import Path
from typing import Any, get_origin

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from opd.config import secrets
from opd.config.options import Source, SweepConfig, TeacherWeights
from opd.config.schema import Config
from opd.config.unread import find_unread
from opd.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent
MAX_FOLDER_NAME = 200  # bytes; file systems allow 255, and a suffix must fit too

# Options, and values of options, that older versions had. An old command line that uses one is refused with this remedy.
REMOVED: dict[str, str] = {
    "sampling.static_cache": "the device decides it: remove it",
    "sampling.max_new_tokens_schedule": "use one length for all steps: sampling.max_new_tokens=TOKENS",
    "sampling.guard.action": "use sampling.guard=none, sampling.guard=warn or sampling.guard=stop",
    "sampling.guard.truncated": "the limit is 0.95: remove it; sampling.guard=none turns the guard off",
    "sampling.guard.repetition": "the limit is 0.5: remove it; sampling.guard=none turns the guard off",
    "sampling.guard.steps": "the guard acts after 10 steps: remove it; sampling.guard=none turns the guard off",
    "sampling.engine=continuous": "it ran at 0.15 to 0.4 times the speed of generate; use sampling.engine=generate or sampling.engine=vllm",
    "ppo.divergence=skew": "use ppo.divergence=jsd, with ppo.beta near 1 for one close to the reverse KL",
    "ppo.alpha": "it belonged to ppo.divergence=skew; use ppo.divergence=jsd and ppo.beta",
    "ppo.clip_eps_high": "the ratio is clipped symmetrically: use ppo.clip_eps",
    "sweep.direction": "sweep.metric decides it: remove it",
    "checkpoint.keep_best": "use checkpoint.best=keep (the default), checkpoint.best=final or checkpoint.best=drop",
    "eval.tasks": "run opd eval once per data set: opd eval TARGET data=NAME eval=NAME",
    "track.alternatives": "5 alternatives are stored: remove it; track.rollouts_per_step=0 stores no rollouts",
}


def removed(word: str) -> str | None:
    """Return the message for an option, or a value `option=value`, that older versions had; None for any other word."""
    word = word.lstrip("+")
    return next((f"{name}: was removed; {REMOVED[name]}" for name in (word.partition("=")[0], word) if name in REMOVED), None)


def conf_dir() -> Path:
    """Return the shipped `conf/`: inside the package when installed from a wheel, next to it in a checkout."""
    return next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if (path / "config.yaml").is_file())


def choice(group: str, *, _root_: DictConfig) -> str:
    """Return the file picked in a group, also for the folder name of a sweep, where `${hydra:...}` does not work."""
    hydra = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    return str(hydra.runtime.choices[group])


def model_name(group: str, *, _root_: DictConfig) -> str:
    """Resolve `${model_name:GROUP}`: the file picked in `model` or `teacher`, or the last part of a path that is not this file's.

    A student that is its own teacher learns from `itself`.
    """
    if group == "teacher" and _root_[group].get("weights", TeacherWeights.own) is not TeacherWeights.own:
        return "itself"
    picked, path = choice(group, _root_=_root_), _root_[group].path
    files = (conf_dir() / folder / f"{picked}.yaml" for folder in (group, "model"))
    file = next((file for file in files if file.is_file()), None)
    if path is None or file is None or path == yaml.safe_load(file.read_text())["path"]:
        return picked
    return re.sub(r"[^\w.-]", "_", Path(path).name) or picked


def data_name(group: str, *, _root_: DictConfig) -> str:
    """Resolve `${data_name:GROUP}`: the name of the file to train on, without its endings, or else the file picked in the group."""
    data = _root_[group]
    if data.train_path is None or data.source not in (Source.jsonl, Source.parquet):
        return choice(group, _root_=_root_)
    return re.sub(r"[^\w-]+", "_", Path(data.train_path).name.partition(".")[0]).strip("_") or choice(group, _root_=_root_)


def seed_suffix(seed: int) -> str:
    """Resolve `${seed_suffix:SEED}`: empty for seed 0, else for example `-seed1`, so that each seed has its own run folder."""
    return "" if seed == 0 else f"-seed{seed}"


def run_name(name: str, *, _root_: DictConfig) -> str:
    """Resolve `${run_name:NAME}`: `name`, after a check of the whole config.

    Hydra makes the run folder before the task starts. `hydra.run.dir` is resolved just before that, so that a mistake leaves no folder.
    """
    words = _root_.hydra.overrides.task if "hydra" in _root_ else ()
    composed = copy.deepcopy(_root_)
    with read_write(composed), open_dict(composed):
        composed.pop("hydra")
    return to_config(composed, words).name


def sweep_name(name: str) -> str:
    """Resolve `${sweep_name:NAME}`, checked like a run's name. Cached, because the names of the members differ and share the folder."""
    return Config(name=name).name


def member_name(overrides: str) -> str:
    """Resolve `${member_name:OVERRIDES}`, the folder of a sweep member: overrides may contain paths, or be too long for a file name."""
    name = re.sub(r"[/\\\s]", "_", overrides).encode()[:MAX_FOLDER_NAME].decode(errors="ignore")
    return name if name == overrides else f"{name}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"


def better(metric: str) -> str:
    """Resolve `${better:METRIC}`: whether a sweep looks for its highest or its lowest value."""
    return SweepConfig(metric=metric).direction.value


def options(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return the type of every option by its dotted name. A section is included, before its options."""
    types: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        types[prefix + item.name] = item.type
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            types |= options(item.type, f"{prefix}{item.name}.")
    return types


def schema() -> DictConfig:
    """Return the typed options. Options that are mappings accept any key, without Hydra's `+`."""
    node = OmegaConf.structured(Config)
    assert isinstance(node, DictConfig)
    for key, kind in options().items():
        if get_origin(kind) is dict:
            OmegaConf.set_struct(OmegaConf.select(node, key), False)
    return node


def register(extra_dirs: Sequence[Path] = ()) -> None:
    """Register the schema, the resolvers, and every model as a teacher with Hydra. extra_dirs: the folders of `--config-dir`.

    With `/model@teacher` in the defaults list users would have to type `model@teacher=qwen15b`. A node in the group `teacher` for each
    model file lets them type `teacher=qwen15b`; a file teacher/NAME.yaml takes precedence over it.
    """
    store, folders = ConfigStore.instance(), (conf_dir(), *extra_dirs)
    store.store(name="schema", node=schema())
    # Plugins of sweepers and launchers register their own options while they are loaded. Where conf/ has a file of the same name, Hydra
    # would merge the two and complain.
    Plugins.instance()
    for file in (conf_dir() / "hydra").rglob("*.yaml"):
        group: Any = store.repo
        for level in file.relative_to(conf_dir()).parent.parts:
            group = group.get(level, {})
        group.pop(file.name, None)
    for name in sorted({file.name for folder in folders for file in (folder / "model").glob("*.yaml")}):
        if not any((folder / "teacher" / name).is_file() for folder in folders):
            store.store(group="teacher", name=name, node={"defaults": [{"/model@_here_": Path(name).stem}]})
    for resolver in (model_name, data_name, seed_suffix, run_name, sweep_name, member_name, better):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True, use_cache=resolver is sweep_name)


def loader(extra: Path | None = None) -> ConfigLoaderImpl:
    """Return Hydra's config loader, to compose a config without running a task. extra: the folder of `--config-dir`."""
    setbase("1.3")
    setup_globals()
    search_path = create_config_search_path(str(conf_dir()))
    if extra is not None:
        search_path.prepend("command-line", f"file://{extra.resolve()}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def undeclared(composed: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of `composed` that are no options; `+` on the command line can add such."""
    known = options()
    for key, value in composed.items():
        if prefix + key not in known:
            yield prefix + key
        elif dataclasses.is_dataclass(known[prefix + key]) and isinstance(value, dict):
            yield from undeclared(value, f"{prefix}{key}.")


def to_config(composed: DictConfig, words: Collection[str] = (), swept: frozenset[str] = frozenset(), verb: str = "train") -> Config:
    """Return the typed config of what Hydra composed.

    Args:
        words: The command line's overrides.
        swept: The options in which the members of a sweep differ.
        verb: What the config is for.

    Raises:
        ConfigError: Options are wrong, do not fit together, or are not read.
    """
    config = to_unchecked_config(composed)
    refuse_unread(config, words, swept, verb=verb)
    return config


def to_unchecked_config(composed: DictConfig) -> Config:
    """Return the typed config, as `to_config` does, without looking for values that nothing reads: older runs may have such."""
    for key in undeclared(plain(composed)):
        raise ConfigError(removed(key) or f"+{key}: there is no such option")
    secrets.refuse_in_config(plain(composed))
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ConfigError("defaults: `- schema` is missing at the top of the list; start from the shipped conf/config.yaml")
    secrets.refuse_in_config(to_dict(config))  # again, now that interpolations are resolved
    return config


@cache
def shipped_values() -> dict[str, list[Any]]:
    """Return, by dotted option, the values that the shipped files set."""
    values: dict[str, list[Any]] = {}
    for file in conf_dir().glob("*/*.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for group, options in (content if file.parent.name == "experiment" else {file.parent.name: content}).items():
            for name, value in options.items() if isinstance(options, dict) else ():
                values.setdefault(f"{group}.{name}", []).append(value)
    return values


def refuse_unread(
    config: Config, words: Collection[str], swept: frozenset[str] = frozenset(), only_typed: bool = False, verb: str = "train"
) -> None:
    """Raise `ConfigError` for the first value that differs from the default and that nothing reads.

    A shipped file may have such a value: another option on the command line can make it one. So may the members of a sweep that has others
    that read it.

    Args:
        words: The command line's overrides.
        swept: The options in which the members of a sweep differ.
        only_typed: Look for none but these overrides.
        verb: What the config is for.
    """
    keys = {word.lstrip("+~").partition("=")[0] for word in words}
    typed = {key for key in keys if "." in key or key == "teachers"}  # the others are choices of files
    for unread in find_unread(config, verb):
        is_typed = any(f"{unread.key}.".startswith(f"{key}.") for key in typed)
        is_shipped = only_typed or unread.value in shipped_values().get(unread.key, [])
        if (is_typed or not is_shipped) and not unread.is_decided_by(swept):
            raise ConfigError(str(unread))


def restore_config(stored: Mapping[str, Any]) -> DictConfig:
    """Return the config of a stored run, for changes or for `to_config`. Options and values that no longer exist get their defaults."""
    merged = OmegaConf.merge(schema(), still_known(stored, Config))
    assert isinstance(merged, DictConfig)
    return merged


def still_known(stored: Mapping[str, Any], section: type) -> dict[str, Any]:
    """Return `stored` without the options, and the values of choices, that `section` does not have."""
    known: dict[str, Any] = {}
    types: dict[str, Any] = {item.name: item.type for item in dataclasses.fields(section)}
    for key, kind in types.items():
        if key in stored and dataclasses.is_dataclass(kind):
            known[key] = still_known(stored[key], types[key])
        elif key in stored and (not isinstance(kind, EnumType) or str(stored[key]) in kind.__members__):
            known[key] = stored[key]
    return known


def plain(config: DictConfig, *, enum_to_str: bool = False) -> dict[str, Any]:
    """Return a config as nested dictionaries, without resolving interpolations."""
    container = OmegaConf.to_container(config, enum_to_str=enum_to_str)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def to_dict(config: Config) -> dict[str, Any]:
    """Return a config as plain JSON types, with enums by name."""
    return plain(OmegaConf.structured(config), enum_to_str=True)
