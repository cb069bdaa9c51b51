"""Tokenizers that cut every text alike and differ in a few added tokens, as those of Qwen2.5 and Qwen3 do.

The ids of the common tokens are then the support of both models' distributions; all others are masked before the softmax.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd.data.chat_template import ChatTemplate
from opd.errors import ConfigError

REMEDY = "set teacher.alignment=spans, with which the teacher reads the text in its own tokens, or another teacher.path"
SHOWN = 3  # tokens that a message names


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two vocabularies of which each may have a few added tokens of its own.

    Args:
        shared: Ids that are the same token in both.
        student, teacher: The added tokens that only one of them has, by id.
    """

    shared: frozenset[int]
    student: Mapping[int, str]
    teacher: Mapping[int, str]

    def masked(self, size: int) -> Tensor:
        """Return the ids below `size` that are not shared, ascending: tokens of one model, and padding of the heads."""
        return torch.tensor([token for token in range(size) if token not in self.shared], dtype=torch.long)

    def name(self, token: int) -> str:
        """Return an id outside the shared ones for people."""
        text = self.teacher.get(token) or self.student.get(token)
        return f"id {token}, which is no token" if text is None else repr(text)

    def describe(self) -> str:
        """Return which tokens are masked, in one line."""
        sides = {"the student": self.student, "the teacher": self.teacher}
        alone = [f"only {who} has {shown(tokens.values())}" for who, tokens in sides.items() if tokens]
        return f"{len(self.shared):,} tokens have the same ids in student and teacher; {' and '.join(alone)}: masked in both"


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Overlap:
    """Return what two tokenizers share that cut every text alike.

    Raises:
        ConfigError: They cut texts differently, a token has two ids, an id is two tokens, or one of them lacks a token that is not an
            added one. The line names the first of it.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if problem := find_problem(student, teacher):
        raise ConfigError(f"teacher: {problem}; {REMEDY}")
    return Overlap(
        frozenset(ours[token] for token in ours.keys() & theirs.keys()),
        {ours[token]: token for token in sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)},
        {theirs[token]: token for token in sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)},
    )


def find_problem(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Return why the ids of the two cannot be compared; nothing where they can."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if moved := sorted((token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]), key=ours.__getitem__):
        pairs = ", ".join(f"{token!r} (student {ours[token]}, teacher {theirs[token]})" for token in moved[:SHOWN])
        return f"its tokenizer maps {len(moved)} tokens to other ids than the student's: {pairs}"
    for who, own, other, tokenizer in (("student", ours, theirs, student), ("teacher", theirs, ours, teacher)):
        if alone := sorted(own.keys() - other.keys() - tokenizer.get_added_vocab().keys(), key=own.__getitem__):
            return f"only the {who}'s tokenizer has {shown(alone)}, which {'is' if len(alone) == 1 else 'are'} not added to its vocabulary"
    ids = {theirs[token]: token for token in theirs.keys() - ours.keys()}
    if clash := sorted((ours[token], token) for token in ours.keys() - theirs.keys() if ours[token] in ids):
        token, text = clash[0]
        return f"id {token} is {text!r} in the student's tokenizer and {ids[token]!r} in the teacher's"
    if not (student.is_fast and teacher.is_fast):
        return "its tokenizer has other tokens than the student's, and without a tokenizer.json the two cannot be compared"
    for part, (one, other) in zip(PARTS, zip(parts_of(student), parts_of(teacher), strict=True), strict=True):
        if one != other:
            return f"the {part} of its tokenizer is not that of the student's: the same text is cut into other tokens"
    return ""


PARTS = ("normalizer", "pre-tokenizer", "model with its merges")


def parts_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    """Return what cuts a text into tokens, in the order of `PARTS`. Added tokens may be in the model's vocabulary too."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], tokenizer.get_added_vocab()
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {token: index for token, index in vocab.items() if token not in added}
    elif vocab is not None:  # Unigram: tokens with their scores
        model["vocab"] = [entry for entry in vocab if entry[0] not in added]
    return spec.get("normalizer"), spec.get("pre_tokenizer"), model


def shown(tokens: Iterable[str]) -> str:
    """Return the first few tokens, for a message."""
    texts = [repr(token) for token in tokens]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def end_ids(overlap: Overlap, pairs: Sequence[tuple[PreTrainedTokenizerBase, Sequence[int]]], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shared ids that end a completion: those of either model, and those with which a chat template closes an answer.

    Args:
        pairs: Tokenizer and end ids of the student, then of the teacher.
        kwargs: `data.chat_template_kwargs`.

    Raises:
        ConfigError: None of them is shared: no completion could end.
    """
    ends = {token for _, ids in pairs for token in ids}
    for tokenizer, _ in pairs:
        token = ChatTemplate(tokenizer, kwargs).turn_end()
        if token is not None and token in tokenizer.get_added_vocab().values():
            ends.add(token)
    if not ends & overlap.shared:
        raise ConfigError(
            f"teacher.path: no token that ends a completion ({', '.join(map(overlap.name, sorted(ends)))}) is one of both models; set "
            "eos_token_id in generation_config.json to one that is, or teacher.path to a model of the student's family"
        )
    return tuple(sorted(ends & overlap.shared))
