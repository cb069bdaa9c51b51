"""What a row of a dataset says: its chat, the accepted answers, given completions, and templates over its columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from numbers import Number
from typing import Any

from opd.config.options import DataConfig, Source
from opd.config.templates import PLACEHOLDER, columns_of
from opd.data.chat_template import CONTINUE, KWARGS, Message
from opd.data.sources import Row, Rows, is_text
from opd.errors import DataError


@dataclass(frozen=True, slots=True)
class DataRow:
    """A row, read as the options of the data say. Its methods raise `DataError` for what cannot be read, with the place first.

    Args:
        index: Its number in the dataset.
    """

    columns: Row
    index: int
    config: DataConfig

    def place(self, option: str) -> str:
        """Return where the option's column is, for messages."""
        return f"row {self.index}: data.{option}={getattr(self.config, option)}"

    def value(self, option: str) -> Any:
        """Return what is in the option's column, or its filled text; None without one.

        Of the answer and the completion in the column of the prompt it is the assistant's message at the end of the chat.
        """
        column = getattr(self.config, option)
        if column is not None and column not in self.columns and is_text(option, column):
            return fill(column, self.columns, f"data.{option}", self.index)
        value = None if column is None else self.columns.get(column)
        if option in ("answer", "completion") and column == self.config.prompt and not isinstance(value, str | None):
            return self.turns()[1]
        return value

    def turns(self) -> tuple[list[Message], str | None]:
        """Return the chat of the prompt, a list of messages or a text as the user's, and the assistant's text that was cut off its end."""
        prompt, where = self.value("prompt"), self.place("prompt")
        messages = self.to_chat([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, where)
        return self.cut(messages, where), messages[-1]["content"] if self.is_cut(messages) else None

    def is_cut(self, messages: Sequence[Message]) -> bool:
        """Return whether the chat ends with a message of the assistant that is not to be continued."""
        return messages[-1]["role"] == "assistant" and not self.config.chat_template_kwargs.get(CONTINUE)

    def cut(self, messages: list[Message], where: str) -> list[Message]:
        """Return the messages without those of the assistant at the end, unless they are to be continued."""
        rest = messages
        while rest and self.is_cut(rest):
            rest = rest[:-1]
        if not rest:
            remedy = f"add the user's message, or set {KWARGS}.{CONTINUE}=true to continue it"
            raise DataError(f"{where}: has only messages of the assistant, which are no part of a prompt: {remedy}")
        return rest

    def messages(self) -> list[Message]:
        """Return the chat of the prompt with the row's system message, if it has one."""
        messages, system = self.turns()[0], self.value("system")
        if not isinstance(system, str | None):
            raise DataError(f"{self.place('system')}: must be a text, not {type(system).__name__}")
        return messages if system is None else with_system(messages, system)

    def answers(self) -> tuple[str, ...]:
        return extract_answers(self.value("answer"), self.config.answer_after, self.place("answer"))

    def completions(self) -> list[str]:
        """Return the given text, or those of a list, without null and empty ones."""
        value = self.value("completion")
        texts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(text, str | None) for text in texts):
            place = self.place("completion")
            raise DataError(f"{place}: must be a text or a list of texts, not {type(value).__name__}; name another column")
        return [text for text in texts if text]

    def fill_chat(self, template: str, option: str) -> list[Message]:
        """Return the chat with the filled template in place of its last user message, or the chat in the column that is the whole template.

        `{prompt}` is that message and `{answer}` the first accepted answer, whatever other columns there are.

        Args:
            option: What set the template, for messages.
        """
        messages = self.messages()
        last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
        columns = {**self.columns, "prompt": None if last is None else messages[last]["content"]}
        if self.config.answer is not None:
            columns["answer"] = next(iter(self.answers()), None)
        content = fill(template, columns, option, self.index)
        if isinstance(content, list):
            where = f"{option}: row {self.index}"
            return self.cut(self.to_chat(content, where), where)
        if last is None:
            remedy = "name a column with a list of messages as the whole template"
            raise DataError(f"{option}: row {self.index} has no message of the user to replace; {remedy}")
        return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]

    def to_chat(self, value: Any, where: str) -> list[Message]:
        """Return a list of messages, each with all of its fields and its text in one piece."""
        try:
            messages = list(map(to_message, value if self.config.source is Source.jsonl else without_nulls(value)))
        except (TypeError, KeyError, AttributeError):
            messages = []
        if not messages:
            first = value[0] if isinstance(value, list) and value else value
            has_other_keys = isinstance(first, Mapping) and "role" not in first
            found = f"with the keys {', '.join(map(str, first))}" if has_other_keys else type(value).__name__
            raise DataError(
                f'{where}: must be a text or a list of messages {{"role": "user", "content": "…"}}, whose content is text, not {found}'
            )
        return messages


SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}  # `from`, and its role


def to_message(message: Mapping[str, Any]) -> Message:
    """Return the message, also of the keys `from` and `value`. Raises `TypeError`, `KeyError` or `AttributeError` where it is none."""
    if "role" not in message and {"from", "value"} <= message.keys():
        rest = {name: value for name, value in message.items() if name not in ("from", "value")}
        message = {"role": SHAREGPT[message["from"]], "content": message["value"], **rest}
    content = message.get("content")
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    calls = content is None and message["role"] == "assistant" and any(message[key] for key in message.keys() - {"role"})
    if not isinstance(message["role"], str) or not (calls or isinstance(content, str)):
        raise TypeError
    return {**message, "content": content}


def without_nulls(value: Any) -> Any:
    """Return lists and records without fields that are null: in a table each record has the fields of all of them."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Return the chat with this system message in place of its own."""
    return [{"role": "system", "content": system}, *(message for message in messages if message["role"] != "system")]


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


def closing_answers(rows: Rows, config: DataConfig) -> int:
    """Return how many prompts end with a message of the assistant, which is cut off."""
    own = (DataRow(row, index, config) for index, row in enumerate(rows))
    return sum(not isinstance(row.value("prompt"), str) and len(row.turns()[0]) < len(row.value("prompt")) for row in own)


# Templates: `data.prompt`, `data.system`, `teacher.prompt` and `teacher.contrast`.


LITERAL = {"{{": "{", "}}": "}", "{}": "{}"}


def fill(template: str, columns: Mapping[str, Any], option: str, row: int) -> Any:
    """Return the template with the columns' values for its placeholders: a text, or the list in the column of its only placeholder.

    Args:
        columns: The row's, by name.
        option, row: Where the template and the columns are from, for messages.

    Raises:
        DataError: A column does not exist, is null, or has no text.
    """
    only = PLACEHOLDER.fullmatch(template)
    if only is not None and only[1] and isinstance(columns.get(only[1]), list):
        return columns[only[1]]
    texts = {name: to_text(name, columns, option, row) for name in columns_of(template)}
    return PLACEHOLDER.sub(lambda found: texts[found[1]] if found[1] else LITERAL[found[0]], template)


def to_text(name: str, columns: Mapping[str, Any], option: str, row: int) -> str:
    if name not in columns:
        known = ", ".join(sorted(columns))
        raise DataError(f"{option}: row {row} has no column {name}; it has {known}: name one of them, or set {option}=null")
    value = columns[name]
    if value is None:
        raise DataError(f"{option}: row {row} has nothing in the column {name}; fill it in, or leave the row out")
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON
    if isinstance(value, str | Number | date | time | timedelta):
        return str(value)
    kind = type(value).__name__
    raise DataError(f"{option}: row {row} has a {kind} in the column {name}; name a text, or a list of messages as the whole template")
