"""What identifies a run: its options and digests of what was loaded. A run resumes only from checkpoints of the same run."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opd.config.compose import REMOVED, to_dict
from opd.config.files import data_files, is_folder_name, local_path
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.errors import ConfigError
from opd.runs.reader import format_value
from opd.training.inputs import Given

log = logging.getLogger(__name__)

# Options that may change on resume, because they change neither what is trained nor what is compared. Prompts per process may change
# as long as their number over all processes stays.
MAY_CHANGE = (
    "name", "resume", "resume_force", "device", "checkpoint", "track", "train.batch_size", "train.max_tokens_per_micro_batch",
    "train.activation_checkpointing", "sampling.batch_size",
    "train.watchdog_minutes", "eval.steps", "eval.batch_size", "eval.samples", "eval.reward_seconds",
    "eval.reward_memory", "sampling.guard", "sampling.vllm", "launch",
    "sweep", "teacher.placement", "teacher.device", "teacher.url", "teacher.timeout", "teacher.canary_every",
)  # fmt: skip
CHUNK = 2**24  # numbers that are summed at a time
MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json")
PIECES, PIECE = 64, 2**16  # of a model's file: how many, and their bytes


def identity(config: Config, accelerator: Accelerator, given: Given) -> dict[str, Any]:
    """Return what identifies a run before anything is loaded."""
    return {
        "config": to_dict(config),
        "prompts_per_step": config.train.batch_size * accelerator.num_processes,
        "files": digest_inputs(config, given),
    }


def digest_inputs(config: Config, given: Given) -> dict[str, str | None]:
    """Return the digests of what a run reads, by option or argument: data files, folders of models, the user's reward, passed rows."""
    datasets = {"data": config.data, **{f"data.mix.{label}": dataset for label, dataset in config.data.datasets.items()}}
    paths = {f"{key}.{name}": getattr(data, name) for key, data in datasets.items() for name in ("path", "train_path", "eval_path")}
    files = {option: digest_files(path) for option, path in paths.items() if path is not None}
    return files | digest_models(config) | digest_code(config) | digest_given(given)


def digest_models(config: Config) -> dict[str, str | None]:
    """Return digests of samples of the models and adapters that are in folders: all of large weights would take too long."""
    teachers = {f"teachers.{label}" if label else "teacher": part.teacher for label, part in config.parts_by_teacher.items()}
    models = {"model": config.model, **teachers}
    paths = {f"{key}.{name}": getattr(model, name) for key, model in models.items() for name in ("path", "adapter")}
    folders = {option: local_path(path) for option, path in paths.items() if path is not None and is_folder_name(path)}
    return {option: digest(map(sample_file, sorted(folder.iterdir()))) for option, folder in folders.items() if folder.is_dir()}


def sample_file(file: Path) -> list[object]:
    """Return the name and size of a model's file and a digest of pieces of it; nothing of a folder or a file of another kind."""
    if file.suffix not in MODEL_FILES or not file.is_file():
        return []
    size, hasher = file.stat().st_size, sha256()
    with file.open("rb") as stream:
        for place in range(PIECES):
            stream.seek(max(size - PIECE, 0) * place // (PIECES - 1))  # the last one ends with the file
            hasher.update(stream.read(PIECE))
    return [file.name, size, hasher.hexdigest()]


def digest_code(config: Config) -> dict[str, str | None]:
    """Return the digest of the module that has the user's reward, if it is in the working folder."""
    module, colon, _ = (config.eval.reward or "").partition(":")
    name = module.replace(".", "/")
    files = [file for file in (f"{name}.py", f"{name}/__init__.py") if colon and Path(file).is_file()]
    return {"eval.reward": digest_files(files[0])} if files else {}


def digest_given(given: Given) -> dict[str, str]:
    """Return the digests of the rows and reward functions that were passed, by the argument."""
    parts = {"train_dataset": given.train_rows, "eval_dataset": given.eval_rows, "reward_funcs": given.rewards}
    return {argument: digest(map(as_plain, part)) for argument, part in parts.items() if part}


def as_plain(value: Any) -> Any:
    """Return what identifies a value: itself where it is JSON, a function by its code, any other object by its type."""
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    code = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
    if code is not None:
        return [code.co_code.hex(), code.co_names, as_plain(code.co_consts)]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def digest_files(path: str) -> str | None:
    """Return the sha256 of the files that an option names, wherever they are: one, all in a folder, or those of a pattern.

    None where there are none, or one cannot be read.
    """
    place = local_path(path)
    files = [file for file in sorted(place.rglob("*")) if not file.is_dir()] if place.is_dir() else data_files(path)
    parts = []
    try:
        for file in files:
            name = file.relative_to(place) if file.is_relative_to(place) else file.name
            parts.append([str(name), digest_file(file.resolve(), *stamp(file))])
    except OSError:  # loading says what is wrong
        return None
    return digest(parts) if parts else None


def stamp(file: Path) -> tuple[int, int]:
    """Return a file's size and modification time, which change with its content."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@cache
def digest_file(file: Path, size: int, modified: int) -> str:
    """Return the sha256 of a file. A start asks several times, and data may be large: one with the same `stamp` is read once a process."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def content(
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module,
    teachers: Mapping[str, nn.Module | None],
    train: Sequence[Prompt],
    evaluation: Sequence[Prompt],
    start: nn.Module | None = None,
) -> dict[str, str]:
    """Return digests of what was loaded and is in no checkpoint.

    Args:
        teachers: By label; None where a server has it, which the canary identifies.
        start: The frozen copy of the student's start, if there is one.
    """
    digests = {f"teachers.{label}" if label else "teacher": teacher for label, teacher in teachers.items()}
    return {
        **({} if start is None else {"the student's start": digest(frozen(start))}),
        "tokenizer": digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token_id]),
        **{name: digest(["served"] if teacher is None else frozen(teacher)) for name, teacher in digests.items()},
        "the student's frozen weights": digest(frozen(student)),
        "training data": digest(rows(train)),
        "evaluation data": digest(rows(evaluation)),
    }


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of all that a tokenizer does to a text: with `teacher.alignment=spans` the teacher's is part of the objective."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id])


def digest(parts: Iterable[object]) -> str:
    """Return the sha256 of JSON values."""
    hasher = sha256()
    for part in parts:
        hasher.update(json.dumps(part, default=str).encode())
    return hasher.hexdigest()


def rows(prompts: Sequence[Prompt]) -> Iterable[object]:
    """Yield what identifies each prompt: its ids in each view, or its chats where the chat template writes the date into them."""
    for prompt in prompts:
        ids = (prompt.ids, prompt.teacher_ids) if prompt.contrast_ids is None else (prompt.ids, prompt.teacher_ids, prompt.contrast_ids)
        yield (prompt.sample_id, *(prompt.chats or ids), *(prompt.answers or [None]), *([prompt.given] if prompt.given else []))


def frozen(model: nn.Module) -> Iterable[object]:
    """Yield name, shape, dtype and a checksum of each parameter that is not trained."""
    return (
        (name, list(parameter.shape), str(parameter.dtype), bit_sum(parameter.detach()))
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    )


def bit_sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bit patterns as integers, which any change of one of them changes."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return sum(int(piece.sum(dtype=torch.int64)) for piece in tensor.contiguous().view(integer).flatten().split(CHUNK))


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, force: bool) -> list[str]:
    """Raise `ConfigError`, with the differences, unless the run `wanted` may resume from what `where` holds.

    Args:
        force: Return the differences instead.
    """
    old = stored.get("files", {})
    moved = [
        option for option, files in wanted["files"].items() if option.startswith("data") and files is not None and files == old.get(option)
    ]
    changed = differences(with_defaults(stored["config"], to_dict(Config())), wanted["config"], moved=moved)
    if stored["prompts_per_step"] != wanted["prompts_per_step"]:
        changed.append(
            f"prompts per step were {stored['prompts_per_step']}, are {wanted['prompts_per_step']}: set train.batch_size so that "
            "train.batch_size × processes is what it was"
        )
    return refuse(changed, where, force)


def check_files(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, force: bool) -> list[str]:
    """Do what `check_same` does, for data files, folders of models, rows and rewards, without loading anything."""
    old = stored.get("files", {})
    names = [name for name, now in wanted["files"].items() if now is not None and old.get(name) not in (None, now)]
    return refuse([f"{name} has other content than it had" for name in names], where, force)


def with_defaults(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config with the defaults of the options that its version did not have."""
    return {
        name: with_defaults(value, defaults[name]) if isinstance(value, dict) and isinstance(defaults.get(name), dict) else value
        for name, value in {**defaults, **stored}.items()
    }


def check_content(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, force: bool) -> list[str]:
    """Do what `check_same` does, for what was loaded."""
    old, new = stored["content"], wanted["content"]
    changed = [f"{name} changed" for name in {**old, **new} if old.get(name) != new.get(name)]
    if stored["prompts"] != wanted["prompts"]:
        changed.append(f"there were {stored['prompts']} prompts, there are {wanted['prompts']}")
    return refuse(changed, where, force)


def refuse(changed: list[str], where: Path, force: bool) -> list[str]:
    if changed and not force:
        raise ConfigError(
            f"{where} contains another run: {'; '.join(changed)}. Set another name=…, or repeat the options to resume "
            "(resume_force=true resumes despite the differences)"
        )
    return changed


def differences(old: Any, new: Any, key: str = "", moved: Sequence[str] = ()) -> list[str]:
    """Return the options that differ and change the training, with old and new value. `moved`: paths of the same files."""
    of_teacher = re.sub(r"^teachers\.[^.]+\.", "teacher.", key)
    if of_teacher in MAY_CHANGE or key in REMOVED or key in moved:
        return []
    old = {} if old is None and new == {} else old  # a mapping that older versions did not have
    if isinstance(old, dict) and isinstance(new, dict):
        names = {name: f"{key}.{name}" if key else name for name in (*old, *new)}
        return [line for name, full in names.items() for line in differences(old.get(name), new.get(name), full, moved)]
    if old in (None, {}) and new in (None, {}):  # runs of before there were `data.mix` and `teachers`
        return []
    return [] if old == new else [f"{key} was {format_value(old)}, is {format_value(new)}"]
