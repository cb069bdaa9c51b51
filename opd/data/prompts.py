"""Prompts as token ids, rendered with the model's own chat template."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from numbers import Number
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd.config.schema import DataConfig, Source
from opd.data.sources import Row
from opd.errors import ConfigError, DataError
from opd.runs.text import one_line
from opd.signals import time_limit

log = logging.getLogger(__name__)

MAX_TEXTS = 1000  # prompts that are searched for special tokens
ANSWER = "the answer that opd looks for"
TEMPLATE_SECONDS = 20.0  # per row; transformers runs templates in a sandbox, but without a time limit

GetReward = Callable[[str], float | None]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate completions for.

    Attributes:
        sample_id: The row in the dataset; random numbers are derived from it.
        ids: The prompt as the student sees it.
        text: The last message, for people.
        answers: The accepted reference answers.
        get_reward: Grades a completion's text, instead of the configured reward.
        teacher_ids: The prompt as the teacher sees it, with `teacher.system` or, for `teacher.alignment=spans`, in its own tokens.
        messages: The chat, where the template writes the date into it: the ids are others on another day.
        lost: A part of the text and what its ids decode to, where that is not the same.
    """

    sample_id: int
    ids: tuple[int, ...]
    text: str
    answers: tuple[str, ...] = ()
    get_reward: GetReward | None = None
    teacher_ids: tuple[int, ...] | None = None
    messages: Sequence[Message] | None = None
    lost: str = ""

    def for_teacher(self) -> "Prompt":
        """Return the prompt to generate the teacher's completions with."""
        return replace(self, ids=self.seen_by_teacher)

    @property
    def seen_by_teacher(self) -> tuple[int, ...]:
        return self.ids if self.teacher_ids is None else self.teacher_ids


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    which: str,
    teacher_system: str | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Prompt]:
    """Return the prompts of at most `data.max_prompt_tokens` tokens; the log has the number of the others.

    Args:
        which: "training" or "evaluation", for messages.
        teacher_system: A system message that only the teacher sees.
        teacher_tokenizer: Renders the teacher's prompts, with its own chat template, where its ids are others than the student's.

    Raises:
        DataError: A prompt has no text, the chat template refuses it, or no prompt is short enough.
    """
    # A longer text has more tokens than allowed and need not be tokenized to its end.
    max_chars = max(map(len, tokenizer.get_vocab())) * (config.max_prompt_tokens + 1)
    prompts = [encode_row(row, index, tokenizer, config, teacher_system, teacher_tokenizer, max_chars) for index, row in enumerate(rows)]
    short = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    limit = f"data.max_prompt_tokens={config.max_prompt_tokens}"
    if not short:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise DataError(f"{limit}: all {which} prompts are longer; the shortest has {shortest} tokens")
    if len(short) < len(prompts):
        log.warning(f"{limit}: {len(prompts) - len(short)} of {len(prompts)} {which} prompts are longer and were dropped")
    return short


def encode_row(
    row: Row,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    teacher_system: str | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    max_chars: int,
) -> Prompt:
    messages, kwargs = to_messages(row, index, config), config.chat_template_kwargs
    where = f"row {index}: data.prompt={config.prompt}"
    text, ids = render(messages, tokenizer, kwargs, where, max_chars)
    if len(text) > max_chars and len(ids) <= config.max_prompt_tokens:  # the tokenizer drops characters
        text, ids = render(messages, tokenizer, kwargs, where)
    if not ids:
        raise DataError(f"{where}: the prompt has no tokens")
    teacher_ids = None
    if teacher_system is not None or teacher_tokenizer is not None:
        theirs = messages if teacher_system is None else with_system(messages, teacher_system)
        option = "teacher.system" if teacher_tokenizer is None else "teacher.path"
        own_kwargs = kwargs if teacher_tokenizer is None else without_template(kwargs)
        teacher_ids = tuple(render(theirs, teacher_tokenizer or tokenizer, own_kwargs, f"{where} with {option}")[1])
    lost = find_lost(text, ids, tokenizer) if len(ids) <= config.max_prompt_tokens else ""
    dated = "strftime_now" in (find_template(tokenizer, kwargs) or "")
    answer = None if config.answer is None else row.get(config.answer)
    answers = extract_answers(answer, config.answer_after, f"row {index}: data.answer={config.answer}")
    text = messages[-1]["content"] or ""
    return Prompt(index, tuple(ids), text, answers, row.get("get_reward"), teacher_ids, messages if dated else None, lost)


def to_messages(row: Row, index: int, config: DataConfig) -> list[Message]:
    """Return the row's chat: its list of messages or its text as the user's message, with its system message, if it has one."""
    prompt: Any = row.get(config.prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif config.source is not Source.jsonl:
        prompt = without_nulls(prompt)
    try:
        messages = [to_message(message) for message in prompt]
    except (TypeError, KeyError, AttributeError):
        messages = []
    if not messages:
        raise DataError(
            f"row {index}: data.prompt={config.prompt}: must be a text or a list of messages "
            f'{{"role": "user", "content": "…"}}, whose content is text, not {type(prompt).__name__}'
        )
    system = None if config.system is None else row.get(config.system)
    if not isinstance(system, str | None):
        raise DataError(f"row {index}: data.system={config.system}: must be a text, not {type(system).__name__}")
    return messages if system is None else with_system(messages, system)


def to_message(message: Mapping[str, Any]) -> Message:
    """Return a message with all of its fields and its text in one piece. Raises `TypeError`, `KeyError` or `AttributeError` for another."""
    content = message.get("content")
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    calls = content is None and message["role"] == "assistant" and any(message[key] for key in message.keys() - {"role"})
    if not isinstance(message["role"], str) or not (calls or isinstance(content, str)):
        raise TypeError
    return {**message, "content": content}


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Return the chat with this system message in place of its own."""
    return [{"role": "system", "content": system}, *(message for message in messages if message["role"] != "system")]


def without_nulls(value: Any) -> Any:
    """Return lists and records without fields that are null: in a table each record has the fields of all of them."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def find_template(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str | None:
    """Return the chat template: the one that `data.chat_template_kwargs` names or spells out, else the default; None for plain text."""
    stored = tokenizer.chat_template
    templates: dict[str, str | None] = stored if isinstance(stored, dict) else {"default": stored}
    name = str(kwargs.get("chat_template") or ("tool_use" if kwargs.get("tools") and "tool_use" in templates else "default"))
    if "{" in name:
        return name
    if name not in templates:
        raise ConfigError(
            f"data.chat_template_kwargs.chat_template={name}: the tokenizer has no chat template of this name; set it to "
            f"{' or '.join(templates)}"
        )
    return templates[name]


def without_template(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data.chat_template_kwargs` for a teacher with a template of its own: the one that they name is the student's."""
    return {name: value for name, value in kwargs.items() if name != "chat_template"}


def closing_token(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> int | None:
    """Return the token with which the chat template ends an answer; None where it ends it with none."""
    text = render_closed([{"role": "user", "content": "1"}, {"role": "assistant", "content": ANSWER}], tokenizer, kwargs)
    rest = text.rpartition(ANSWER)[2].strip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest and ANSWER in text else []
    return ids[0] if ids else None


def render_closed(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Return the text of a chat whose last turn is closed and followed by no other; nothing where the template has no such text."""
    try:
        template = find_template(tokenizer, kwargs)
        return (
            str(tokenizer.apply_chat_template(list(messages), tokenize=False, **{**kwargs, "chat_template": template})) if template else ""
        )
    except Exception:  # noqa: BLE001 - a template is a program, which may fail in any way
        return ""


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], where: str, max_chars: int | None = None
) -> tuple[str, list[int]]:
    """Return a chat up to the start of the assistant's turn, as text and ids. If its last message is the assistant's, that stays open.

    Without a chat template the messages are lines of plain text, with the tokens that the tokenizer puts before a text.

    Args:
        where: The place of the chat, for messages.
        max_chars: How much of the text to tokenize.

    Raises:
        ConfigError: There is no chat template of the configured name.
        DataError: The chat template or the tokenizer fails.
    """
    template = find_template(tokenizer, kwargs)
    try:
        with time_limit(TEMPLATE_SECONDS):
            if template is None:
                text = "\n".join(message["content"] for message in messages)
                return text, tokenize_plain(text[:max_chars], tokenizer)
            is_open = messages[-1]["role"] == "assistant"
            options = {"tokenize": False, "add_generation_prompt": not is_open, "continue_final_message": is_open}
            text = str(tokenizer.apply_chat_template(list(messages), **options, **{**kwargs, "chat_template": template}))
            return text, list(tokenizer(text[:max_chars], add_special_tokens=False)["input_ids"])
    except (TimeoutError, MemoryError) as error:
        raise DataError(f"{where}: the chat template or the tokenizer did not finish: {error or 'out of memory'}") from None
    except Exception as error:  # noqa: BLE001 - a template is a program, which may fail in any way
        reason = one_line(str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}")[:300]
        raise DataError(f"{where}: the chat template refuses the messages: {reason}; change them, or the template") from None


def tokenize_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text with what the tokenizer puts before texts, but once, and without what it may put behind: it is continued."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while added and added[-1]:
        added.pop()
    before = added.index(0) if added else 0
    begins_twice = ids[:before] == ids[before : 2 * before]
    return ids[before * begins_twice : len(added)]


def find_lost(text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the tokenizer makes of a part of the text, if the ids do not decode to the text; else nothing."""
    decoded = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if decoded == text:
        return ""
    wanted, found = comparable(text, tokenizer), comparable(decoded, tokenizer)
    if found.endswith(wanted):  # plain text may have a token before it
        return ""
    same = len(commonprefix([wanted[::-1], found[::-1]]))  # noqa: RUF071 - of characters
    wanted, found = (each[: len(each) - same + 10][-40:] for each in (wanted, found))
    return f"{wanted!r} becomes {found!r}"


def text_warnings(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> list[str]:
    """Return what does not reach the student or its grader: text that the tokenizer loses, and special tokens and `eos` in texts."""
    warnings = []
    if lost := [prompt.lost for prompt in prompts if prompt.lost]:
        warnings.append(f"the student's tokenizer loses text of {len(lost):,} of {len(prompts):,} prompts: {lost[0]}")
    special = {*eos, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    texts = [text for prompt in prompts[:MAX_TEXTS] for text in (prompt.text, *prompt.answers) if text]
    found = Counter(token for text in texts for token in special.intersection(tokenizer(text, add_special_tokens=False)["input_ids"]))
    for token, count in found.most_common(1):
        means = "ends a completion" if token in eos else "is special and removed from completions before they are graded"
        name = f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})"
        warnings.append(f"{count:,} of {len(texts):,} messages and answers contain {name}, which {means}")
    return warnings


def comparable(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text without what tokenizers may change: the way to write an accent, and white space around their own tokens."""
    tokens = "|".join(re.escape(token) for token in tokenizer.get_added_vocab() if token in text)
    return re.sub(rf"\s*({tokens or '(?!)'})\s*", r"\1", unicodedata.normalize("NFC", text)).strip()


def extract_answers(value: Any, after: str | None, where: str) -> tuple[str, ...]:
    """Return the accepted answers: each text of a list, or the one text; of each what follows the last `after`, if that is in it.

    Raises `DataError`, with `where` first, for a value that is no text, number, date or list of them: its Python form is no answer.
    """
    texts = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(item, str | Number | date | time | timedelta | None):
            raise DataError(
                f"{where}: must be a text, a number or a list of them, not {type(item).__name__}{' in a list' * (item is not value)}; "
                "name another column, or set data.answer=null"
            )
        text = str(item).lower() if isinstance(item, bool) else str(item)  # JSON's true
        if item is not None and (after is None or after in text):
            texts.append(text if after is None else text.rpartition(after)[2].strip())
    return tuple(text for text in texts if text.strip())
