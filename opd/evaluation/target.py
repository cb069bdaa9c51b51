"""What `opd eval`, `sample` and `score` look at: a run folder, a checkpoint, a model folder, a hub id, or a model named by options.

Imports torch for a checkpoint only, so that a mistake is reported at once.
"""

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.config import compose
from opd.config.files import absolute_paths, is_folder_name, local_path, missing
from opd.config.options import Control, ModelConfig, TeacherConfig, TeacherWeights, naming_teacher
from opd.config.schema import Config
from opd.errors import ConfigError, DataError
from opd.models.locate import locate
from opd.runs.folder import CHECKPOINTS, FINAL
from opd.runs.reader import is_run, open_run
from opd.training.checkpoint import NAME, STATE, Checkpoints, read, verify
from opd.training.export_source import best_checkpoint, check_source, checkpoint_config

NONE = "none"
_checkpoints: dict[str, str] = {}  # as they were named, by the folder that their model was written to
OPTIONS = tuple(item.name for item in fields(ModelConfig))
OF_TRAINING = ("optim", "checkpoint", "track", "launch", "sweep")  # groups
FILES = ("gguf_file", "revision", "trust_remote_code", "adapter", "quantization")  # options of a model at `path`, not of one that is named


@dataclass(frozen=True, slots=True)
class Target:
    """A model to look at, and what to compare it with.

    Attributes:
        config: has the model as `model` and the model it is compared with as `teacher`.
        name: as typed on the command line.
        run: its folder, if the target is a run.
        baseline: the model before training, or another one; None to leave it out.
        overrides: as typed on the command line.
        has_teacher: whether its run has a teacher, or options name one; else it is the default one.
        average: the checkpoint whose average of weights the teacher has, where it followed the student.
    """

    config: Config
    name: str
    run: Path | None
    baseline: ModelConfig | None
    overrides: tuple[str, ...] = ()
    average: Path | None = None
    has_teacher: bool = True


def find_target(word: str | None, composed: Config, teacher: str | None = None, baseline: str | None = None, best: bool = False) -> Target:
    """Find what a verb's arguments name. A run brings its config, to which overrides apply; a model goes into the composed config.

    Args:
        word: a run folder, a checkpoint, a model folder or a hub id; None where `model.path` names the model.
        composed: the config that Hydra composed for the verb.
        teacher: replaces the teacher; the same kinds of word, or "none".
        baseline: replaces the baseline; likewise.
        best: take the checkpoint with the best evaluation of the run `word`.

    Raises:
        ConfigError: the words do not go together.
        DataError: a run has no config or no model.
    """
    overrides = tuple(HydraConfig.get().overrides.task)
    for override in overrides:
        if override.lstrip("+~").replace("=", ".").partition(".")[0] in OF_TRAINING:
            raise ConfigError(f"{override}: is only read by opd train: remove it")
    if best and word is None:
        raise ConfigError("--best: takes the folder of a run, such as runs/NAME: name one")
    if best and word is not None:
        word = str(best_checkpoint(local_path(word)))
    run = local_path(word) if word is not None and is_run(local_path(word)) else None
    checkpoint = local_path(word) if word is not None and is_checkpoint(local_path(word)) else None
    config, before = composed, None
    if run is not None or checkpoint is not None:
        config = _apply_overrides(_stored_options(run, checkpoint), composed, overrides)
        check_applies(overrides, composed.model, ("adapter", "quantization"), str(word))
        before = config.model
        config = replace(with_quantized_base(config), model=_model(str(word), before))
        if teacher is None:
            check_teacher(config, str(word))
    elif word is not None:
        outer = next((parent for parent in Path(word).parents if is_run(parent)), None)
        if outer is not None and teacher is None and not any(override.lstrip("+~").startswith("teacher") for override in overrides):
            raise ConfigError(f"{word}: is a part of the run {outer}: name the run, which has its teacher and data, or set teacher=NAME")
        check_applies(overrides, composed.model, FILES, word)
        config = replace(composed, model=_model(word, composed.model))
    if teacher is not None and teacher != NONE:
        check_applies(overrides, composed.teacher, FILES[:-1], f"--teacher {teacher}")
        model = _model(teacher, config.teacher)
        options = {name: getattr(model, name) for name in ("path", *FILES[:-1])}
        own = replace(config.teacher, **options, weights=TeacherWeights.own, url=None)
        config = replace(config, control=Control.none, teacher=own, teachers={})
    average = None
    entries = dict(config.teachers)
    for label, part in config.parts_by_teacher.items():
        if label and part.names_weights:
            own = student_as_teacher(part, before)
            entries[label] = {**entries[label], **{name: getattr(own, name) for name in OPTIONS}, "weights": own.weights}
    config = replace(config, teachers=entries)
    if config.names_weights:
        is_average = config.teacher.weights is TeacherWeights.ema
        if is_average and checkpoint is not None:
            average = checkpoint
        elif is_average and run is not None:
            average = newest_average(run)
        config = replace(config, control=Control.none, teacher=student_as_teacher(config, before))
    if baseline is not None:
        before = None if baseline == NONE else _model(baseline, before or config.model)
    names_teacher = any(override.lstrip("+~").startswith(("teacher", "experiment")) for override in overrides)
    has_teacher = run is not None or checkpoint is not None or names_teacher
    return Target(config, word or config.model.path, run, before, overrides, average, has_teacher)


def is_checkpoint(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None and (path / STATE).is_file()


def _stored_options(run: Path | None, checkpoint: Path | None) -> dict[str, Any]:
    """Return the options of a run or of a checkpoint, with paths as they are from here. Raises `DataError` for a run without any."""
    if run is None:
        assert checkpoint is not None
        return compose.to_dict(checkpoint_config(read(checkpoint)))
    opened = open_run(run)
    if not opened.config:
        raise DataError(f"{run}: the run ended before it began training; there is no config in it")
    return absolute_paths(opened.config, opened.started_in)


def check_teacher(config: Config, word: str) -> None:
    """Raise `ConfigError` for a teacher of the run `word` that is a folder and is not there."""
    for part in config.parts_by_teacher.values():
        path = part.teacher.path
        if not part.teaches_itself and is_folder_name(path) and not local_path(path).exists():
            problem = missing(local_path(path), "folder")
            raise ConfigError(f"{word}: its teacher, teacher.path={path}: {problem}; name another one with --teacher FOLDER")


def check_applies(overrides: Sequence[str], section: ModelConfig, names: Sequence[str], word: str) -> None:
    """Raise `ConfigError` for a typed option of the model at `path` where `word` names another."""
    typed = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for name in names:
        is_default = getattr(section, name) == getattr(type(section)(), name)
        remedy = f"does not apply to {word}: leave that out, and set {section.PREFIX}path={word.removeprefix('--teacher ')}"
        section.require(name, is_default or f"{section.PREFIX}{name}" not in typed, remedy)


def with_quantized_base(config: Config) -> Config:
    """Return the config of a run with the quantization of its student for teachers that are the student's base without adapters."""
    value = config.model.quantization
    shared = {label for label, part in config.parts_by_teacher.items() if part.teaches_itself and not part.names_weights}
    teachers = {label: {**entry, "quantization": value} if label in shared else entry for label, entry in config.teachers.items()}
    teacher = replace(config.teacher, quantization=value) if "" in shared else config.teacher
    return replace(config, teacher=teacher, teachers=teachers)


def student_as_teacher(config: Config, before: ModelConfig | None) -> TeacherConfig:
    """Return, as a model to load, the teacher of a run whose student is its own teacher. `before`: the student before training."""
    student = config.model if before is None or config.teacher.weights is TeacherWeights.current else before
    files = {name: getattr(student, name) for name in OPTIONS}
    return replace(config.teacher, **files, weights=TeacherWeights.own)


def newest_average(run: Path) -> Path:
    """Return the run's newest checkpoint, which has the teacher's average. Raises `DataError` where there is none, or it is damaged."""
    checkpoints = Checkpoints(run / CHECKPOINTS, 1, keep_best=False)
    moments = checkpoints.moments()
    problem = verify(checkpoints.path(*moments[-1])) if moments else "there is none"
    if problem is not None:
        raise DataError(f"{run}: its teacher's weights are an average in its newest checkpoint: {problem}; name another teacher: --teacher")
    return checkpoints.path(*moments[-1])


def _apply_overrides(stored: Mapping[str, Any], composed: Config, overrides: Sequence[str]) -> Config:
    """Return the stored config with what the overrides name taken from the composed one: all of a group, or a single option.

    It has no given completions.
    """
    merged, source = compose.restore_config(stored), OmegaConf.structured(composed)
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if key == "experiment":
            raise ConfigError(f"{override}: the run has its own config; set single groups and options instead")
        try:
            OmegaConf.update(merged, key, OmegaConf.select(source, key), merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override}: {str(error).splitlines()[0]}") from None
    # Nothing is trained here, and other data need not have the column.
    merged.train.given_share, merged.data.completion = 0.0, None
    config = compose.to_unchecked_config(merged)
    compose.refuse_unread(config, overrides, only_typed=True, verb="eval")
    return config


def _model(word: str, like: ModelConfig) -> ModelConfig:
    """Return the model that a word names, a finished run's, a checkpoint's, a folder or a hub id, with dtype and attention as in `like`."""
    run = local_path(word)
    if is_checkpoint(run):
        folder = str(checkpoint_model(run.resolve()))
        _checkpoints[folder] = word
        word = folder
    elif is_run(run):
        if not (run / FINAL).is_dir():
            checkpoints = Checkpoints(run / CHECKPOINTS, 1, keep_best=False)
            moments = checkpoints.moments()
            own = f"its checkpoint {checkpoints.path(*moments[-1])}" if moments else "a model folder"
            raise DataError(f"{run}: there is no {FINAL}/ in it: the run is {open_run(run).status}; resume it, or name {own}")
        word = str((run / FINAL).resolve())
    elif run.is_dir() and (runs := sorted(path.name for path in run.iterdir() if is_run(path))) and not (run / "config.json").is_file():
        raise ConfigError(f"{word}: a folder of runs: name one, such as {run / runs[0]}")
    return ModelConfig(path=word, dtype=like.dtype, attn_implementation=like.attn_implementation)


@cache
def checkpoint_model(checkpoint: Path) -> Path:
    """Write a checkpoint's model to a temporary folder, which is removed when the process ends, and return the folder."""
    folder = Path(tempfile.mkdtemp(prefix="opd-checkpoint-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    check_source(checkpoint)
    from opd.training import runner
    from opd.training.export import export_model

    runner.quiet_libraries()
    export_model(checkpoint, folder / "model")
    return folder / "model"


def shown_path(model: ModelConfig) -> str:
    """Return the path to show for a model: a checkpoint's own, not that of the temporary folder its model is in."""
    return _checkpoints.get(model.path, model.path)


def locate_models(target: Target) -> dict[str, str | None]:
    """Return the path of each model by role, before any is loaded; None for a baseline that is left out.

    Raises `ConfigError` where a model is missing.
    """
    parts = target.config.parts_by_teacher
    for label, part in parts.items():
        with naming_teacher(label):
            locate(part.teacher, "teacher")
    locate(target.config.model, "model")
    if target.baseline is not None:
        locate(target.baseline, "baseline")
    teachers = (shown_path(part.teacher) + " (loaded here, not served)" * (part.teacher.url is not None) for part in parts.values())
    return {
        "model": shown_path(target.config.model),
        "baseline": None if target.baseline is None else shown_path(target.baseline),
        "teacher": ", ".join(teachers),
    }


def find_pair(config: Config, with_teacher: bool) -> Config:
    """Return the config of the models that `opd sample` and `opd score` compare. Raises `ConfigError` where one is missing."""
    parts = config.parts_by_teacher
    if with_teacher and "" not in parts:
        paths = " or ".join(f"--teacher {part.teacher.path}" for part in parts.values())
        raise ConfigError(f"teachers: each dataset has one of its own; choose one with {paths}")
    config = parts.get("", next(iter(parts.values())))  # a text belongs to no dataset: as for rows that `teacher` scores
    locate(config.model, "model")
    if with_teacher:
        locate(config.teacher, "teacher")
    return config
