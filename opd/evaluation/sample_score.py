"""Student and teacher on texts of the user's: what they write, and what they think of each token.

Shapes: `T` tokens of the text.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from opd.config.schema import Config
from opd.data.prompts import Message, Prompt, render
from opd.data.rollouts import FinishReason, Request, Rollout, collate
from opd.errors import DataError
from opd.evaluation import pair
from opd.evaluation.pair import Loaded
from opd.models import load as models
from opd.models.policy import output_head, predicting_hidden
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
class Judged:
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
def score(both: Pair, text: str, prompt: str | None = None) -> Judged:
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
    return Judged(tokens, logp["student"], logp["teacher"], before)


def token_logp(loaded: Loaded, rollout: Rollout, vocabulary: int) -> list[float]:
    batch = collate([rollout], [0], 0).to(loaded.model.device)
    with loaded.precision():
        states = TeacherStates(predicting_hidden(loaded.model.base_model, batch.inputs), output_head(loaded.model, vocabulary))
        found: list[float] = states.token_logp(batch.ids_N, 1.0).tolist()
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
