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

from opd.config.options import DataConfig, Source, TeacherConfig
from opd.data.sources import Row
from opd.data.views import fill
from opd.errors import ConfigError, DataError
from opd.runs.text import one_line
from opd.signals import time_limit

log = logging.getLogger(__name__)

MAX_TEXTS = 1000  # prompts that are searched for special tokens
KWARGS = "data.chat_template_kwargs"
VIEWS = {"teacher": "teacher.prompt", "contrast": "teacher.contrast"}
ANSWER = "the answer that opd looks for"
TEMPLATE_SECONDS = 20.0  # per row; transformers runs templates in a sandbox, but without a time limit

GetReward = Callable[[str], float | None]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class View:
    """A chat as one of the models reads it.

    Args:
        messages: The chat.
        kwargs: For the chat template.
        where: The place of the chat, for messages.
        option: What set `kwargs`, for messages.
        is_filled: Whether it was made from a template over the row's columns.
    """

    messages: Sequence[Message]
    kwargs: Mapping[str, Any]
    where: str
    option: str = KWARGS
    is_filled: bool = False

    def render(self, tokenizer: PreTrainedTokenizerBase, max_chars: int | None = None) -> tuple[str, list[int]]:
        """Return it as text and ids, as the function `render` does."""
        return render(self.messages, tokenizer, self.kwargs, self.where, max_chars, self.option)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate completions for.

    Attributes:
        sample_id: The row in the dataset; random numbers are derived from it.
        ids: The prompt as the student sees it.
        text: The last message, for people.
        answers: The accepted reference answers.
        get_reward: Grades a completion's text, instead of the configured reward.
        teacher_ids: The prompt as the teacher sees it, with `teacher.system`, `teacher.prompt` and `teacher.chat_template_kwargs`,
            or in its own tokens with `teacher.alignment=spans`.
        chats: The messages that the ids are made from, where the template writes the date into them: the ids are others on another day.
        lost: A part of the text and what its ids decode to, where that is not the same.
        contrast_ids: The teacher's second view, with `teacher.contrast`.
        given: Completions that may be taken instead of sampled ones, each with its end-of-sequence token.
        dataset: The label of its dataset in `data.mix`; empty without.
        teacher: The label in `teachers` of the one that scores it; empty for `teacher`.
    """

    sample_id: int
    ids: tuple[int, ...]
    text: str
    answers: tuple[str, ...] = ()
    get_reward: GetReward | None = None
    teacher_ids: tuple[int, ...] | None = None
    chats: tuple[Sequence[Message], ...] = ()
    lost: str = ""
    contrast_ids: tuple[int, ...] | None = None
    given: tuple[tuple[int, ...], ...] = ()
    dataset: str = ""
    teacher: str = ""

    def for_teacher(self) -> "Prompt":
        """Return the prompt to generate the teacher's completions with."""
        return replace(self, ids=self.seen_by_teacher)

    @property
    def seen_by_teacher(self) -> tuple[int, ...]:
        return self.ids if self.teacher_ids is None else self.teacher_ids

    @property
    def scored_views(self) -> tuple[tuple[int, ...], ...]:
        """The prompt in each view in which the teacher scores completions."""
        return (self.seen_by_teacher,) if self.contrast_ids is None else (self.seen_by_teacher, self.contrast_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest view."""
        return max(map(len, (self.ids, *self.scored_views)))


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    which: str,
    teacher: TeacherConfig | None = None,
    label: str = "",
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Prompt]:
    """Return the prompts of at most `data.max_prompt_tokens` tokens in every view; the log has the number of the others.

    Args:
        which: "training" or "evaluation", for messages. Only training prompts have given completions.
        teacher: What the teacher sees instead; None for what the student sees.
        label: The dataset's in `data.mix`, for messages.
        teacher_tokenizer: Renders the teacher's view, with its own chat template, where its tokens are others than the student's.

    Raises:
        DataError: A prompt has no text, a column of the teacher's view is missing, the chat template refuses a chat, no prompt is short
            enough, or `teacher.contrast` changes none.
    """
    # A longer text has more tokens than allowed and need not be tokenized to its end.
    max_chars = max(map(len, tokenizer.get_vocab())) * (config.max_prompt_tokens + 1)
    config = config if which == "training" else replace(config, completion=None)
    end = None if config.completion is None else completion_end(tokenizer, config.chat_template_kwargs)
    which = f"{label} {which}".strip()
    prompts = [encode_row(row, index, tokenizer, config, teacher, max_chars, end, teacher_tokenizer) for index, row in enumerate(rows)]
    prompts = drop_long(prompts, [len(prompt.ids) for prompt in prompts], config.max_prompt_tokens, f"{which} prompts are longer")
    longer = f"{which} prompts are longer in the teacher's view"
    prompts = drop_long(prompts, [prompt.longest for prompt in prompts], config.max_prompt_tokens, longer)
    if all(prompt.contrast_ids == prompt.seen_by_teacher for prompt in prompts):
        raise DataError(f"teacher.contrast: is the teacher's own view in all {which} rows, so that nothing is learned: set another text")
    return prompts


def drop_long(prompts: list[Prompt], lengths: Sequence[int], limit: int, what: str) -> list[Prompt]:
    """Return the prompts of at most `limit` tokens; the log has the number of the others. Raises `DataError` where none is left."""
    option = f"data.max_prompt_tokens={limit}"
    short = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    if not short:
        raise DataError(f"{option}: all {what}; the shortest has {min(lengths)} tokens")
    if len(short) < len(prompts):
        log.warning(f"{option}: {len(prompts) - len(short)} of {len(prompts)} {what} and were dropped")
    return short


def encode_row(
    row: Row,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    teacher: TeacherConfig | None,
    max_chars: int,
    end: int | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prompt:
    answers, views = extract_row_answers(row, index, config), views_of(row, index, config, teacher, teacher_tokenizer is not None)
    tokenizers = {name: teacher_tokenizer if name != "student" and teacher_tokenizer is not None else tokenizer for name in views}
    texts, ids = {}, {}
    for name, view in views.items():
        texts[name], encoded = view.render(tokenizers[name], max_chars)
        if len(texts[name]) > max_chars and len(encoded) <= config.max_prompt_tokens:  # the tokenizer drops characters
            texts[name], encoded = view.render(tokenizers[name])
        if not encoded:
            raise DataError(f"{view.where}: the prompt has no tokens")
        ids[name] = tuple(encoded)
    lost = (find_lost(texts[name], ids[name], tokenizers[name]) for name in views if len(ids[name]) <= config.max_prompt_tokens)
    is_dated = any("strftime_now" in (find_template(tokenizers[name], view.kwargs, view.option) or "") for name, view in views.items())
    messages = views["student"].messages
    given: tuple[tuple[int, ...], ...] = ()
    if config.completion is not None and end is not None and len(ids["student"]) <= config.max_prompt_tokens:
        completions = given_texts(row.get(config.completion), f"row {index}: data.completion={config.completion}")
        is_plain = find_template(tokenizer, config.chat_template_kwargs) is None
        given = tuple(encode_completion(text, texts["student"], ids["student"], tokenizer, is_plain, end) for text in completions)
    chats = (messages, *(view.messages for view in views.values() if view.is_filled))
    return Prompt(
        index,
        ids["student"],
        messages[-1]["content"] or "",
        answers,
        row.get("get_reward"),
        teacher_ids=ids.get("teacher"),
        contrast_ids=ids.get("contrast"),
        chats=chats if is_dated else (),
        lost=next(filter(None, lost), ""),
        given=given,
    )


def extract_row_answers(row: Row, index: int, config: DataConfig) -> tuple[str, ...]:
    answer = None if config.answer is None else row.get(config.answer)
    return extract_answers(answer, config.answer_after, f"row {index}: data.answer={config.answer}")


def views_of(row: Row, index: int, config: DataConfig, teacher: TeacherConfig | None, has_template: bool = False) -> dict[str, View]:
    """Return the row's chat as the "student" sees it and, where they are asked for, in the views "teacher" and "contrast".

    Args:
        has_template: Whether the teacher has a chat template of its own, so that its view is another even of the same messages.
    """
    messages, kwargs, where = to_messages(row, index, config), config.chat_template_kwargs, f"row {index}: data.prompt={config.prompt}"
    views = {"student": View(messages, kwargs, where)}
    if teacher is None:
        return views
    own = teacher.chat_template_kwargs
    kwargs = without_template(kwargs) if has_template else kwargs
    option = "teacher.chat_template_kwargs" if "chat_template" in own else KWARGS
    for name, is_used, template in (
        ("teacher", teacher.has_own_view or has_template, teacher.prompt),
        ("contrast", teacher.contrast is not None, teacher.contrast),
    ):
        if is_used:
            chat = messages if template is None else fill_chat(template, messages, row, index, config, VIEWS[name])
            chat = chat if teacher.system is None else with_system(chat, teacher.system)
            views[name] = View(chat, {**kwargs, **own}, f"{where} in the teacher's view", option, is_filled=template is not None)
    return views


def fill_chat(template: str, messages: Sequence[Message], row: Row, index: int, config: DataConfig, option: str) -> list[Message]:
    """Return the chat with the filled template in place of its last user message, or the chat in the column that is the whole template.

    `{prompt}` is that message and `{answer}` the first accepted answer, whatever other columns there are.

    Args:
        messages: The student's chat.
        option: What set the template, for messages.
    """
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    columns = {**row, "prompt": None if last is None else messages[last]["content"]}
    if config.answer is not None:
        columns["answer"] = next(iter(extract_row_answers(row, index, config)), None)
    content = fill(template, columns, option, index)
    if isinstance(content, list):
        return to_chat(content, config, f"{option}: row {index}")
    if last is None:
        remedy = "name a column with a list of messages as the whole template"
        raise DataError(f"{option}: row {index} has no message of the user to replace; {remedy}")
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def labelled(datasets: Mapping[str, Sequence[Prompt]], rows: Mapping[str, int], teachers: Mapping[str, str]) -> list[Prompt]:
    """Return the prompts of several datasets as one list, each with its label, and with a sample id that no other has.

    Args:
        datasets: Their prompts by label.
        rows: Their numbers of rows, those included that are no prompts.
        teachers: The label of each one's teacher.
    """
    prompts, start = [], 0
    for label, own in datasets.items():
        facts = {"dataset": label, "teacher": teachers[label]}
        prompts += [replace(prompt, sample_id=start + prompt.sample_id, **facts) for prompt in own]  # type: ignore[arg-type]
        start += rows[label]
    return prompts


def first_of_each(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """Return the first `count` prompts of each dataset; all of them for None."""
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        seen[prompt.dataset] += 1
        if count is None or seen[prompt.dataset] <= count:
            chosen.append(prompt)
    return chosen


def to_messages(row: Row, index: int, config: DataConfig) -> list[Message]:
    """Return the row's chat: its list of messages or its text as the user's message, with its system message, if it has one."""
    prompt: Any = row.get(config.prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = to_chat(prompt, config, f"row {index}: data.prompt={config.prompt}")
    system = None if config.system is None else row.get(config.system)
    if not isinstance(system, str | None):
        raise DataError(f"row {index}: data.system={config.system}: must be a text, not {type(system).__name__}")
    return messages if system is None else with_system(messages, system)


def to_chat(value: Any, config: DataConfig, where: str) -> list[Message]:
    """Return a list of messages. Raises `DataError`, with `where` first, for anything else."""
    if config.source is not Source.jsonl:
        value = without_nulls(value)
    try:
        messages = [to_message(message) for message in value]
    except (TypeError, KeyError, AttributeError):
        messages = []
    if not messages:
        raise DataError(
            f'{where}: must be a text or a list of messages {{"role": "user", "content": "…"}}, whose content is text, not '
            f"{type(value).__name__}"
        )
    return messages


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


def without_template(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data.chat_template_kwargs` for a teacher with a template of its own: the one that they name is the student's."""
    return {name: value for name, value in kwargs.items() if name != "chat_template"}


def find_template(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], option: str = KWARGS) -> str | None:
    """Return the chat template: the one that `kwargs`, set by the option, names or spells out, else the default; None for plain text."""
    stored = tokenizer.chat_template
    templates: dict[str, str | None] = stored if isinstance(stored, dict) else {"default": stored}
    name = str(kwargs.get("chat_template") or ("tool_use" if kwargs.get("tools") and "tool_use" in templates else "default"))
    if "{" in name:
        return name
    if name not in templates:
        raise ConfigError(
            f"{option}.chat_template={name}: the tokenizer has no chat template of this name; set it to {' or '.join(templates)}"
        )
    return templates[name]


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    where: str,
    max_chars: int | None = None,
    option: str = KWARGS,
) -> tuple[str, list[int]]:
    """Return a chat up to the start of the assistant's turn, as text and ids. If its last message is the assistant's, that stays open.

    Without a chat template the messages are lines of plain text, with the tokens that the tokenizer puts before a text.

    Args:
        where: The place of the chat, for messages.
        max_chars: How much of the text to tokenize.
        option: What set `kwargs`.

    Raises:
        ConfigError: There is no chat template of the configured name.
        DataError: The chat template or the tokenizer fails.
    """
    template = find_template(tokenizer, kwargs, option)
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


def render_closed(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Return the text of a chat whose last turn is closed and followed by no other; nothing where the template has no such text."""
    try:
        template = find_template(tokenizer, kwargs)
        return (
            str(tokenizer.apply_chat_template(list(messages), tokenize=False, **{**kwargs, "chat_template": template})) if template else ""
        )
    except Exception:  # noqa: BLE001 - a template is a program, which may fail in any way
        return ""


def tokenize_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text with what the tokenizer puts before texts, but once, and without what it may put behind: it is continued."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while added and added[-1]:
        added.pop()
    before = added.index(0) if added else 0
    begins_twice = ids[:before] == ids[before : 2 * before]
    return ids[before * begins_twice : len(added)]


def given_texts(value: Any, where: str) -> list[str]:
    """Return a given text, or those of a list, without null and empty ones. Raises `DataError`, with `where` first, for another value."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str | None) for text in texts):
        raise DataError(f"{where}: must be a text or a list of texts, not {type(value).__name__}; name another column")
    return [text for text in texts if text]


def encode_completion(
    text: str, prompt: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, is_plain: bool, end: int
) -> tuple[int, ...]:
    """Return a given text as the student would sample it: the ids that continue the prompt, and the one that ends a completion.

    Args:
        prompt, ids: The prompt up to the start of the assistant's turn.
        is_plain: Whether there is no chat template.
        end: What `completion_end` returned.
    """
    # Together with the prompt: some tokenizers put a space before a text on its own.
    whole = tokenize_plain(prompt + text, tokenizer) if is_plain else tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    continues = list(whole[: len(ids)]) == list(ids)  # else the last token of the prompt would be another one
    own = list(whole[len(ids) :] if continues else tokenizer(text, add_special_tokens=False)["input_ids"])
    return tuple(own if own[-1:] == [end] else [*own, end])


def completion_end(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> int:
    """Return the token that ends given completions: the special one with which the chat template ends a turn, else the tokenizer's."""
    end = turn_end(tokenizer, kwargs)
    is_special = end in {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return int(end if end is not None and is_special else tokenizer.eos_token_id)


def turn_end(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> int | None:
    """Return the first token that the chat template puts behind an answer; None where it puts nothing there, or there is no template."""
    text = render_closed([{"role": "user", "content": "1"}, {"role": "assistant", "content": ANSWER}], tokenizer, kwargs)
    rest = text.rpartition(ANSWER)[2].strip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest and ANSWER in text else []
    return ids[0] if ids else None


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
    if early := sum(not set(eos).isdisjoint(ids[:-1]) for prompt in prompts for ids in prompt.given):
        warnings.append(f"{early:,} given completions contain a token that ends a completion before their end (data.completion)")
    if ends := {ids[-1] for prompt in prompts for ids in prompt.given} - set(eos):
        name = tokenizer.convert_ids_to_tokens(min(ends))
        warnings.append(f"given completions (data.completion) end with {name!r}, which does not end a sampled completion")
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
