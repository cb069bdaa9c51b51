"""Prompts as token ids, rendered by the model's own chat template."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd.config.schema import DataConfig
from opd.data.sources import Row
from opd.errors import DataError
from opd.signals import time_limit

log = logging.getLogger(__name__)

TEMPLATE_SECONDS = 20.0  # for one row; transformers runs templates in a sandbox, but lets them run for ever

GetReward = Callable[[str], float | None]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that a completion is sampled for.

    sample_id: its row in the dataset, from which random numbers are derived. text: the prompt as a person reads it. answer: what is known
    to be right, or None. get_reward: judges a completion of this prompt in place of the configured reward. teacher_ids: the prompt as the
    teacher sees it, where it has a system message of its own.
    """

    sample_id: int
    ids: tuple[int, ...]
    text: str
    answer: str | None = None
    get_reward: GetReward | None = None
    teacher_ids: tuple[int, ...] | None = None

    def for_teacher(self) -> "Prompt":
        return replace(self, ids=self.seen_by_teacher)

    @property
    def seen_by_teacher(self) -> tuple[int, ...]:
        return self.ids if self.teacher_ids is None else self.teacher_ids


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, which: str, teacher_system: str | None = None
) -> list[Prompt]:
    """The prompts of all rows that fit into `data.max_prompt_tokens`; the others are counted in the log, never cut.

    Raises `DataError` where a prompt has no text or the chat template refuses it, and where no prompt is left.
    """
    longest = max(map(len, tokenizer.get_vocab())) * (config.max_prompt_tokens + 1)
    prompts = [encode_row(row, index, tokenizer, config, teacher_system, longest) for index, row in enumerate(rows)]
    kept = [prompt for prompt in prompts if len(prompt.ids) <= config.max_prompt_tokens]
    if len(kept) < len(prompts):
        log.warning(
            "%d of %d %s prompts are longer than data.max_prompt_tokens=%d and left out",
            len(prompts) - len(kept),
            len(prompts),
            which,
            config.max_prompt_tokens,
        )
    if not kept:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise DataError(
            f"data.max_prompt_tokens={config.max_prompt_tokens}: no {which} prompt is that short; the shortest has {shortest} tokens"
        )
    return kept


def encode_row(
    row: Row,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    teacher_system: str | None = None,
    longest: int | None = None,
) -> Prompt:
    """longest: characters beyond which a text has more tokens than are wanted, and is not read on."""
    messages = to_messages(row, index, config)
    try:
        with time_limit(TEMPLATE_SECONDS):
            ids = render(messages, tokenizer, config.chat_template_kwargs, longest)
            teacher_ids = None
            if teacher_system is not None:
                others = [message for message in messages if message["role"] != "system"]
                teacher_ids = tuple(
                    render([{"role": "system", "content": teacher_system}, *others], tokenizer, config.chat_template_kwargs)
                )
    except (TemplateError, OverflowError) as error:
        raise DataError(f"row {index}: the chat template refuses the messages: {error}") from None
    except (TimeoutError, MemoryError) as error:
        raise DataError(f"row {index}: the chat template or the tokenizer took too much: {error or 'no memory is left'}") from None
    if not ids:
        raise DataError(f"row {index}: data.prompt={config.prompt} gives a prompt of no tokens")
    answer = None if config.answer is None else extract_answer(row.get(config.answer), config.answer_after)
    return Prompt(index, tuple(ids), messages[-1]["content"], answer, row.get("get_reward"), teacher_ids)


def to_messages(row: Row, index: int, config: DataConfig) -> list[Message]:
    """The row's chat: its list of messages, or its text as the user's, after the system message if there is one."""
    prompt: Any = row.get(config.prompt)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt and all(is_message(message) for message in prompt):
        messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
    else:
        raise DataError(
            f"row {index}: data.prompt={config.prompt} holds {type(prompt).__name__}; it must be a text or a list of messages "
            '{"role": "user", "content": "…"}'
        )
    system = None if config.system is None else row.get(config.system)
    return messages if system is None else [{"role": "system", "content": str(system)}, *messages]


def is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], longest: int | None = None
) -> list[int]:
    """The ids of the chat up to where the assistant begins. A tokenizer without a chat template gets the bare texts, a line each."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(message["content"] for message in messages)[:longest])["input_ids"])
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **template_kwargs)
    return list(tokenizer(text[:longest], add_special_tokens=False)["input_ids"])


def extract_answer(value: Any, after: str | None) -> str | None:
    """The answer as text: all of it, or what follows the last `after`; None where there is none."""
    if value is None:
        return None
    text = str(value)
    if after is not None:
        _, mark, text = text.rpartition(after)
        if not mark:
            return None
    return text.strip() or None
