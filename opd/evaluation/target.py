"""What `opd eval`, `sample` and `score` look at: a run folder, a model folder, a hub id, or a model named by options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.config import compose
from opd.config.schema import Config, ModelConfig
from opd.errors import ConfigError, DataError
from opd.runs.folder import FINAL
from opd.runs.reader import is_run, open_run

NONE = "none"


@dataclass(frozen=True, slots=True)
class Target:
    """A model to look at, and what to compare it with.

    Attributes:
        config: has the model as `model` and the model it is compared with as `teacher`.
        name: as typed on the command line.
        run: its folder, if the target is a run.
        baseline: the model before training, or another one; None to leave it out.
        overrides: as typed on the command line.
    """

    config: Config
    name: str
    run: Path | None
    baseline: ModelConfig | None
    overrides: tuple[str, ...] = ()


def find_target(word: str | None, composed: Config, teacher: str | None = None, baseline: str | None = None) -> Target:
    """Find what a verb's arguments name. A run brings its config, to which overrides apply; a model goes into the composed config.

    Args:
        word: a run folder, a model folder or a hub id; None where `model.path` names the model.
        composed: the config that Hydra composed for the verb.
        teacher: replaces the teacher; the same kinds of word, or "none".
        baseline: replaces the baseline; likewise.

    Raises:
        ConfigError: the words do not go together.
        DataError: a run has no config or no model.
    """
    overrides = tuple(HydraConfig.get().overrides.task)
    run = Path(word) if word is not None and is_run(Path(word)) else None
    config, before = composed, None
    if run is not None:
        stored = open_run(run).config
        if not stored:
            raise DataError(f"{run}: the run ended before it began training; there is no config in it")
        config = _apply_overrides(stored, composed, overrides)
        before = config.model
        config = replace(config, model=_model(str(run), before))
    elif word is not None:
        outer = next((parent for parent in Path(word).parents if is_run(parent)), None)
        if outer is not None and teacher is None and not any(override.lstrip("+~").startswith("teacher") for override in overrides):
            raise ConfigError(f"{word}: is a part of the run {outer}: name the run, which has its teacher and data, or set teacher=NAME")
        config = replace(composed, model=_model(word, composed.model))
    if teacher is not None and teacher != NONE:
        model = _model(teacher, config.teacher)
        options = {name: getattr(model, name) for name in ("path", "gguf_file", "revision", "trust_remote_code")}
        config = replace(config, teacher=replace(config.teacher, **options), teachers={})
    if baseline is not None:
        before = None if baseline == NONE else _model(baseline, before or config.model)
    return Target(config, word or config.model.path, run, before, overrides)


def _apply_overrides(stored: Mapping[str, Any], composed: Config, overrides: Sequence[str]) -> Config:
    """Return the stored config with what the overrides name taken from the composed one: all of a group, or a single option."""
    merged, source = compose.restore_config(stored), OmegaConf.structured(composed)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if key == "experiment":
            raise ConfigError(f"{override}: the run has its own config; set single groups and options instead")
        try:
            OmegaConf.update(merged, key, OmegaConf.select(source, key), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    return compose.to_config(merged)


def _model(word: str, like: ModelConfig) -> ModelConfig:
    """Return the model that a word names, a finished run's, a folder or a hub id, with dtype and attention as in `like`."""
    run = Path(word)
    if is_run(run):
        if not (run / FINAL).is_dir():
            raise DataError(f"{run}: there is no {FINAL}/ in it: the run is {open_run(run).status}; resume it, or name a model folder")
        word = str((run / FINAL).resolve())
    return ModelConfig(path=word, dtype=like.dtype, attn_implementation=like.attn_implementation)
