"""What `opd eval`, `sample` and `score` are told to look at: a run folder, a model's folder, a hub id, or nothing but options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.config import compose as store
from opd.config.schema import Config, ModelConfig
from opd.errors import ConfigError, DataError
from opd.runs.folder import FINAL
from opd.runs.reader import is_run, open_run

NONE = "none"


@dataclass(frozen=True, slots=True)
class Target:
    """config: with the model that is looked at as `model` and what it is compared with as `teacher`.

    name: how it is called. run: its folder, if it is a run. baseline: the model that it is judged against; None for none. overrides: as
    they were typed.
    """

    config: Config
    name: str
    run: Path | None
    baseline: ModelConfig | None
    overrides: tuple[str, ...] = ()


def find_target(word: str | None, composed: Config, teacher: str | None = None, baseline: str | None = None) -> Target:
    """What the words say, for the task of a verb that Hydra has composed a config for. Raises `ConfigError` and `DataError`.

    word: None where `model.path` says it. A run brings its whole config, on which the overrides of the command line are put; anything
    else is a model for the composed config. teacher, baseline: the same kinds of word, or "none".
    """
    overrides = tuple(HydraConfig.get().overrides.task)
    run = None
    config, start = composed, None
    if word is not None and is_run(Path(word)):
        run = Path(word)
        config = of_run(run, composed, overrides)
        start = config.model
        config = replace(config, model=trained(run, start))
    elif word is not None:
        refuse_part(Path(word), teacher is not None or any(override.lstrip("+~").startswith("teacher") for override in overrides))
        config = replace(composed, model=named(word, composed.model))
    if teacher is not None and teacher != NONE:
        config = replace(config, teacher=replace_path(config.teacher, named(teacher, config.teacher)))
    if baseline is not None:
        start = None if baseline == NONE else named(baseline, start or config.model)
    return Target(config, word or config.model.path, run, start, overrides)


def refuse_part(path: Path, has_teacher: bool) -> None:
    """Raises `ConfigError` for a folder inside a run's, whose teacher is not that of the composed config."""
    run = next((parent for parent in path.parents if is_run(parent)), None)
    if run is not None and not has_teacher:
        raise ConfigError(f"{path}: is a part of the run {run}: name the run, which brings its teacher and data, or set teacher=…")


def of_run(run: Path, composed: Config, overrides: Sequence[str]) -> Config:
    """The run's config, with what the overrides changed in the composed one."""
    stored = open_run(run).config
    if not stored:
        raise DataError(f"{run}: the run had not begun when it ended; there is no config in it")
    return changed(stored, composed, overrides)


def changed(stored: Mapping[str, Any], composed: Config, overrides: Sequence[str]) -> Config:
    """The stored config with what the overrides name taken from the composed one: a group whole, an option alone."""
    merged, wanted = store.restore_config(stored), OmegaConf.structured(composed)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if key == "experiment":
            raise ConfigError(f"{override}: the run brings a config of its own; set single groups and options")
        try:
            OmegaConf.update(merged, key, OmegaConf.select(wanted, key), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    return store.to_config(merged)


def trained(run: Path, start: ModelConfig) -> ModelConfig:
    """The student of a finished run."""
    if not (run / FINAL).is_dir():
        raise DataError(f"{run}: there is no {FINAL}/ in it: the run is {open_run(run).status}; go on with it, or name a model's folder")
    return ModelConfig(path=str((run / FINAL).resolve()), dtype=start.dtype, attn_implementation=start.attn_implementation)


def named(word: str, like: ModelConfig) -> ModelConfig:
    """The model that a word names: a finished run's student, a folder or a hub id. dtype and attention as in `like`."""
    if is_run(Path(word)):
        return trained(Path(word), like)
    return ModelConfig(path=word, dtype=like.dtype, attn_implementation=like.attn_implementation)


def replace_path(teacher: Any, model: ModelConfig) -> Any:
    """A teacher with another model behind it."""
    return replace(teacher, path=model.path, gguf_file=model.gguf_file, revision=model.revision, trust_remote_code=model.trust_remote_code)
