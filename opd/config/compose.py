"""Where the YAML files are, and what Hydra must know before it reads them."""

import copy
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
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
from opd.config.schema import Config
from opd.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent
LONGEST_FOLDER_NAME = 200  # bytes; file systems allow 255, and a suffix must fit too


def conf_dir() -> Path:
    """The shipped `conf/`: inside the package when installed from a wheel, beside it in a checkout."""
    return next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if (path / "config.yaml").is_file())


def choice(group: str, *, _root_: DictConfig) -> str:
    """The file picked in `group`. Unlike `${hydra:…}` it also answers when Hydra names the folder of a sweep."""
    hydra = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    return str(hydra.runtime.choices[group])


def called(group: str, *, _root_: DictConfig) -> str:
    """The model picked in `group`; where its path is another one than that file's, the last part of it."""
    picked, path = choice(group, _root_=_root_), _root_[group].path
    file = next((place for folder in (group, "model") if (place := conf_dir() / folder / f"{picked}.yaml").is_file()), None)
    if path is None or file is None or path == yaml.safe_load(file.read_text())["path"]:
        return picked
    return re.sub(r"[^\w.-]", "_", Path(path).name) or picked


def seed_suffix(seed: int) -> str:
    """Runs that differ in the seed alone get folders of their own: `''` for seed 0, `-seed1` for seed 1."""
    return "" if seed == 0 else f"-seed{seed}"


def run_name(name: str, *, _root_: DictConfig) -> str:
    """`name`, once the whole config is known to be right: raises `ConfigError` otherwise.

    Hydra makes the run folder before the task starts. `hydra.run.dir` asks for its name here, the last moment at which a mistake
    leaves no folder behind.
    """
    composed = copy.deepcopy(_root_)
    with read_write(composed), open_dict(composed):
        composed.pop("hydra")
    return to_config(composed).name


def sweep_name(name: str) -> str:
    """The sweep's folder name, refused like a run's. Cached: all members get that of the sweep, though their own names differ."""
    return Config(name=name).name


def member_name(overrides: str) -> str:
    """One folder level for a sweep member, from its overrides: they may hold paths, and more characters than a name may have."""
    name = re.sub(r"[/\\\s]", "_", overrides).encode()[:LONGEST_FOLDER_NAME].decode(errors="ignore")
    return name if name == overrides else f"{name}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"


def schema() -> DictConfig:
    """The typed options. Those that are mappings take any key, on the command line without Hydra's `+`."""
    node = OmegaConf.structured(Config)
    assert isinstance(node, DictConfig)
    for section in dataclasses.fields(Config):
        for item in dataclasses.fields(section.type) if isinstance(section.type, type) and dataclasses.is_dataclass(section.type) else ():
            if get_origin(item.type) is dict:
                OmegaConf.set_struct(node[section.name][item.name], False)
    return node


def prefer_shipped() -> None:
    """Forget what plugins bring as options of sweepers and launchers of which `conf/` has a file: Hydra would mix the two and complain."""
    Plugins.instance()  # loads the plugins, which leave theirs in the store
    for file in (conf_dir() / "hydra").rglob("*.yaml"):
        group: Any = ConfigStore.instance().repo
        for level in file.relative_to(conf_dir()).parent.parts:
            group = group.get(level, {})
        group.pop(file.name, None)


def register(extra_dirs: Sequence[Path] = ()) -> None:
    """Tell Hydra the schema, and make every model a teacher too.

    With `/model@teacher` in the defaults list the override would have to be written `model@teacher=qwen15b`. One node in the group
    `teacher` for each model file lets users write `teacher=qwen15b`; a real `teacher/*.yaml` of the same name wins over it.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=schema())
    prefer_shipped()
    folders = (conf_dir(), *extra_dirs)
    for name in sorted({file.name for folder in folders for file in (folder / "model").glob("*.yaml")}):
        if not any((folder / "teacher" / name).is_file() for folder in folders):
            store.store(group="teacher", name=name, node={"defaults": [{"/model@_here_": Path(name).stem}]})
    OmegaConf.register_new_resolver("choice", choice, replace=True)
    OmegaConf.register_new_resolver("called", called, replace=True)
    OmegaConf.register_new_resolver("seed_suffix", seed_suffix, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("member_name", member_name, replace=True)


def loader(extra: Path | None = None) -> ConfigLoaderImpl:
    """What composes a config as `hydra.main` does, before it does. extra: `--config-dir`."""
    setbase("1.3")
    setup_globals()
    search_path = create_config_search_path(str(conf_dir()))
    if extra is not None:
        search_path.prepend("command-line", f"file://{extra.resolve()}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def undeclared(composed: dict[str, Any], schema: type, prefix: str = "") -> Iterator[str]:
    """The options in `composed` that `schema` does not have; `+` on the command line can add such."""
    declared = {item.name: item.type for item in dataclasses.fields(schema)}
    for key, value in composed.items():
        kind = declared.get(key)
        if kind is None:
            yield f"{prefix}{key}"
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
            yield from undeclared(value, kind, f"{prefix}{key}.")


def to_config(composed: DictConfig) -> Config:
    """The typed, checked config of what Hydra composed. Raises `ConfigError` where options do not fit together."""
    for key in undeclared(plain(composed), Config):
        raise ConfigError(f"+{key}: there is no such option")
    secrets.refuse_in_config(plain(composed))
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ConfigError("the config lacks `- schema` at the head of its defaults list; start from the shipped conf/config.yaml")
    secrets.refuse_in_config(to_dict(config))  # again, because interpolations are resolved now
    return config


def restore_config(stored: Mapping[str, Any]) -> DictConfig:
    """The config of a run that was, to be changed or made typed, from its JSON, whose keys are all texts."""
    sampling = stored.get("sampling", {})
    lengths = {int(step): tokens for step, tokens in (sampling.get("max_new_tokens_schedule") or {}).items()}
    changed: dict[Any, Any] = {**stored, "sampling": {**sampling, "max_new_tokens_schedule": lengths}}
    merged = OmegaConf.merge(schema(), changed)
    assert isinstance(merged, DictConfig)
    return merged


def plain(config: DictConfig, *, enum_to_str: bool = False) -> dict[str, Any]:
    container = OmegaConf.to_container(config, enum_to_str=enum_to_str)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types, enums by name."""
    return plain(OmegaConf.structured(config), enum_to_str=True)
