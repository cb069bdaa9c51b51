"""What a run is: its options, and what they led to when they were read. Only a run that is the same goes on from its checkpoints."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from opd.config.compose import to_dict
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.errors import ConfigError

log = logging.getLogger(__name__)

# What may differ between a run and its continuation, because it changes nothing that is learnt or compared. Prompts per process may,
# as long as their number over all processes stays.
MAY_CHANGE = (
    "name", "resume", "resume_force", "device", "checkpoint", "track", "train.batch_size", "train.max_tokens_per_micro_batch",
    "train.watchdog_minutes", "eval.steps", "eval.batch_size", "eval.samples", "eval.tasks", "sampling.guard", "sampling.vllm", "launch",
    "sweep", "teacher.placement", "teacher.device",
)  # fmt: skip
PIECE = 2**24  # numbers that are added up at a time


def identity(config: Config, accelerator: Accelerator) -> dict[str, Any]:
    """What a run is before anything is loaded."""
    return {"config": to_dict(config), "prompts_per_step": config.train.batch_size * accelerator.num_processes}


def content(
    tokenizer: PreTrainedTokenizerBase, student: nn.Module, teacher: nn.Module, train: Sequence[Prompt], evaluation: Sequence[Prompt]
) -> dict[str, str]:
    """Digests of what was loaded and is in no checkpoint."""
    return {
        "tokenizer": digest([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token_id]),
        "teacher": digest(frozen(teacher)),
        "what is frozen of the student": digest(frozen(student)),
        "training data": digest(rows(train)),
        "evaluation data": digest(rows(evaluation)),
    }


def digest(parts: Iterable[object]) -> str:
    """Of anything that JSON can say."""
    found = sha256()
    for part in parts:
        found.update(json.dumps(part).encode())
    return found.hexdigest()


def rows(prompts: Sequence[Prompt]) -> Iterable[object]:
    return ((prompt.sample_id, prompt.ids, prompt.teacher_ids, prompt.answer) for prompt in prompts)


def frozen(model: nn.Module) -> Iterable[object]:
    """Each parameter that is not trained: its name, shape, dtype and the sum of its bits, read where it is."""
    return (
        (name, list(parameter.shape), str(parameter.dtype), bit_sum(parameter.detach()))
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    )


def bit_sum(tensor: Tensor) -> int:
    """The sum of a tensor's numbers taken as whole numbers, which any change of one of them changes."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return sum(int(piece.sum(dtype=torch.int64)) for piece in tensor.contiguous().view(whole).flatten().split(PIECE))


def check_same(held: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, force: bool) -> list[str]:
    """Raises `ConfigError`, with what differs, unless a run that is `wanted` may go on from what `where` holds.

    force: what differs is returned instead.
    """
    changed = differences(held["config"], wanted["config"])
    if held["prompts_per_step"] != wanted["prompts_per_step"]:
        changed.append(
            f"prompts a step were {held['prompts_per_step']}, are {wanted['prompts_per_step']} (train.batch_size × processes: with another "
            "number of processes set train.batch_size so that the product stays)"
        )
    return refuse(changed, where, force)


def check_content(held: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, force: bool) -> list[str]:
    """As `check_same`, for what was loaded."""
    changed = [f"{name} changed" for name in wanted["content"] if held["content"][name] != wanted["content"][name]]
    if held["prompts"] != wanted["prompts"]:
        changed.append(f"there were {held['prompts']} prompts, there are {wanted['prompts']}")
    return refuse(changed, where, force)


def refuse(changed: list[str], where: Path, force: bool) -> list[str]:
    if changed and not force:
        raise ConfigError(
            f"{where} holds another run: {'; '.join(changed)}. Take another name=…, or the same options to go on "
            "(resume_force=true goes on in spite of it)"
        )
    return changed


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Options, with old and new value, in which two configs differ and which alter what is learnt."""
    if key in MAY_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for name in {**old, **new} for line in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)]
    return [] if old == new else [f"{key} was {old}, is {new}"]
