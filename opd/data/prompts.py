"""Prompts as token ids, rendered with the model's own chat template."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from numbers import Number
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd.config.schema import DataConfig
from opd.data.sources import Row
from opd.errors import DataError
from opd.signals import time_limit

log = logging.getLogger(__name__)

TEMPLATE_SECONDS = 20.0  # per row; transformers runs templates in a sandbox, but without a time limit

GetReward = Callable[[str], float | None]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate completions for.

    Attributes:
        sample_id: The row in the dataset; random numbers are derived from it.
        ids: The prompt as the student sees it.
        text: The last message, for people.
        answers: The accepted reference answers.
        get_reward: Grades a completion's text, instead of the configured reward.
        teacher_ids: The prompt as the teacher sees it, with `teacher.system`.
    """

    sample_id: int
    ids: tuple[int, ...]
    text: str
    answers: tuple[str, ...] = ()
    get_reward: GetReward | None = None
    teacher_ids: tuple[int, ...] | None = None

    def for_teacher(self) -> "Prompt":
        """Return the prompt to generate the teacher's completions with."""
        return replace(self, ids=self.seen_by_teacher)

    @property
    def seen_by_teacher(self) -> tuple[int, ...]:
        return self.ids if self.teacher_ids is None else self.teacher_ids


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, which: str, teacher_system: str | None = None
) -> list[Prompt]:
    """Return the prompts of at most `data.max_prompt_tokens` tokens; the log has the number of the others.

    Args:
        which: "training" or "evaluation", for messages.
        teacher_system: A system message that only the teacher sees.

    Raises:
        DataError: A prompt has no text, the chat template refuses it, or no prompt is short enough.
    """
    # A longer text has more tokens than allowed and need not be tokenized to its end.
    max_chars = max(map(len, tokenizer.get_vocab())) * (config.max_prompt_tokens + 1)
    prompts = [encode_row(row, index, tokenizer, config, teacher_system, max_chars) for index, row in enumerate(rows)]
    short = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    limit = f"data.max_prompt_tokens={config.max_prompt_tokens}"
    if not short:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise DataError(f"{limit}: all {which} prompts are longer; the shortest has {shortest} tokens")
    if len(short) < len(prompts):
        log.warning(f"{limit}: {len(prompts) - len(short)} of {len(prompts)} {which} prompts are longer and were dropped")
    return short


def encode_row(
    row: Row, index: int, tokenizer: PreTrainedTokenizerBase, config: DataConfig, teacher_system: str | None, max_chars: int
) -> Prompt:
    messages = to_messages(row, index, config)
    teacher_ids = None
    try:
        with time_limit(TEMPLATE_SECONDS):
            ids = render(messages, tokenizer, config.chat_template_kwargs, max_chars)
            if teacher_system is not None:
                system = {"role": "system", "content": teacher_system}
                teacher_messages = [system, *(message for message in messages if message["role"] != "system")]
                teacher_ids = tuple(render(teacher_messages, tokenizer, config.chat_template_kwargs))
    except (TemplateError, OverflowError) as error:
        raise DataError(f"row {index}: the chat template refuses the messages: {error}") from None
    except (TimeoutError, MemoryError) as error:
        raise DataError(f"row {index}: the chat template or the tokenizer did not finish: {error or 'out of memory'}") from None
    if not ids:
        raise DataError(f"row {index}: data.prompt={config.prompt}: the prompt has no tokens")
    answer = None if config.answer is None else row.get(config.answer)
    answers = extract_answers(answer, config.answer_after, f"row {index}: data.answer={config.answer}")
    return Prompt(index, tuple(ids), messages[-1]["content"], answers, row.get("get_reward"), teacher_ids)


def to_messages(row: Row, index: int, config: DataConfig) -> list[Message]:
    """Return the row's chat: its list of messages or its text as the user's message, after its system message, if it has one."""
    prompt: Any = row.get(config.prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        messages: list[Message] = [{"role": message["role"], "content": message["content"]} for message in prompt]
        well_formed = bool(messages) and all(isinstance(text, str) for message in messages for text in message.values())
    except (TypeError, KeyError):
        well_formed = False
    if not well_formed:
        raise DataError(
            f"row {index}: data.prompt={config.prompt}: must be a text or a list of messages "
            f'{{"role": "user", "content": "…"}}, not {type(prompt).__name__}'
        )
    system = None if config.system is None else row.get(config.system)
    if not isinstance(system, str | None):
        raise DataError(f"row {index}: data.system={config.system}: must be a text, not {type(system).__name__}")
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    try:
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"row {index}: data.prompt={config.prompt}: the text has half a surrogate pair at {error.start}: remove it"
        ) from None
    return messages


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], max_chars: int | None = None
) -> list[int]:
    """Return the ids of a chat up to the start of the assistant's turn. Without a chat template the messages are lines of plain text."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(message["content"] for message in messages)[:max_chars])["input_ids"])
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs)
    return list(tokenizer(text[:max_chars], add_special_tokens=False)["input_ids"])


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
