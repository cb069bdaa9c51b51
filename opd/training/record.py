"""A rollout as it is stored in the run folder: texts, ids, and what student and teacher thought of each token."""

from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from opd.models.load import decode
from opd.runs.text import one_line
from opd.training.account import Scored

T = TypeVar("T")


def record(tokenizer: PreTrainedTokenizerBase, scored: Scored) -> dict[str, Any]:
    """A rollout as it is stored: texts, ids, and what is known of each completion token; null for tokens that were not scored.

    learnt: how many tokens, from the first on, were learnt from. alternatives: at each token the teacher's most probable ids, their texts
    and log-probs, the best first; null in most steps.
    """
    rollout = scored.rollout
    length = len(rollout.completion)
    return {
        "sample_id": rollout.request.prompt.sample_id,
        "epoch": rollout.request.epoch,
        "attempt": rollout.request.attempt,
        "prompt": decode(tokenizer, rollout.request.prompt.ids),
        "completion": decode(tokenizer, rollout.completion),
        "tokens": [decode(tokenizer, [token]) for token in rollout.completion],
        "ids": list(rollout.completion),
        "finish_reason": rollout.finish_reason.value,
        "learnt": scored.learnt,
        "behaviour_logp": rounded(rollout.behaviour_logp),
        "student_logp": filled(rounded(scored.logp), length),
        "teacher_logp": filled(rounded(scored.teacher_logp), length),
        "entropy": filled(rounded(scored.entropy), length),
        "clipped": flags(scored.clipped, length),
        "cut": flags(scored.cut, length),
        "alternatives": alternatives(tokenizer, scored, length),
    }


def alternatives(tokenizer: PreTrainedTokenizerBase, scored: Scored, length: int) -> list[Any] | None:
    if scored.top_ids is None or scored.top_logp is None:
        return None
    rows = zip(scored.top_ids.tolist(), map(rounded, scored.top_logp), strict=True)
    texts = {token: decode(tokenizer, [token]) for token in set(scored.top_ids.flatten().tolist())}
    found = [[{"id": token, "text": texts[token], "logp": logp} for token, logp in zip(ids, logps, strict=True)] for ids, logps in rows]
    return filled(found, length)


def flags(values: torch.Tensor | None, length: int) -> list[bool | None] | None:
    """None where the objective has no such thing."""
    return None if values is None else filled(values.bool().tolist(), length)


def filled(values: list[T], length: int) -> list[T | None]:
    """With null for tokens that were not scored, behind `ppo.loss_prefix` or dropped."""
    return [*values, *[None] * (length - len(values))]


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def sample_text(tokenizer: PreTrainedTokenizerBase, scored: list[Scored]) -> str:
    """One completion for the display, on one line."""
    if not scored:
        return ""
    rollout = scored[0].rollout
    return one_line(f"{rollout.request.prompt.text} → {decode(tokenizer, rollout.completion, skip_special_tokens=True)}")
