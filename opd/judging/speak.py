"""Student and teacher on texts of the user's: what they write, and what they think of each token.

Shapes: `T` tokens of the text.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape

import torch
from transformers import PreTrainedTokenizerBase

from opd import models
from opd.config.schema import Config
from opd.data.prompts import Message, Prompt, render
from opd.data.rollouts import FinishReason, Request, Rollout, collate
from opd.errors import DataError
from opd.forward import kept_hidden, output_head
from opd.judging import pair
from opd.judging.pair import Loaded
from opd.objective import TeacherStates
from opd.samplers import Decoding

STREAM = "sample"


@dataclass(frozen=True, slots=True)
class Pair:
    """Both models, and how many ids they share. teacher: None where it was not asked for."""

    config: Config
    student: Loaded
    teacher: Loaded | None
    vocabulary: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.student.tokenizer

    def both(self) -> dict[str, Loaded]:
        return {"student": self.student} if self.teacher is None else {"student": self.student, "teacher": self.teacher}


@dataclass(frozen=True, slots=True)
class Scored:
    """A text, token by token: its tokens as text, and the log-prob of each under both models, (T,).

    before: the first token of a text that answers nothing: no other stands before it, so it has no log-prob.
    """

    tokens: list[str]
    student: list[float]
    teacher: list[float]
    before: str = ""

    def to_dict(self) -> dict[str, object]:
        return {"tokens": self.tokens, "student_logp": self.student, "teacher_logp": self.teacher}


def load_pair(config: Config, with_teacher: bool = True) -> Pair:
    """Raises `ConfigError` where the models do not go together."""
    device = models.find_device(config.device)
    for role, model in {"model": config.model, **({"teacher": config.teacher} if with_teacher else {})}.items():
        models.locate(model, role)
    student = pair.load(config.model, "model", device)
    teacher = pair.load(config.teacher, "teacher", device) if with_teacher else None
    vocabulary = pair.shared(student, teacher) if teacher is not None else pair.shared(student, student)
    return Pair(config, student, teacher, vocabulary)


def write(both: Pair, text: str, samples: int = 1) -> dict[str, list[str]]:
    """Completions of the prompt by each model, `samples` of them, at the config's sampling settings."""
    sampling = both.config.sampling
    found: dict[str, list[str]] = {}
    for role, loaded in both.both().items():
        ids = prompt_ids(both, text, both.config.teacher.system if role == "teacher" else None)
        prompt = Prompt(0, tuple(ids), text)
        sampler = loaded.sampler(both.tokenizer.pad_token_id, both.vocabulary, both.config.seed)
        decoding = Decoding(sampling.temperature, sampling.max_new_tokens, sampling.top_p, sampling.top_k, sampling.batch_size)
        rollouts = sampler.sample([Request(prompt, 0, attempt) for attempt in range(samples)], decoding, STREAM)
        found[role] = [shown(both.tokenizer, rollout) for rollout in rollouts]
    return found


def prompt_ids(both: Pair, text: str, system: str | None = None) -> list[int]:
    """The text as the user's message, rendered as in training."""
    messages: list[Message] = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    ids = render(messages, both.tokenizer, both.config.data.chat_template_kwargs)
    if not ids:
        raise DataError("the prompt has no tokens; give a text")
    return ids


def shown(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    text = models.decode(tokenizer, rollout.completion, skip_special_tokens=True)
    return f"{text} […]" if rollout.truncated else text


@torch.no_grad()
def score(both: Pair, text: str, prompt: str | None = None) -> Scored:
    """Both models' log-probs of a text's tokens at temperature 1. prompt: a user's message that the text answers; else the text alone.

    Raises `DataError` for a text of less than two tokens without a prompt.
    """
    assert both.teacher is not None
    ids = list(both.tokenizer(text, add_special_tokens=prompt is None)["input_ids"])
    begin = [] if prompt is None else prompt_ids(both, prompt)
    ids = begin + ids
    kept = len(begin) or 1
    if len(ids) <= kept:
        raise DataError("the text has no token that another one stands before; give a longer one")
    for role, loaded in both.both().items():
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            raise DataError(f"the text has {len(ids):,} tokens, the {role} takes {limit:,}; give a shorter one")
    prefix = Prompt(0, tuple(ids[:kept]), "")
    rollout = Rollout(Request(prefix), tuple(ids[kept:]), torch.zeros(len(ids) - kept), FinishReason.stop)
    logp = {role: token_logp(loaded, rollout, both.vocabulary) for role, loaded in both.both().items()}
    tokens = [models.decode(both.tokenizer, [token]) for token in rollout.completion]
    before = models.decode(both.tokenizer, ids[:kept]) if prompt is None else ""
    return Scored(tokens, logp["student"], logp["teacher"], before)


def token_logp(loaded: Loaded, rollout: Rollout, vocabulary: int) -> list[float]:
    batch = collate([rollout], [0], 0).to(loaded.model.device)
    with loaded.precision():
        states = TeacherStates(kept_hidden(loaded.model.base_model, batch.inputs), output_head(loaded.model, vocabulary))
        found: list[float] = states.token_logp(batch.target_N, 1.0).tolist()
    return found


def read_prompts(texts: Sequence[str], file: str | None, ask: Callable[[], str]) -> Sequence[str]:
    """The prompts of the command line and those of a file, a line each; where there are none, `ask` until it ends."""
    prompts = list(texts)
    if file is not None:
        prompts += [line for line in read_text(file).splitlines() if line.strip()]
    if prompts or file is not None:
        return prompts
    asked = []
    with suppress(EOFError):
        while line := ask():
            asked.append(line)
    return asked


def read_text(file: str) -> str:
    """Raises `DataError` where a file is no text."""
    try:
        with open(file, encoding="utf-8") as stream:  # noqa: PTH123 - "/dev/stdin" too
            return stream.read()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text in UTF-8") from None


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:16px/1.7 ui-monospace,monospace;max-width:60em;margin:2em auto;padding:0 1em}}
p.text{{white-space:pre-wrap;overflow-wrap:anywhere}}span[title]{{border-radius:3px;unicode-bidi:isolate}}</style></head>
<body><h1>{title}</h1><p>{legend}</p><p class="text">{tokens}</p></body></html>
"""
STRONG = 3.0  # nats of disagreement from which the colour is full


def page(scored: Scored, title: str) -> str:
    """A self-contained HTML page: tokens blue where the teacher finds them likelier, orange where less; both probabilities on hover."""
    tokens = "".join(
        f'<span title="{escape(f"student {ours:.3f} teacher {theirs:.3f} difference {theirs - ours:+.3f} nats")}" '
        f'style="background:{colour(theirs - ours)}">{escape(visible(token))}</span>'
        for token, ours, theirs in zip(scored.tokens, scored.student, scored.teacher, strict=True)
    )
    legend = "Blue: the teacher finds the token likelier than the student does; orange: less likely. Hover for log-probabilities in nats."
    return PAGE.format(title=escape(title), legend=legend, tokens=escape(visible(scored.before)) + tokens)


def colour(difference: float) -> str:
    red, green, blue = (64, 132, 244) if difference > 0 else (244, 140, 32)
    return f"rgba({red},{green},{blue},{min(abs(difference) / STRONG, 1) * 0.7:.2f})"


def visible(text: str) -> str:
    """Without characters that do something to what stands around them: controls are shown as their pictures, marks of direction by name."""
    return "".join(
        chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else f"⟨U+{ord(char):04X}⟩" if is_hidden(char) else char
        for char in text
    )


def is_hidden(char: str) -> bool:
    code = ord(char)
    return 0x7F <= code <= 0x9F or 0x200B <= code <= 0x200F or 0x2028 <= code <= 0x202E or 0x2060 <= code <= 0x206F or code == 0xFEFF
