"""Rollouts, and the micro-batches they are scored and learnt from in.

Shapes: `B` sequences, `T` positions, `N` kept completion tokens.
"""

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

    def first(self, tokens: int | None) -> "Rollout":
        """The rollout with the first so many tokens of its completion; all of it for None."""
        if tokens is None or len(self.completion) <= tokens:
            return self
        return replace(self, completion=self.completion[:tokens], behaviour_logp=self.behaviour_logp[:tokens])

    @property
    def length(self) -> int:
        return len(self.request.prompt.ids) + len(self.completion)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts that go through a model together.

    ids_BT: prompts and completions, padded on the right. Every model here is causal, so padding behind the end reaches nothing that is kept
    and needs no mask. kept_N: positions in the flattened (B·T) whose next token is a completion token. target_N: that token.
    behaviour_logp_N: its log-prob under the sampler. sequence_N: its rollout, as an index into the step's rollouts.
    """

    ids_BT: Tensor
    kept_N: Tensor
    target_N: Tensor
    behaviour_logp_N: Tensor
    sequence_N: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def collate(rollouts: Sequence[Rollout], indices: Sequence[int], pad_id: int) -> MicroBatch:
    """The micro-batch of the rollouts at `indices`."""
    chosen = [rollouts[index] for index in indices]
    width = max(rollout.length for rollout in chosen)
    ids_BT = torch.full((len(chosen), width), pad_id, dtype=torch.long)
    kept: list[int] = []
    targets: list[int] = []
    sequences: list[int] = []
    for row, (index, rollout) in enumerate(zip(indices, chosen, strict=True)):
        prompt, completion = rollout.request.prompt.ids, rollout.completion
        ids_BT[row, : rollout.length] = torch.tensor(prompt + completion)
        kept += [row * width + len(prompt) - 1 + offset for offset in range(len(completion))]
        targets += completion
        sequences += [index] * len(completion)
    return MicroBatch(
        ids_BT,
        torch.tensor(kept, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.cat([rollout.behaviour_logp for rollout in chosen]),
        torch.tensor(sequences, dtype=torch.long),
    )


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped, longest first, so that no group's padded size (rows × longest) exceeds `max_tokens`; a longer one stands alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def micro_batches(rollouts: Sequence[Rollout], max_tokens: int, pad_id: int) -> list[MicroBatch]:
    groups = split_by_tokens([rollout.length for rollout in rollouts], max_tokens)
    return [collate(rollouts, group, pad_id) for group in groups]
