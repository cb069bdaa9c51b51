"""What a run learns from: objects that a caller passes, and the prompts of its datasets with what judges their answers."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.options import DataConfig, naming_dataset, naming_teacher
from opd.config.schema import Config
from opd.data.chat_template import CONTINUE, KWARGS
from opd.data.given import check_given
from opd.data.grading import RewardFunction
from opd.data.prompts import Encoder, Prompt, encode_rows, labelled
from opd.data.rewards import Grader, make_grader
from opd.data.rows import closing_answers
from opd.data.sources import Rows, check_rows, load_rows
from opd.errors import ConfigError, DataError
from opd.runs.reader import format_value

log = logging.getLogger(__name__)

Prompts = tuple[list[Prompt], list[Prompt]]  # to train and to evaluate on


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Objects that a caller passes instead of names: modules, a tokenizer, rows, or prompts to train and to evaluate on.

    Args:
        rewards: The functions that judge the rows.
    """

    student: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    train_rows: Rows | None = None
    eval_rows: Rows | None = None
    rewards: Sequence[RewardFunction] = ()
    prompts: Prompts | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rows of a dataset and their prompts, to train and to evaluate on."""

    rows: tuple[Rows, Rows]
    prompts: Prompts


def load_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, given: Given, teacher_tokenizer: PreTrainedTokenizerBase | None = None
) -> Prompts:
    """Return prompts to train and to evaluate on. Raises `DataError` where rewards are asked for and nothing can be judged.

    Args:
        teacher_tokenizer: Of a teacher with tokens of its own, for its view.
    """
    return given.prompts or join_datasets(config, load_datasets(config, tokenizer, given, teacher_tokenizer))


def load_datasets(
    config: Config, tokenizer: PreTrainedTokenizerBase, given: Given, teacher_tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Loaded]:
    """Return the rows and prompts of each dataset by its label, with the arguments of `load_prompts`."""
    if given.train_rows is not None and not given.eval_rows:
        log.warning("no eval_dataset was given: nothing is evaluated; pass eval_dataset=ROWS, such as a tenth of the training rows")
    if given.train_rows is not None and config.data.mix:
        raise ConfigError("data.mix: rows were passed, which are one dataset; leave one of them out")
    loaded = {}
    for label, part in config.parts.items():
        with naming_dataset(label), naming_teacher(config.teacher_of(label)):
            rows = load_rows(part.data) if given.train_rows is None else check_rows(given.train_rows, given.eval_rows or [], part.data)
            loaded[label] = Loaded(rows, encode_dataset(part, tokenizer, rows, label, teacher_tokenizer))
    return loaded


def encode_dataset(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Rows, Rows],
    label: str = "",
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prompts:
    """Return the prompts of a single dataset, without its label, which is for messages."""
    train_rows, eval_rows = rows
    if note := describe_closing(rows, config.data):
        log.warning(naming_dataset(label)(note))
    encoder = Encoder(tokenizer, config.data, config.teacher, teacher_tokenizer)
    train_prompts = encode_rows(train_rows, encoder, "training", label)
    if config.data.completion is not None:
        check_given(train_prompts, config, label)
    return train_prompts, encode_rows(eval_rows, encoder, "evaluation", label) if len(eval_rows) else []


def describe_closing(rows: tuple[Rows, Rows], data: DataConfig) -> str:
    """Return how many prompts of a dataset end with the assistant's answer, and what becomes of it; an empty text for none."""
    count, uses = sum(closing_answers(part, data) for part in rows), {"answer": data.answer, "completion": data.completion}
    used = " and ".join(f"the {option} (data.{option})" for option, column in uses.items() if column == data.prompt)
    what = f"which is cut off the prompt{f' and is {used}' if used else ''}; {KWARGS}.{CONTINUE}=true continues it"
    total = sum(map(len, rows))
    return f"data.prompt={data.prompt}: {count:,} of {total:,} chats end with a message of the assistant, {what}" if count else ""


def join_datasets(config: Config, loaded: Mapping[str, Loaded]) -> Prompts:
    """Return the prompts of all datasets, labelled. Raises `DataError` where rewards are asked for and nothing can be judged."""
    teachers = {label: config.teacher_of(label) for label in loaded}
    train_prompts, eval_prompts = (
        labelled(
            {label: dataset.prompts[which] for label, dataset in loaded.items()},
            {label: len(dataset.rows[which]) for label, dataset in loaded.items()},
            teachers,
        )
        for which in (0, 1)
    )
    if config.eval.reward is not None and eval_prompts and not any(map(can_judge, eval_prompts)):
        raise DataError(
            f"eval.reward={config.eval.reward}: no evaluation prompt has an answer (data.answer={format_value(config.data.answer)}, "
            f"data.answer_after={format_value(config.data.answer_after)}); name the column with the answers, or evaluate without rewards: "
            "eval=kl"
        )
    if config.ppo.reward_coef > 0 and not any(map(can_judge, train_prompts)):
        raise DataError(
            f"ppo.reward_coef={config.ppo.reward_coef}: no training prompt has an answer; name their column as data.answer=COLUMN"
        )
    return train_prompts, eval_prompts


def can_judge(prompt: Prompt) -> bool:
    return bool(prompt.answers) or prompt.get_reward is not None


def make_run_grader(config: Config, prompts: list[Prompt], stack: ExitStack) -> Grader | None:
    """Return the configured grader; None where every prompt judges itself or none is judged."""
    if config.eval.reward is None or not any(prompt.answers and prompt.get_reward is None for prompt in prompts):
        return None
    seconds, memory = config.eval.reward_seconds, config.eval.reward_memory
    return stack.enter_context(make_grader(config.eval.reward, seconds=seconds, memory_mib=memory))
