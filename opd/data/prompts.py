"""Prompts as token ids: each row of a dataset as student and teacher read it, rendered with their chat templates."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config.options import DataConfig, TeacherConfig
from opd.data.chat_template import ChatTemplate, Message, find_lost, teacher_template
from opd.data.rows import DataRow, with_system
from opd.data.sources import Row
from opd.errors import DataError

log = logging.getLogger(__name__)

MAX_TEXTS = 1000  # prompts that are searched for special tokens
VIEWS = {"teacher": "teacher.prompt", "contrast": "teacher.contrast"}

GetReward = Callable[[str], float | None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate completions for.

    Attributes:
        sample_id: The row in the dataset; random numbers are derived from it.
        ids: The prompt as the student sees it.
        text: The last message, for people.
        answers: The accepted reference answers.
        get_reward: Grades a completion's text, instead of the configured reward.
        columns: The row's, by name, for rewards that ask for them.
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
    columns: Mapping[str, Any] = field(default_factory=dict)

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

    def to_grade(self, completion: str) -> list[dict[str, Any]]:
        """Return what a reward may ask for of this completion, for each accepted answer."""
        return [{**self.columns, "prompt": self.text, "completion": completion, "answer": answer} for answer in self.answers]

    @property
    def longest(self) -> int:
        """Tokens of the longest view."""
        return max(map(len, (self.ids, *self.scored_views)))


@dataclass(frozen=True, slots=True)
class View:
    """A chat as one of the models reads it.

    Args:
        messages: The chat.
        template: Renders it.
        where: The place of the chat, for messages.
        is_filled: Whether it was made from a template over the row's columns.
    """

    messages: Sequence[Message]
    template: ChatTemplate
    where: str
    is_filled: bool = False

    def render(self, max_chars: int | None = None) -> tuple[str, list[int]]:
        """Return it as text and ids, as `ChatTemplate.render` does."""
        return self.template.render(self.messages, self.where, max_chars)


@dataclass(frozen=True)
class Encoder:
    """Makes prompts of rows.

    Args:
        tokenizer: The student's.
        config: Of the dataset.
        teacher: What the teacher sees instead; None for what the student sees.
        teacher_tokenizer: Renders the teacher's view, with its own chat template, where its tokens are others than the student's.
    """

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    teacher: TeacherConfig | None = None
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.config.chat_template_kwargs)

    @cached_property
    def end(self) -> int | None:
        """The token that ends given completions; None without them."""
        return None if self.config.completion is None else self.template.completion_end()

    @cached_property
    def max_chars(self) -> int:
        """A longer text has more tokens than allowed and need not be tokenized to its end."""
        return max(map(len, self.tokenizer.get_vocab())) * (self.config.max_prompt_tokens + 1)

    def encode(self, row: DataRow) -> Prompt:
        answers, views, limit = row.answers(), self.views(row), self.config.max_prompt_tokens
        texts: dict[str, str] = {}
        ids: dict[str, tuple[int, ...]] = {}
        lost = ""
        for name, view in views.items():
            text, encoded = view.render(self.max_chars)
            if len(text) > self.max_chars and len(encoded) <= limit:  # the tokenizer drops characters
                text, encoded = view.render()
            if not encoded:
                raise DataError(f"{view.where}: the prompt has no tokens")
            texts[name], ids[name] = text, tuple(encoded)
            lost = lost or (find_lost(text, encoded, view.template.tokenizer) if len(encoded) <= limit else "")
        messages = views["student"].messages
        is_dated = any("strftime_now" in (view.template.find() or "") for view in views.values())
        given: tuple[tuple[int, ...], ...] = ()
        if (end := self.end) is not None and len(ids["student"]) <= limit:
            read = texts["student"], ids["student"]
            given = tuple(self.template.encode_completion(text, *read, end) for text in row.completions())
        return Prompt(
            row.index,
            ids["student"],
            messages[-1]["content"] or "",
            answers,
            row.columns.get("get_reward"),
            teacher_ids=ids.get("teacher"),
            contrast_ids=ids.get("contrast"),
            chats=(messages, *(view.messages for view in views.values() if view.is_filled)) if is_dated else (),
            lost=lost,
            given=given,
            columns={name: value for name, value in row.columns.items() if name != "get_reward"},
        )

    def views(self, row: DataRow) -> dict[str, View]:
        """Return the row's chat as the "student" sees it and, where they are asked for, in the views "teacher" and "contrast"."""
        messages, where, teacher = row.messages(), row.place("prompt"), self.teacher
        views = {"student": View(messages, self.template, where)}
        if teacher is None:
            return views
        template = teacher_template(self.config, teacher, self.tokenizer, self.teacher_tokenizer)
        prompts = {"teacher": teacher.prompt} if teacher.has_own_view or self.teacher_tokenizer is not None else {}
        for name, text in (prompts if teacher.contrast is None else {**prompts, "contrast": teacher.contrast}).items():
            chat = messages if text is None else row.fill_chat(text, VIEWS[name])
            chat = chat if teacher.system is None else with_system(chat, teacher.system)
            views[name] = View(chat, template, f"{where} in the teacher's view", is_filled=text is not None)
        return views


def encode_rows(rows: Sequence[Row], encoder: Encoder, which: str, label: str = "") -> list[Prompt]:
    """Return the prompts of at most `data.max_prompt_tokens` tokens in every view; the log has the number of the others.

    Args:
        which: "training" or "evaluation", for messages. Only training prompts have given completions and a contrast.
        label: The dataset's in `data.mix`, for messages.

    Raises:
        DataError: A prompt has no text, a column of the teacher's view is missing, the chat template refuses a chat, no prompt is short
            enough, or `teacher.contrast` changes none.
    """
    if which != "training":
        teacher = None if encoder.teacher is None else replace(encoder.teacher, contrast=None)
        encoder = replace(encoder, config=replace(encoder.config, completion=None), teacher=teacher)
    limit, which = encoder.config.max_prompt_tokens, f"{label} {which}".strip()
    prompts = [encoder.encode(DataRow(row, index, encoder.config)) for index, row in enumerate(rows)]
    prompts = drop_long(prompts, [len(prompt.ids) for prompt in prompts], limit, f"{which} prompts are longer")
    prompts = drop_long(prompts, [prompt.longest for prompt in prompts], limit, f"{which} prompts are longer in the teacher's view")
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


def labelled(datasets: Mapping[str, Sequence[Prompt]], rows: Mapping[str, int], teachers: Mapping[str, str]) -> list[Prompt]:
    """Return the prompts of several datasets as one list, each with its label, and with a sample id that no other has.

    Args:
        datasets: Their prompts by label.
        rows: Their numbers of rows, those included that are no prompts.
        teachers: The label of each one's teacher.
    """
    prompts, start = [], 0
    for label, own in datasets.items():
        prompts += [replace(prompt, sample_id=start + prompt.sample_id, dataset=label, teacher=teachers[label]) for prompt in own]
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
