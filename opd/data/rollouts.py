"""Rollouts, and the micro-batches they are scored and learnt from in.

Shapes: `B` sequences, `T` positions, `N` kept completion tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from opd.data.prompts import Prompt


class FinishReason(Enum):
    stop = "stop"  # the student wrote an end-of-sequence token
    length = "length"  # cut off at max_new_tokens


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be sampled. (epoch, sample id, attempt) decides its random numbers; attempt counts the completions of a prompt."""

    prompt: Prompt
    epoch: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """A request and what the student wrote.

    completion: the sampled ids, the end-of-sequence token among them. behaviour_logp: the log-prob of each under the distribution it was
    drawn from, float32 on the CPU.
    """

    request: Request
    completion: tuple[int, ...]
    behaviour_logp: Tensor
    finish_reason: FinishReason

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.length

    def first(self, tokens: int | None) -> "Rollout":
        """The rollout with the first so many tokens of its completion; all of it for None."""
        if tokens is None or len(self.completion) <= tokens:
            return self
        return replace(self, completion=self.completion[:tokens], behaviour_logp=self.behaviour_logp[:tokens])

    @property
    def length(self) -> int:
        """Tokens of prompt and completion, in the longer of student's and teacher's view."""
        prompt = self.request.prompt
        return max(len(prompt.ids), len(prompt.seen_by_teacher)) + len(self.completion)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sequences as a model takes them.

    ids_BT: prompts and completions, padded on the right. Every model here is causal, so padding behind the end reaches nothing that is kept
    and needs no mask. positions_BT: None, or, with all sequences end to end in one row (B = 1), positions that begin anew with each; that
    is what tells attention to keep them apart. kept_N: positions in the flattened (B·T) whose next token is a completion token.
    """

    ids_BT: Tensor
    kept_N: Tensor
    positions_BT: Tensor | None = None

    def to(self, device: torch.device) -> "Inputs":
        positions_BT = None if self.positions_BT is None else self.positions_BT.to(device)
        return Inputs(self.ids_BT.to(device), self.kept_N.to(device), positions_BT)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts that go through a model together.

    inputs: the sequences as the student sees them; teacher_inputs: as the teacher does (the same object unless it has its own prompt).
    target_N: the completion tokens. behaviour_logp_N: their log-probs under the sampler. sequence_N: the rollout of each, as an index into
    the step's rollouts.
    """

    inputs: Inputs
    teacher_inputs: Inputs
    target_N: Tensor
    behaviour_logp_N: Tensor
    sequence_N: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        inputs = self.inputs.to(device)
        teacher_inputs = inputs if self.teacher_inputs is self.inputs else self.teacher_inputs.to(device)
        return MicroBatch(inputs, teacher_inputs, self.target_N.to(device), self.behaviour_logp_N.to(device), self.sequence_N.to(device))


def collate(rollouts: Sequence[Rollout], indices: Sequence[int], pad_id: int, packed: bool = False) -> MicroBatch:
    """The micro-batch of the rollouts at `indices`."""
    chosen = [rollouts[index] for index in indices]
    inputs = lay_out([rollout.request.prompt.ids for rollout in chosen], chosen, pad_id, packed)
    own_prompts = any(rollout.request.prompt.teacher_ids is not None for rollout in chosen)
    return MicroBatch(
        inputs,
        lay_out([rollout.request.prompt.seen_by_teacher for rollout in chosen], chosen, pad_id, packed) if own_prompts else inputs,
        torch.tensor([token for rollout in chosen for token in rollout.completion], dtype=torch.long),
        torch.cat([rollout.behaviour_logp for rollout in chosen]),
        torch.tensor([index for index, rollout in zip(indices, chosen, strict=True) for _ in rollout.completion], dtype=torch.long),
    )


def lay_out(prompts: Sequence[tuple[int, ...]], rollouts: Sequence[Rollout], pad_id: int, packed: bool) -> Inputs:
    """Prompts and completions in rows padded on the right, or end to end in one row with positions that begin anew."""
    sequences = [prompt + rollout.completion for prompt, rollout in zip(prompts, rollouts, strict=True)]
    width = max(map(len, sequences))
    starts = [sum(map(len, sequences[:row])) if packed else row * width for row in range(len(sequences))]
    kept = [
        start + len(prompt) - 1 + offset
        for start, prompt, rollout in zip(starts, prompts, rollouts, strict=True)
        for offset in range(len(rollout.completion))
    ]
    if packed:
        ids = torch.tensor([token for sequence in sequences for token in sequence])[None]
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
        return Inputs(ids, torch.tensor(kept, dtype=torch.long), positions)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return Inputs(ids, torch.tensor(kept, dtype=torch.long))


def split_by_tokens(lengths: Sequence[int], max_tokens: int, packed: bool = False, max_padding: float = math.inf) -> list[list[int]]:
    """Indices grouped, longest first, so that no group takes more than `max_tokens`; a longer one stands alone.

    A group takes rows × longest with padding, of which there are at most `max_padding` tokens, and the sum of its lengths when packed.
    """
    groups: list[list[int]] = []
    used, padding = 0, 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        taken = lengths[index] if packed else lengths[groups[-1][0]] if groups else 0
        padding += taken - lengths[index]
        if groups and used + taken <= max_tokens and padding <= max_padding:
            groups[-1].append(index)
            used += taken
        else:
            groups.append([index])
            used, padding = lengths[index], 0
    return groups


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, pad_id: int, packed: bool = False, max_padding: float = math.inf
) -> list[MicroBatch]:
    """Those with a completion, in groups by `split_by_tokens`."""
    told = [index for index, rollout in enumerate(rollouts) if rollout.completion]
    groups = split_by_tokens([rollouts[index].length for index in told], max_tokens, packed, max_padding)
    return [collate(rollouts, [told[place] for place in group], pad_id, packed) for group in groups]


def repetition(completion: Sequence[int], size: int = 4) -> float:
    """The share of the runs of `size` tokens that stood in the same completion before; 0 for one that has none."""
    runs = [tuple(completion[start : start + size]) for start in range(len(completion) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
