"""A model's chat template: chats as text and token ids, and the tokens that end a turn."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opd.config.options import DataConfig, TeacherConfig
from opd.errors import ConfigError, DataError
from opd.runs.text import one_line
from opd.signals import time_limit

KWARGS = "data.chat_template_kwargs"
CONTINUE = "continue_final_message"  # among them: whether an assistant's message at the end of a prompt is continued, not cut off
ANSWER = "the answer that opd looks for"
TEMPLATE_SECONDS = 20.0  # per row; transformers runs templates in a sandbox, but without a time limit

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """What renders chats: a tokenizer, and the arguments of its chat template.

    Args:
        kwargs: `chat_template` among them names or spells out another template than the tokenizer's default.
        option: What set them, for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    option: str = KWARGS

    def find(self) -> str | None:
        """Return the template itself; None for plain text. Raises `ConfigError` where the tokenizer has none of the configured name."""
        stored = self.tokenizer.chat_template
        templates: dict[str, str | None] = stored if isinstance(stored, dict) else {"default": stored}
        has_tools = self.kwargs.get("tools") and "tool_use" in templates
        name = str(self.kwargs.get("chat_template") or ("tool_use" if has_tools else "default"))
        if "{" in name:
            return name
        if name not in templates:
            remedy = f"the tokenizer has no chat template of this name; set it to {' or '.join(templates)}"
            raise ConfigError(f"{self.option}.chat_template={name}: {remedy}")
        return templates[name]

    def apply(self, template: str, messages: Sequence[Message], **options: Any) -> str:
        arguments = {name: value for name, value in self.kwargs.items() if name != CONTINUE} | {"chat_template": template}
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options, **arguments))

    def render(self, messages: Sequence[Message], where: str, max_chars: int | None = None) -> tuple[str, list[int]]:
        """Return a chat up to the start of the assistant's turn, as text and ids. If its last message is the assistant's, that stays open.

        Without a chat template the messages are lines of plain text, with the tokens that the tokenizer puts before a text.

        Args:
            where: The place of the chat, for messages.
            max_chars: How much of the text to tokenize.

        Raises:
            ConfigError: There is no chat template of the configured name.
            DataError: The chat template or the tokenizer fails.
        """
        template = self.find()
        try:
            with time_limit(TEMPLATE_SECONDS):
                if template is None:
                    text = "\n".join(message["content"] for message in messages)
                    return text, tokenize_plain(text[:max_chars], self.tokenizer)
                is_open = messages[-1]["role"] == "assistant"
                text = self.apply(template, messages, add_generation_prompt=not is_open, continue_final_message=is_open)
                return text, list(self.tokenizer(text[:max_chars], add_special_tokens=False)["input_ids"])
        except (TimeoutError, MemoryError) as error:
            raise DataError(f"{where}: the chat template or the tokenizer did not finish: {error or 'out of memory'}") from None
        except Exception as error:  # noqa: BLE001 - a template is a program, which may fail in any way
            reason = one_line(str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}")[:300]
            raise DataError(f"{where}: the chat template refuses the messages: {reason}; change them, or the template") from None

    def render_closed(self, messages: Sequence[Message]) -> str:
        """Return the text of a chat whose last turn is closed and followed by no other; nothing where the template has no such text."""
        try:
            template = self.find()
            return self.apply(template, messages) if template else ""
        except Exception:  # noqa: BLE001 - a template is a program, which may fail in any way
            return ""

    def turn_end(self) -> int | None:
        """Return the first token that the template puts behind an answer; None where it puts nothing there, or there is no template."""
        text = self.render_closed([{"role": "user", "content": "1"}, {"role": "assistant", "content": ANSWER}])
        rest = text.rpartition(ANSWER)[2].strip()
        ids = self.tokenizer(rest, add_special_tokens=False)["input_ids"] if rest and ANSWER in text else []
        return ids[0] if ids else None

    def completion_end(self) -> int:
        """Return the token that ends given completions: the special one with which the template ends a turn, else the tokenizer's."""
        end = self.turn_end()
        is_special = end in {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return int(end if end is not None and is_special else self.tokenizer.eos_token_id)

    def encode_completion(self, text: str, prompt: str, ids: Sequence[int], end: int) -> tuple[int, ...]:
        """Return a given text as the student would sample it: the ids that continue the prompt, and the one that ends a completion.

        Args:
            prompt, ids: The prompt up to the start of the assistant's turn.
            end: What `completion_end` returned.
        """
        # Together with the prompt: some tokenizers put a space before a text on its own.
        tokenizer, both = self.tokenizer, prompt + text
        whole = tokenize_plain(both, tokenizer) if self.find() is None else tokenizer(both, add_special_tokens=False)["input_ids"]
        continues = list(whole[: len(ids)]) == list(ids)  # else the last token of the prompt would be another one
        own = list(whole[len(ids) :] if continues else tokenizer(text, add_special_tokens=False)["input_ids"])
        return tuple(own if own[-1:] == [end] else [*own, end])


def teacher_template(
    data: DataConfig, teacher: TeacherConfig, student: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase | None
) -> ChatTemplate:
    """Return what renders the teacher's views. `own`: the teacher's tokenizer, where its tokens are others than the student's."""
    kwargs = data.chat_template_kwargs if own is None else without_template(data.chat_template_kwargs)
    option = "teacher.chat_template_kwargs" if "chat_template" in teacher.chat_template_kwargs else KWARGS
    return ChatTemplate(student if own is None else own, {**kwargs, **teacher.chat_template_kwargs}, option)


def without_template(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data.chat_template_kwargs` for a teacher with a template of its own: the one that they name is the student's."""
    return {name: value for name, value in kwargs.items() if name != "chat_template"}


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


def comparable(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text without what tokenizers may change: the way to write an accent, and white space around their own tokens."""
    tokens = "|".join(re.escape(token) for token in tokenizer.get_added_vocab() if token in text)
    return re.sub(rf"\s*({tokens or '(?!)'})\s*", r"\1", unicodedata.normalize("NFC", text)).strip()
