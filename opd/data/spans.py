"""A completion as a teacher with another tokenizer reads it, in spans at whose ends both tokenizations have a boundary at the same byte.

A span is the shortest such run of tokens. It is one action of the student: each of its tokens gets the advantage of the whole span, the sum
of the teacher's log-probs minus the sum of the student's, because the gradient of a span's log-prob is the sum of its tokens' gradients.
Without that (a share for each token, or only spans of one token) the expected gradient is that of no KL (tests/test_spans.py).
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from opd.data.token_bytes import NO_BOUNDARY, Encoded, TokenBytes

BAD_BYTE = re.compile("[\udc80-\udcff]")  # how Python's surrogateescape writes a byte that is not UTF-8
LAST_WORD = 6  # bytes
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Unscored(Enum):
    """Why a span is not scored."""

    not_canonical = "not_canonical"  # the student's tokenizer makes other tokens of these bytes: the teacher has no opinion on spellings
    illegible = "illegible"  # not UTF-8, or the teacher's tokenizer changes the text
    unsettled = "unsettled"  # at the end of a completion that was cut off: with more text the teacher's tokens may be others
    unmapped = "unmapped"  # a control token that the teacher does not have, and all that follows; beyond the teacher's positions


@dataclass(frozen=True, slots=True)
class Span:
    """Student tokens [start, stop) of a completion and teacher tokens [teacher_start, teacher_stop) with the same bytes."""

    start: int
    stop: int
    teacher_start: int
    teacher_stop: int
    unscored: Unscored | None = None

    @property
    def is_one_to_one(self) -> bool:
        return self.stop - self.start == 1 and self.teacher_stop - self.teacher_start == 1


@dataclass(frozen=True, slots=True)
class Alignment:
    """A completion in the teacher's tokens, and the spans, which cover all of the student's tokens in order."""

    teacher_ids: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def scored(self) -> list[Span]:
        return [span for span in self.spans if span.unscored is None]

    @property
    def read(self) -> tuple[int, ...]:
        """The teacher's tokens up to the last scored one: what the teacher has to read."""
        scored = self.scored
        return self.teacher_ids[: scored[-1].teacher_stop] if scored else ()

    @property
    def following(self) -> list[int]:
        """For each student token, how many tokens of its span follow it; -1 for one that is not scored."""
        return [span.stop - 1 - offset if span.unscored is None else -1 for span in self.spans for offset in range(span.start, span.stop)]

    def masked(self, mask: Sequence[bool]) -> "Alignment":
        """Return the alignment where only some tokens are trained: a span that the mask cuts is not scored."""
        is_cut = (not all(mask[span.start : span.stop]) for span in self.spans)
        pairs = zip(self.spans, is_cut, strict=True)
        return replace(
            self, spans=tuple(replace(span, unscored=span.unscored or Unscored.unsettled) if cut else span for span, cut in pairs)
        )


@dataclass(frozen=True, slots=True)
class Aligner:
    """Aligns completions. A pure function of ids, so that a resumed run aligns as before.

    Args:
        student, teacher: Their tokenizers.
        end, teacher_end: The tokens with which they end a turn, each other's counterpart. No other control token is trained on.
        eos: All ids that end a completion.
        limit: Tokens that the teacher can read, prompt included; None for any number.
    """

    student: TokenBytes
    teacher: TokenBytes
    end: int
    teacher_end: int
    eos: frozenset[int]
    limit: int | None = None

    def align(self, completion: Sequence[int], is_cut_off: bool, prompt: int = 0) -> Alignment:
        """Return the alignment of a completion.

        Args:
            is_cut_off: Whether the completion reached the limit of new tokens.
            prompt: Tokens of the teacher's prompt.
        """
        stop = next((place for place, token in enumerate(completion) if self.is_control(token)), len(completion))
        teacher_ids, spans = self.align_text(completion[:stop], is_cut_off and stop == len(completion))
        covered = spans[-1].stop if spans else 0
        if covered == stop < len(completion) and completion[stop] == self.end:
            teacher_ids, covered = (*teacher_ids, self.teacher_end), stop + 1
            spans.append(Span(stop, covered, len(teacher_ids) - 1, len(teacher_ids)))
        if covered < len(completion):
            is_text = covered < stop
            why = Unscored.unmapped if not is_text else Unscored.illegible if stop < len(completion) else Unscored.unsettled
            spans.append(Span(covered, len(completion), len(teacher_ids), len(teacher_ids), why))
        if self.limit is not None:
            room = self.limit - prompt
            spans = [replace(span, unscored=Unscored.unmapped) if span.teacher_stop > room else span for span in spans]
        return Alignment(teacher_ids, tuple(spans))

    def is_control(self, token: int) -> bool:
        return self.student.piece(token) is None or token in self.eos or token == self.end

    def align_text(self, ids: Sequence[int], is_cut_off: bool) -> tuple[tuple[int, ...], list[Span]]:
        """Return the teacher's ids of tokens that are all text, and the spans up to the last boundary that both have."""
        pieces = [self.student.piece(token) or b"" for token in ids]
        raw = b"".join(pieces)
        text, places, bad = read_bytes(raw)
        theirs, canonical = self.teacher.encode(text), self.student.encode(text)
        # The number of tokens before each boundary, by its byte.
        their_count = {places[end]: count for count, end in enumerate(theirs.ends, 1) if end != NO_BOUNDARY}
        own_count = {0: 0} | {places[end]: count for count, end in enumerate(canonical.ends, 1) if end != NO_BOUNDARY}
        settled = self.settled_bytes(pieces, theirs, places) if is_cut_off else len(raw)
        spans: list[Span] = []
        begin = start = teacher_start = end = 0
        for stop, piece in enumerate(pieces, 1):
            end += len(piece)
            teacher_stop = their_count.get(end, 0)
            if teacher_stop <= teacher_start or (stop < len(pieces) and not pieces[stop]):
                continue
            own = canonical.ids[own_count[begin] : own_count[end]] if begin in own_count and end in own_count else None
            changed = not theirs.exact and not self.teacher.says(theirs.ids[teacher_start:teacher_stop], raw[begin:end])
            unscored = None
            if changed or any(begin <= place < end for place in bad):
                unscored = Unscored.illegible
            elif own != tuple(ids[start:stop]):
                unscored = Unscored.not_canonical
            elif end > settled:
                unscored = Unscored.unsettled
            spans.append(Span(start, stop, teacher_start, teacher_stop, unscored))
            begin, start, teacher_start = end, stop, teacher_stop
        return theirs.ids, spans

    def settled_bytes(self, pieces: Sequence[bytes], theirs: Encoded, places: Sequence[int]) -> int:
        """Return up to which byte the teacher's tokens are the same without the last student token.

        What one token changed at the end of the text, the next one might change again: that ends where the teacher's tokens are the same
        without it, and before the last word, of which at most `LAST_WORD` bytes count, and the white space around it.
        """
        before = self.teacher.encode(read_bytes(b"".join(pieces[:-1]))[0]).ids
        pairs = enumerate(zip(before, theirs.ids[:-1], strict=False))
        same = next((place for place, (one, other) in pairs if one != other), min(len(before), max(0, len(theirs.ids) - 1)))
        while same and theirs.ends[same - 1] == NO_BOUNDARY:
            same -= 1
        words = b"".join(pieces).rstrip()
        last = len(words.split()[-1]) if words else 0
        before_last = words[: len(words) - min(last, LAST_WORD)].rstrip()
        return min(places[theirs.ends[same - 1]], len(before_last)) if same else 0


def read_bytes(raw: bytes) -> tuple[str, Sequence[int], Sequence[int]]:
    """Return bytes as text, without an unfinished character at the end; a byte that is not UTF-8 becomes U+FFFD.

    Returns:
        The text; for each place between two bytes of its UTF-8 the place in `raw`, NO_BOUNDARY within a U+FFFD; and the places of the bytes
        that were replaced.
    """
    text, used = codecs.utf_8_decode(raw, "surrogateescape", False)
    if BAD_BYTE.search(text) is None:
        return text, range(used + 1), ()
    places, bad = [0], []
    for character in text:
        at = places[-1]
        if BAD_BYTE.match(character):
            bad.append(at)
            places += [NO_BOUNDARY, NO_BOUNDARY, at + 1]
        else:
            places += range(at + 1, at + 1 + len(character.encode()))
    return BAD_BYTE.sub(REPLACEMENT, text), places, bad
