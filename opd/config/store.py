"""Where the YAML files are, and what Hydra must know before it reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from opd.config.schema import Config
from opd.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """The shipped `conf/`: inside the package when installed from a wheel, beside it in a checkout."""
    return next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if (path / "config.yaml").is_file())


def seed_suffix(seed: int) -> str:
    """Runs that differ in the seed alone get folders of their own: `''` for seed 0, `-seed1` for seed 1."""
    return "" if seed == 0 else f"-seed{seed}"


def register(extra_dirs: Sequence[Path] = ()) -> None:
    """Tell Hydra the schema, and make every model a teacher too.

    With `/model@teacher` in the defaults list the override would have to be written `model@teacher=qwen15b`. One node in the group
    `teacher` for each model file lets users write `teacher=qwen15b`; a real `teacher/*.yaml` of the same name wins over it.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for folder in (conf_dir(), *extra_dirs):
        for file in sorted((folder / "model").glob("*.yaml")):
            if not (folder / "teacher" / file.name).is_file():
                store.store(group="teacher", name=file.stem, node={"defaults": [{"/model@_here_": file.stem}]})
    OmegaConf.register_new_resolver("seed_suffix", seed_suffix, replace=True)


def to_config(composed: DictConfig) -> Config:
    """The typed, checked config of what Hydra composed. Raises `ConfigError` where options do not fit together."""
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ConfigError("the config lacks `- schema` at the head of its defaults list; start from the shipped conf/config.yaml")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types, enums by name."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
