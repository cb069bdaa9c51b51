"""Rollouts, and the micro-batches in which models read them.

Shapes: `B` sequences, `T` positions, `N` trained tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from opd.data.prompts import Prompt
from opd.data.spans import Alignment

ANY_ID = 0  # pads what the teacher reads: the student's padding may be no token of it


class FinishReason(Enum):
    stop = "stop"  # the student generated an end-of-sequence token
    length = "length"  # cut off at max_new_tokens


@dataclass(frozen=True, slots=True)
class Request:
    """A completion to sample. Its random numbers derive from (epoch, sample id, attempt); attempt numbers the completions of one prompt."""

    prompt: Prompt
    epoch: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt with one sampled completion.

    Args:
        request: What was asked for.
        completion: The sampled ids, including the end-of-sequence token.
        behaviour_logp: Log-prob of each id under the distribution it was drawn from, float32 on the CPU.
        finish_reason: Why the completion ended.
        mask: Which tokens of the completion are trained; None for all of them.
        alignment: The completion in the tokens of a teacher with another tokenizer; None where it reads the student's.
    """

    request: Request
    completion: tuple[int, ...]
    behaviour_logp: Tensor
    finish_reason: FinishReason
    mask: tuple[bool, ...] | None = None
    alignment: Alignment | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.length

    @property
    def answer(self) -> tuple[int, ...]:
        """The completion without its end-of-sequence token, which need not be a special token."""
        return self.completion if self.truncated else self.completion[:-1]

    @property
    def trained(self) -> list[int]:
        """Offsets of the trained tokens within the completion, ascending."""
        if self.mask is None:
            return list(range(len(self.completion)))
        return [offset for offset, is_trained in enumerate(self.mask) if is_trained]

    @property
    def read(self) -> tuple[int, ...]:
        """The completion up to its last trained token: what models have to read."""
        trained = self.trained
        return self.completion[: trained[-1] + 1] if trained else ()

    @property
    def read_by_teacher(self) -> tuple[int, ...]:
        return self.read if self.alignment is None else self.alignment.read

    @property
    def length(self) -> int:
        """Tokens that models read of it, in the longer of the student's and the teacher's view."""
        prompt = self.request.prompt
        return max(len(prompt.ids) + len(self.read), len(prompt.seen_by_teacher) + len(self.read_by_teacher))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sequences as a model reads them.

    Args:
        ids_BT: Token ids, padded on the right. Models are causal, so padding after the end reaches no trained position and needs no mask.
        predicting_N: Positions in the flattened (B*T) whose next token is a trained one.
        positions_BT: None; or, for sequences packed into one row, positions that restart at each sequence, which keeps them apart.
    """

    ids_BT: Tensor
    predicting_N: Tensor
    positions_BT: Tensor | None = None

    def to(self, device: torch.device) -> "Inputs":
        positions_BT = None if self.positions_BT is None else self.positions_BT.to(device)
        return Inputs(self.ids_BT.to(device), self.predicting_N.to(device), positions_BT)


@dataclass(frozen=True, slots=True)
class SpanTokens:
    """The tokens of a teacher with another tokenizer, and where their spans end. Shape: `M` teacher tokens.

    Args:
        ids_M: Those of the scored spans, rollout by rollout.
        row_M: For each of them the place among the trained tokens at which its span ends.
        ends: After how many trained tokens a span ends, or a token that is not scored; ascending, on the CPU.
    """

    ids_M: Tensor
    row_M: Tensor
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts that go through the models together.

    Args:
        rollouts: Their indices in the list that was split.
        ids_N: Their trained tokens, rollout by rollout.
        inputs: What the student reads.
        teacher_inputs: What the teacher reads: the same object unless a prompt has a version of its own for the teacher. With `spans`, its
            `predicting_N` are of the teacher's tokens.
        spans: For a teacher with another tokenizer.
    """

    rollouts: tuple[int, ...]
    ids_N: Tensor
    inputs: Inputs
    teacher_inputs: Inputs
    spans: SpanTokens | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        inputs = self.inputs.to(device)
        teacher_inputs = inputs if self.teacher_inputs is self.inputs else self.teacher_inputs.to(device)
        spans = self.spans and SpanTokens(self.spans.ids_M.to(device), self.spans.row_M.to(device), self.spans.ends)
        return MicroBatch(self.rollouts, self.ids_N.to(device), inputs, teacher_inputs, spans)


def collate(rollouts: Sequence[Rollout], indices: Sequence[int], pad_id: int, packed: bool = False) -> MicroBatch:
    """Return the micro-batch of the rollouts at `indices`."""
    chosen = [rollouts[index] for index in indices]
    read, trained = [rollout.read for rollout in chosen], [rollout.trained for rollout in chosen]
    inputs = lay_out([rollout.request.prompt.ids for rollout in chosen], read, trained, pad_id, packed)
    ids_N = torch.tensor([rollout.completion[offset] for rollout in chosen for offset in rollout.trained], dtype=torch.long)
    seen_by_teacher = [rollout.request.prompt.seen_by_teacher for rollout in chosen]
    alignments = [rollout.alignment for rollout in chosen if rollout.alignment is not None]
    if alignments:
        offsets = [[offset for span in each.scored for offset in range(span.teacher_start, span.teacher_stop)] for each in alignments]
        teacher_inputs = lay_out(seen_by_teacher, [rollout.read_by_teacher for rollout in chosen], offsets, ANY_ID, packed)
        return MicroBatch(tuple(indices), ids_N, inputs, teacher_inputs, span_tokens(alignments, offsets, trained))
    teacher_inputs = inputs
    if any(rollout.request.prompt.teacher_ids is not None for rollout in chosen):
        teacher_inputs = lay_out(seen_by_teacher, read, trained, pad_id, packed)
    return MicroBatch(tuple(indices), ids_N, inputs, teacher_inputs)


def span_tokens(alignments: Sequence[Alignment], offsets: Sequence[Sequence[int]], trained: Sequence[Sequence[int]]) -> SpanTokens:
    """Return the teacher's tokens of a micro-batch.

    Args:
        alignments, trained: Of its rollouts.
        offsets: Those of the teacher's scored tokens.
    """
    ids, rows, ends, begin = [], [], [], 0
    for alignment, own_offsets, own_trained in zip(alignments, offsets, trained, strict=True):
        following, row_of = alignment.following, {offset: begin + row for row, offset in enumerate(own_trained)}
        ids += [alignment.teacher_ids[offset] for offset in own_offsets]
        rows += [row_of[span.stop - 1] for span in alignment.scored for _ in range(span.teacher_start, span.teacher_stop)]
        ends += [row_of[offset] + 1 for offset in own_trained if following[offset] <= 0]
        begin += len(own_trained)
    return SpanTokens(torch.tensor(ids, dtype=torch.long), torch.tensor(rows, dtype=torch.long), tuple(ends))


def lay_out(
    prompts: Sequence[tuple[int, ...]], read: Sequence[tuple[int, ...]], scored: Sequence[Sequence[int]], pad_id: int, packed: bool
) -> Inputs:
    """Lay prompts and completions out in rows padded on the right or, `packed`, end to end in one row.

    Args:
        read: The completions, as far as the model reads them.
        scored: Offsets within each of the tokens whose log-probs are wanted.
    """
    sequences = [prompt + completion for prompt, completion in zip(prompts, read, strict=True)]
    width = max(map(len, sequences))
    starts = [sum(map(len, sequences[:row])) if packed else row * width for row in range(len(sequences))]
    predicting = [
        start + len(prompt) - 1 + offset for start, prompt, offsets in zip(starts, prompts, scored, strict=True) for offset in offsets
    ]
    predicting_N = torch.tensor(predicting, dtype=torch.long)
    if packed:
        ids = torch.tensor([token for sequence in sequences for token in sequence])[None]
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
        return Inputs(ids, predicting_N, positions)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return Inputs(ids, predicting_N)


def split_by_tokens(lengths: Sequence[int], max_tokens: int, packed: bool = False, max_padding: float = math.inf) -> list[list[int]]:
    """Group indices, longest first, so that no group takes more than `max_tokens`; a longer one makes a group of its own.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Limit of a group: rows times the longest with padding, the sum of lengths when packed.
        packed: Whether sequences go end to end.
        max_padding: Most padding tokens of a group.
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
    """Return the micro-batches of the rollouts that have trained tokens, longest first."""
    trained = [index for index, rollout in enumerate(rollouts) if rollout.read]
    groups = split_by_tokens([rollouts[index].length for index in trained], max_tokens, packed, max_padding)
    return [collate(rollouts, [trained[place] for place in group], pad_id, packed) for group in groups]


def repetition(completion: Sequence[int], size: int = 4) -> float:
    """Return the share of `size`-grams that occurred earlier in the same completion; 0 where there is none."""
    grams = [tuple(completion[start : start + size]) for start in range(len(completion) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
