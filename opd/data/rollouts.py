"""Rollouts, and the micro-batches in which models read them.

Shapes: `B` sequences, `T` positions, `N` trained tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from opd.data.prompts import Prompt
from opd.data.spans import Alignment

ANY_ID = 0  # pads what a teacher with other tokens reads: the student's padding may be no token of it


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
    """A prompt with one completion.

    Args:
        request: What was asked for.
        completion: Its ids, including the end-of-sequence token.
        behaviour_logp: Log-prob of each id under the distribution it was drawn from, float32 on the CPU.
        finish_reason: Why the completion ended.
        mask: Which tokens of the completion are trained; None for all of them.
        given: Whether the completion is the dataset's (`data.completion`) and was not sampled; its behaviour_logp is then 0.
        alignment: The completion in the tokens of a teacher with another tokenizer; None where it reads the student's.
    """

    request: Request
    completion: tuple[int, ...]
    behaviour_logp: Tensor
    finish_reason: FinishReason
    mask: tuple[bool, ...] | None = None
    given: bool = False
    alignment: Alignment | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.length

    @property
    def answer(self) -> tuple[int, ...]:
        """The completion without its end-of-sequence token, which need not be a special token."""
        return self.completion if self.truncated else self.completion[:-1]

    def masked(self, mask: tuple[bool, ...]) -> "Rollout":
        """Return the rollout with a mask of trained tokens in place of its own, which has all of them."""
        return replace(self, mask=mask, alignment=None if self.alignment is None else self.alignment.masked(mask))

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
        """The completion up to its last scored token, in the teacher's tokens."""
        return self.read if self.alignment is None else self.alignment.read

    @property
    def length(self) -> int:
        """Tokens that models read of it, in the longest view of its prompt."""
        prompt = self.request.prompt
        return max(len(prompt.ids) + len(self.read), max(map(len, prompt.scored_views)) + len(self.read_by_teacher))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sequences as a model reads them.

    Args:
        ids_BT: Token ids, padded on the right. Models are causal, so padding after the end reaches no trained position and needs no mask.
        predicting_N: Positions in the flattened (B*T) whose next token is a trained one.
        positions_BT: None; or, for sequences packed into one row, positions that restart at each sequence, which keeps them apart.
        teacher: The label of the teacher of all sequences, which is one; empty for `teacher`.
    """

    ids_BT: Tensor
    predicting_N: Tensor
    positions_BT: Tensor | None = None
    teacher: str = ""

    def to(self, device: torch.device) -> "Inputs":
        positions_BT = None if self.positions_BT is None else self.positions_BT.to(device)
        return Inputs(self.ids_BT.to(device), self.predicting_N.to(device), positions_BT, self.teacher)


@dataclass(frozen=True, slots=True)
class SpanTokens:
    """The tokens of a teacher with another tokenizer, and where their spans end. Shape: `M` teacher tokens.

    Args:
        ids_M: Those of the scored spans, rollout by rollout.
        row_M: For each of them the place among the trained tokens at which its span ends.
        previous_N: At the last token of a span, the last one of the span before it in the same completion; -1 where that one is not
            scored, and elsewhere.
        ends: After how many trained tokens a span ends, or a token that is not scored; ascending, on the CPU.
    """

    ids_M: Tensor
    row_M: Tensor
    previous_N: Tensor
    ends: tuple[int, ...]

    def to(self, device: torch.device) -> "SpanTokens":
        return SpanTokens(self.ids_M.to(device), self.row_M.to(device), self.previous_N.to(device), self.ends)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts that go through the models together.

    Args:
        rollouts: Their indices in the list that was split.
        ids_N: Their trained tokens, rollout by rollout.
        inputs: What the student reads.
        teacher_inputs: What the teacher reads: the same object unless a prompt has a version of its own for the teacher. With `spans`, its
            `predicting_N` are of the teacher's tokens.
        contrast_inputs: What the teacher reads with `teacher.contrast`.
        spans: For a teacher with another tokenizer.
    """

    rollouts: tuple[int, ...]
    ids_N: Tensor
    inputs: Inputs
    teacher_inputs: Inputs
    contrast_inputs: Inputs | None = None
    spans: SpanTokens | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        inputs = self.inputs.to(device)
        teacher_inputs = inputs if self.teacher_inputs is self.inputs else self.teacher_inputs.to(device)
        contrast_inputs = None if self.contrast_inputs is None else self.contrast_inputs.to(device)
        spans = None if self.spans is None else self.spans.to(device)
        return MicroBatch(self.rollouts, self.ids_N.to(device), inputs, teacher_inputs, contrast_inputs, spans)


def collate(rollouts: Sequence[Rollout], indices: Sequence[int], pad_id: int, packed: bool = False) -> MicroBatch:
    """Return the micro-batch of the rollouts at `indices`."""
    chosen = [rollouts[index] for index in indices]
    inputs = lay_out(chosen, [rollout.request.prompt.ids for rollout in chosen], pad_id, packed)
    ids_N = torch.tensor([rollout.completion[offset] for rollout in chosen for offset in rollout.trained], dtype=torch.long)
    alignments = [rollout.alignment for rollout in chosen if rollout.alignment is not None]
    if alignments:
        return MicroBatch(tuple(indices), ids_N, inputs, *lay_out_spans(chosen, alignments, packed))
    teacher_inputs = inputs
    if any(rollout.request.prompt.teacher_ids is not None for rollout in chosen):
        teacher_inputs = lay_out(chosen, [rollout.request.prompt.seen_by_teacher for rollout in chosen], pad_id, packed)
    contrast = [rollout.request.prompt.contrast_ids for rollout in chosen]
    contrast_inputs = None if None in contrast else lay_out(chosen, [ids for ids in contrast if ids is not None], pad_id, packed)
    return MicroBatch(tuple(indices), ids_N, inputs, teacher_inputs, contrast_inputs)


def lay_out_spans(rollouts: Sequence[Rollout], alignments: Sequence[Alignment], packed: bool) -> tuple[Inputs, None, SpanTokens]:
    """Return what a teacher with another tokenizer reads, its missing second view, and its tokens."""
    ids, rows, ends, begin = [], [], [], 0
    previous: list[int] = []
    offsets = [[offset for span in each.scored for offset in range(span.teacher_start, span.teacher_stop)] for each in alignments]
    for rollout, alignment, own_offsets in zip(rollouts, alignments, offsets, strict=True):
        following, row_of = alignment.following, {offset: begin + row for row, offset in enumerate(rollout.trained)}
        ids += [alignment.teacher_ids[offset] for offset in own_offsets]
        rows += [row_of[span.stop - 1] for span in alignment.scored for _ in range(span.teacher_start, span.teacher_stop)]
        ends += [row_of[offset] + 1 for offset in rollout.trained if following[offset] <= 0]
        own_previous, before = dict.fromkeys(rollout.trained, -1), -1
        for span in alignment.spans:
            if span.unscored is None:
                own_previous[span.stop - 1] = before
            before = row_of[span.stop - 1] if span.unscored is None else -1
        previous += own_previous.values()
        begin += len(rollout.trained)
    prompts = [rollout.request.prompt.seen_by_teacher for rollout in rollouts]
    inputs = lay_out(rollouts, prompts, ANY_ID, packed, [alignment.read for alignment in alignments], offsets)
    ids_M, row_M, previous_N = (torch.tensor(values, dtype=torch.long) for values in (ids, rows, previous))
    return inputs, None, SpanTokens(ids_M, row_M, previous_N, tuple(ends))


def lay_out(
    rollouts: Sequence[Rollout],
    prompts: Sequence[tuple[int, ...]],
    pad_id: int,
    packed: bool,
    read: Sequence[tuple[int, ...]] | None = None,
    scored: Sequence[Sequence[int]] | None = None,
) -> Inputs:
    """Lay prompts and completions out in rows padded on the right or, `packed`, end to end in one row.

    Args:
        read: The completions, as far as the model reads them; None for the student's tokens.
        scored: Offsets within each of the tokens whose log-probs are wanted; None for the trained tokens.
    """
    read = [rollout.read for rollout in rollouts] if read is None else read
    scored = [rollout.trained for rollout in rollouts] if scored is None else scored
    sequences = [prompt + completion for prompt, completion in zip(prompts, read, strict=True)]
    width = max(map(len, sequences))
    starts = [sum(map(len, sequences[:row])) if packed else row * width for row in range(len(sequences))]
    predicting = [
        start + len(prompt) - 1 + offset for start, prompt, offsets in zip(starts, prompts, scored, strict=True) for offset in offsets
    ]
    predicting_N = torch.tensor(predicting, dtype=torch.long)
    (teacher,) = {rollout.request.prompt.teacher for rollout in rollouts}
    if packed:
        ids = torch.tensor([token for sequence in sequences for token in sequence])[None]
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
        return Inputs(ids, predicting_N, positions, teacher)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return Inputs(ids, predicting_N, None, teacher)


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
    """Return the micro-batches of the rollouts that have trained tokens, teacher by teacher, longest first."""
    batches = []
    for teacher in sorted({rollout.request.prompt.teacher for rollout in rollouts}):
        trained = [index for index, rollout in enumerate(rollouts) if rollout.read and rollout.request.prompt.teacher == teacher]
        groups = split_by_tokens([rollouts[index].length for index in trained], max_tokens, packed, max_padding)
        batches += [collate(rollouts, [trained[place] for place in group], pad_id, packed) for group in groups]
    return batches


def repetition(completion: Sequence[int], size: int = 4) -> float:
    """Return the share of `size`-grams that occurred earlier in the same completion; 0 where there is none."""
    grams = [tuple(completion[start : start + size]) for start in range(len(completion) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
