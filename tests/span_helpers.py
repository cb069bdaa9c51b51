"""Tokenizers of every kind, trained on the spot, and a toy whose sequences can all be enumerated."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.config.compose import PACKAGE
from opd.data.spans import Aligner, Alignment
from opd.data.token_bytes import TokenBytes, longer_tokens
from opd.objective import Longer, sum_over_spans
from opd.training.spans import Spans

SMOLLM2 = Path(os.environ.get("SMOLLM2", "models")) / "teacher"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<unk>", "<s>", "</s>"]
EXACT = ("gpt2", "prefix-space", "qwen", "llama2", "gemma", "bundled", "smollm2")  # their tokens are the bytes of the text
LOSSY = ("nfc", "unigram", "wordpiece")


def corpus() -> list[str]:
    """Return prose and code, and a little of other scripts."""
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, json)]
    texts.append("naïve café مرحبا بالعالم שלום עולם 日本語のテキスト 中文文本 한국어 Привет, мир! 🙂👍🏽 ½ é\n" * 5)
    texts.append("The quick brown fox jumps over 12,345.678 lazy dogs, doesn't it? value done key return First line one two\n" * 5)
    return [line for text in texts for line in text.splitlines(keepends=True)]


def byte_level(size: int, prefix_space: bool = False, regex: str | None = None, normalizer: object = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def sentencepiece(size: int, prepend: bool) -> Tokenizer:
    """As Llama 2, which puts a space before a text, and Gemma, which puts none: bytes stand for characters without a token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, max_token_length=12, show_progress=False)
    tokenizer.train_from_iterator([line for line in corpus() if line.isascii()], trainer)
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] in SPECIAL]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(stored))


def unigram(size: int) -> Tokenizer:
    """As T5: compatibility forms are replaced, and runs of spaces are joined."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def wordpiece(size: int, lowercase: bool = False) -> Tokenizer:
    """As BERT: white space is dropped."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ascii_letters = [chr(code) for code in range(0x21, 0x7F)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=ascii_letters, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MAKE = {
    "gpt2": lambda: fast(byte_level(600)),
    "prefix-space": lambda: fast(byte_level(450, prefix_space=True)),
    "qwen": lambda: fast(byte_level(900, regex=QWEN)),
    "llama2": lambda: fast(sentencepiece(600, prepend=True)),
    "gemma": lambda: fast(sentencepiece(800, prepend=False)),
    "bundled": lambda: AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student"),
    "smollm2": lambda: AutoTokenizer.from_pretrained(SMOLLM2),
    "nfc": lambda: fast(byte_level(700, regex=QWEN, normalizer=normalizers.NFC())),
    "unigram": lambda: fast(unigram(500)),
    "wordpiece": lambda: fast(wordpiece(600)),
    "lower case": lambda: fast(wordpiece(600, lowercase=True)),
}
make_tokenizer = cache(lambda name: MAKE[name]())


@cache
def token_bytes(name: str) -> TokenBytes:
    return TokenBytes(make_tokenizer(name), "model")


@cache
def make_aligner(student: str, teacher: str) -> Aligner:
    end, teacher_end = (make_tokenizer(name).eos_token_id for name in (student, teacher))
    return Aligner(token_bytes(student), token_bytes(teacher), end, teacher_end, frozenset({end}))


def available(names: Sequence[str]) -> list[str]:
    return [name for name in names if name != "smollm2" or SMOLLM2.is_dir()]


def small_tokenizer(*merges: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of padding, end, 14 letters and merges: with 7 of them as many ids as the tests' student."""
    tokens = ["<pad>", "</s>", *"abcdefghijklmn", *(merge.replace(" ", "") for merge in merges)]
    pairs = [tuple(merge.split()) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def small_spans() -> Spans:
    """Align the tests' student, whose every token is a word, with a teacher that has other words."""
    student = TokenBytes(small_tokenizer("a b", "c d", "ab cd", "e f", "g h", "k l", "m n"), "model")
    teacher = TokenBytes(small_tokenizer("b c", "d a", "e f", "f e", "bc d", "h i", "j k", "n a", "l m", "i i", "c c"), "teacher")
    pairs = ((student, teacher), (teacher, student))
    return Spans(Aligner(student, teacher, 1, 1, frozenset({1})), *(Longer.of(longer_tokens(*pair), len(pair[0].pieces)) for pair in pairs))


# The toy.

LONGEST = 4  # bytes of a string
END = 3  # the id of the end


def letters(merge: str) -> TokenBytes:
    """Return a byte-level tokenizer of the letters a and b, one merge and the end."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, merge: 2, "</s>": END}, [(merge[0], merge[1])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), "model")


class Law:
    """All sequences of a tokenizer up to `LONGEST` bytes, and next-token distributions as a table (prefixes, 4)."""

    def __init__(self, merge: str) -> None:
        self.tokens = letters(merge)
        self.prefixes = list(self.grow(()))
        self.place = {prefix: index for index, prefix in enumerate(self.prefixes)}
        self.complete = [(*prefix, END) for prefix in self.prefixes]
        rows = [(y, self.place[ids[:at]], ids[at]) for y, ids in enumerate(self.complete) for at in range(len(ids))]
        self.sequence, self.prefix, self.token = torch.tensor(rows).T  # of each step of each sequence
        self.possible = torch.tensor([[token == END or self.fits((*prefix, token)) for token in range(4)] for prefix in self.prefixes])

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens.pieces[token] or b"" for token in ids).decode()

    def fits(self, ids: Sequence[int]) -> bool:
        return len(self.text(ids)) <= LONGEST

    def grow(self, prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        yield prefix
        for token in range(END):
            if self.fits((*prefix, token)):
                yield from self.grow((*prefix, token))

    def logits_of(self, mass: dict[str, float]) -> Tensor:
        """Return logits that generate each string this often, and only in the tokens of its own tokenizer."""
        table = torch.full((len(self.prefixes), 4), 1e-300, dtype=torch.float64)
        for text, share in mass.items():
            ids = (*self.tokens.encode(text).ids, END)
            for at, token in enumerate(ids):
                table[self.place[ids[:at]], token] += share
        return table.log()

    def table(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.possible, -torch.inf).log_softmax(-1)

    def logp(self, logits: Tensor) -> Tensor:
        """Return the log-prob of each step."""
        return self.table(logits)[self.prefix, self.token]

    def total(self, values: Tensor) -> Tensor:
        """Return sums over the steps of each sequence."""
        return values.new_zeros(len(self.complete)).index_add(0, self.sequence, values)


def strings(prefix: str = "") -> Iterator[str]:
    yield prefix
    if len(prefix) < LONGEST:
        yield from strings(prefix + "a")
        yield from strings(prefix + "b")


class Toy:
    """A student that writes a, b, ab and a teacher that writes a, b and `merge`, both with random distributions, in float64.

    Args:
        agree: Let both write each string equally often, each in its own tokens.
    """

    def __init__(self, seed: int, merge: str = "ba", agree: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.student, self.teacher = Law("ab"), Law(merge)
        random = [torch.randn(len(law.prefixes), 4, generator=generator, dtype=torch.float64) for law in (self.student, self.teacher)]
        if agree:
            each = [*strings()]
            mass = dict(zip(each, torch.randn(len(each), generator=generator, dtype=torch.float64).softmax(0).tolist(), strict=True))
            random = [law.logits_of(mass) for law in (self.student, self.teacher)]
        self.logits, self.teacher_table = random[0], self.teacher.table(random[1])
        ours, theirs = self.student.tokens, self.teacher.tokens
        self.longer = [Longer.of(longer_tokens(*pair), 4) for pair in ((ours, theirs), (theirs, ours))]
        self.aligner = Aligner(self.student.tokens, self.teacher.tokens, END, END, frozenset({END}))

    @cached_property
    def alignments(self) -> list[Alignment]:
        return [self.aligner.align(ids, is_cut_off=False) for ids in self.student.complete]

    def teacher_logp(self, ids: Sequence[int], start: int, stop: int) -> float:
        return sum(float(self.teacher_table[self.teacher.place[tuple(ids[:at])], ids[at]]) for at in range(start, stop))

    def ahead(self, law: Law, table: Tensor, longer: Longer, ids: Sequence[int], at: int) -> Tensor:
        """Return the lookahead of one token of a sequence."""
        return longer.lookahead(table[law.place[tuple(ids[:at])]][None], torch.tensor([ids[at]]), 1.0)[0]

    def advantages(self, corrected: bool = False) -> tuple[Tensor, Tensor]:
        """Return each step's advantage as training computes it, and the number of tokens of its span.

        Args:
            corrected: With what the tokens say of the text behind them.
        """
        parts = []
        table = self.student.table(self.logits)
        logp = self.student.logp(self.logits).split([len(ids) for ids in self.student.complete])
        for ids, alignment, old_logp in zip(self.student.complete, self.alignments, logp, strict=True):
            teacher_logp, before = torch.zeros_like(old_logp), torch.zeros(())
            for span in alignment.spans:
                if span.unscored is not None:
                    before = torch.zeros(())
                    continue
                teacher_logp[span.stop - 1] = self.teacher_logp(alignment.teacher_ids, span.teacher_start, span.teacher_stop)
                if corrected:
                    ahead = self.ahead(self.teacher, self.teacher_table, self.longer[1], alignment.teacher_ids, span.teacher_stop - 1)
                    ahead = ahead - self.ahead(self.student, table, self.longer[0], ids, span.stop - 1)
                    teacher_logp[span.stop - 1] += ahead - before
                    before = ahead
            parts.append(sum_over_spans(teacher_logp - old_logp, torch.tensor(alignment.following)))
        advantage, size = zip(*parts, strict=True)
        return torch.cat(advantage), torch.cat(size)

    def expected_gradient(self, advantage: Tensor) -> Tensor:
        """Return the expectation of the sum over steps of advantage times the gradient of log pi, in the student's logits."""
        free = self.logits.clone().requires_grad_()
        logp = self.student.logp(free)
        probability = self.student.total(logp).exp().detach()[self.student.sequence]
        return torch.autograd.grad((probability * advantage * logp).sum(), free)[0]
