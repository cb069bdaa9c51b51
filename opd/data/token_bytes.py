"""Which bytes of a text each token of a tokenizer covers, so that two tokenizers can be compared at the byte.

Byte-level BPE and SentencePiece say it exactly: the bytes of the tokens are those of the text. Others (WordPiece, a normalizer that
changes the text) only say which characters of the text each token was made from.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from opd.errors import ConfigError

NO_BOUNDARY = -1
ANCHORS = ("\n", "a\n", ".", "a.")  # texts that are put before another one, so that the tokenizer puts no space there
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
MAX_CHANGED = 0.01  # share of texts that the teacher's tokenizer may change
PROBES = (
    "The quick brown fox jumps over 12,345.678 lazy dogs, doesn't it?",
    "Let x = 3 + 4 * (5 - 6) / 7; then f(x) >= 0 [1] {2} <3> & 100 % ~ #4 @5 ^6 |7| \\8 $9 `ok` _",
    "def f(a, b):\n    if a:\n        return {'key': \"value\"}  # done\n",
    "First line.\n\nSecond line:\t- one\n\t- two",
)


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character stands for in byte-level BPE (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as ids, with the byte of the text at which each token ends, NO_BOUNDARY where there is none.

    Args:
        exact: Whether the bytes of the tokens are those of the text.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    exact: bool = True


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Args:
        tokenizer: Of the `tokenizers` library.
        role: "model" or "teacher", for messages.

    Attributes:
        pieces: The bytes of each id; None for control tokens and ids that are not in the vocabulary.
        is_exact: Whether texts are the concatenation of their tokens' bytes, but for what a normalizer changes.

    Raises:
        ConfigError: The tokenizer is a slow one, which does not say which bytes its tokens cover.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"teacher.alignment=spans: {role}.path has a slow tokenizer ({type(tokenizer).__name__}), which does not say which bytes "
                "its tokens cover; take a model with a tokenizer.json"
            )
        stored = tokenizer.backend_tokenizer.to_str()
        # A copy that reads control tokens in a text as plain text, and does not cut or pad.
        self.tokenizer = Tokenizer.from_str(stored)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        spec = json.loads(stored)
        added = {token["id"]: token["content"] for token in spec["added_tokens"]}
        control = {token["id"] for token in spec["added_tokens"] if token["special"]} | set(tokenizer.all_special_ids)
        kinds = {part["type"] for part in flatten(spec["decoder"], "decoders")}
        self.is_exact = bool(kinds & {"ByteLevel", "ByteFallback", "Metaspace"})
        space, prefix = find_space(spec["decoder"]), find_prefix(spec["decoder"])
        vocabulary = tokenizer.get_vocab()
        self.pieces: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index in added or index in control:
                self.pieces[index] = None if index in control else added[index].encode()
            elif "ByteLevel" in kinds:
                self.pieces[index] = from_byte_level(token)
            elif self.is_exact:
                self.pieces[index] = from_sentencepiece(token, space)
            else:
                self.pieces[index] = token.removeprefix(prefix).encode()

    def piece(self, index: int) -> bytes | None:
        return self.pieces[index] if index < len(self.pieces) else None

    def name(self, index: int) -> str:
        return str(self.tokenizer.id_to_token(index))

    def spelled(self, ids: Sequence[int]) -> bytes | None:
        """Return the bytes of some tokens, None with a control token among them."""
        pieces = [self.piece(index) for index in ids]
        return None if None in pieces else b"".join(pieces)  # type: ignore[arg-type]

    def says(self, ids: Sequence[int], wanted: bytes) -> bool:
        """Return whether the tokens say these bytes; up to white space where the tokenizer drops that."""
        said = self.spelled(ids)
        if said is None or self.is_exact:
            return said == wanted
        return b"".join(said.split()) == "".join(wanted.decode(errors="replace").split()).encode()

    def encode(self, text: str) -> Encoded:
        """Return the text as it would continue a prompt: nothing is put before it, and no control token is read from plain text."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self.is_exact:
            wanted = text.encode()
            if (found := self.by_bytes(ids, wanted)) is not None:
                return found
            for behind in self.behind_anchors(text):
                if (found := self.by_bytes(behind[0], wanted)) is not None:
                    return found
                if (self.spelled(ids[:1]) or b"").startswith(b" ") and not text.startswith(" "):
                    ids, offsets = behind
        return self.by_offsets(text, ids, offsets)

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return for each text the bytes at which tokens end."""
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False) if self.is_exact else []
        found = [self.by_bytes(encoding.ids, text.encode()) for encoding, text in zip(encodings, texts, strict=False)]
        return [(own or self.encode(text)).ends for own, text in zip_longest(found, texts)]

    def by_bytes(self, ids: Sequence[int], wanted: bytes) -> Encoded | None:
        pieces = [self.pieces[index] or b"" for index in ids]
        if b"".join(pieces) != wanted or None in map(self.pieces.__getitem__, ids):
            return None
        return Encoded(tuple(ids), tuple(accumulate(map(len, pieces))))

    def behind_anchors(self, text: str) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield ids and offsets of the text behind other ones, which are cut off again: some tokenizers put a space before a text."""
        for anchor in ANCHORS:
            encoding = self.tokenizer.encode(anchor + text, add_special_tokens=False)
            for start in range(1, min(len(encoding.ids), 8)):
                if (self.spelled(encoding.ids[:start]) or b"").strip(b" ") == anchor.encode():
                    shift = len(anchor)
                    yield encoding.ids[start:], [(max(0, begin - shift), max(0, end - shift)) for begin, end in encoding.offsets[start:]]

    def by_offsets(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
        """Return the ends of the characters that the tokens were made from.

        White space that a tokenizer drops belongs to the token behind it. Of several tokens made from one character only the last one ends
        anywhere, and so does no token that is none of the text, such as <unk>.
        """
        place = [0]
        for character in text:
            place.append(place[-1] + len(character.encode()))
        ends = [place[end] for _, end in offsets]
        for index, (start, end) in enumerate(offsets):
            overlaps = any(begin < end for begin, _ in offsets[index + 1 : index + 9])
            if start == end or overlaps or self.piece(ids[index]) is None:
                ends[index] = NO_BOUNDARY
        if ids:
            ends[-1] = place[-1]
        return Encoded(tuple(ids), tuple(ends), exact=False)

    def changes(self, text: str) -> bool:
        """Return whether the tokens do not say the text: a normalizer changes it, or it needs <unk>."""
        encoded = self.encode(text)
        return not encoded.exact and not self.says(encoded.ids, text.encode())


def longer_tokens(own: TokenBytes, other: TokenBytes) -> list[list[int]]:
    """Return for each id of `own` the longer tokens that begin with its bytes and that the other tokenizer cuts where they end.

    Control tokens have none, and tokens that are no text on their own are none.
    """
    by_bytes: dict[bytes, list[int]] = {}
    for index, piece in enumerate(own.pieces):
        if piece:
            by_bytes.setdefault(piece, []).append(index)
    texts = {}
    for piece in by_bytes:
        with suppress(UnicodeDecodeError):
            texts[piece] = piece.decode()
    found: list[list[int]] = [[] for _ in own.pieces]
    for piece, ends in zip(texts, other.encode_batch(list(texts.values())), strict=True):
        for cut in ends:
            for shorter in by_bytes.get(piece[:cut], []) if 0 < cut < len(piece) else ():
                found[shorter] += by_bytes[piece]
    return found


def check_student(student: TokenBytes) -> None:
    """Raise `ConfigError` for a tokenizer whose ids do not tell the bytes of a completion."""
    if not student.is_exact:
        raise ConfigError(
            "teacher.alignment=spans: the tokens of model.path do not keep the bytes of a text (WordPiece drops white space), so that a "
            "completion's text is not known from its ids; take a student with byte-level BPE or SentencePiece"
        )


def check_teacher(teacher: TokenBytes, texts: Sequence[str]) -> None:
    """Raise `ConfigError` for a tokenizer that changes more than `MAX_CHANGED` of the probe texts and of these."""
    probes = [*PROBES, *texts]
    changed = [text for text in probes if teacher.changes(text)]
    if len(changed) > MAX_CHANGED * len(probes):
        raise ConfigError(
            f"teacher.alignment=spans: the tokenizer of teacher.path changes {len(changed)} of {len(probes)} texts, such as "
            f"{changed[0][:40]!r} (another case or form of letters, or unknown characters): its log-probs would be of another text; take "
            "a teacher whose tokenizer keeps it"
        )


def flatten(part: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """Return a component of a tokenizer and all that it contains."""
    if part is None:
        return []
    return [part, *(inner for member in part.get(members, []) for inner in flatten(member, members))]


def find_space(decoder: dict[str, Any] | None) -> str:
    """Return the character that stands for a space."""
    for part in flatten(decoder, "decoders"):
        if part["type"] == "Metaspace":
            return str(part["replacement"])
        if part["type"] == "Replace" and part["content"] == " ":
            return str(part["pattern"].get("String", "▁"))
    return "▁"


def find_prefix(decoder: dict[str, Any] | None) -> str:
    """Return what marks a token that continues a word."""
    return next((str(part["prefix"]) for part in flatten(decoder, "decoders") if part["type"] == "WordPiece"), "")


def from_byte_level(token: str) -> bytes:
    """Return one byte for each character; a token of other characters is its own text."""
    try:
        return bytes(ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


def from_sentencepiece(token: str, space: str) -> bytes:
    fallback = BYTE_TOKEN.fullmatch(token)
    return bytes([int(fallback[1], 16)]) if fallback else token.replace(space, " ").encode()
