"""Datasets and reward functions that are passed as Python objects, as rows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd.data.grading import Item, Reward, RewardFunction
from opd.data.rewards import best
from opd.data.rows import extract_answers
from opd.errors import ConfigError, RewardError


def as_functions(reward_funcs: Any) -> list[RewardFunction]:
    """Return the reward functions; none for a name. Raises `ConfigError` for anything else."""
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs] * callable(reward_funcs)
    other = next((function for function in functions if not callable(function)), None)
    if other is not None or not (functions or isinstance(reward_funcs, str | None)):
        raise ConfigError(f"reward_funcs={reward_funcs!r}: must be a name, a function, or a list of functions")
    return functions


def as_rows(
    dataset: Iterable[Any], rewards: Sequence[RewardFunction] = (), named: Sequence[str] = (), argument: str = "train_dataset"
) -> list[Mapping[str, Any]]:
    """Return the items of a dataset as mappings, judged by the functions. Raises `ConfigError` for other items.

    Args:
        named: Attributes of objects that are columns too.
        argument: The dataset's name, for messages.
    """
    if isinstance(dataset, str | Path):
        of_file = f"datasets.load_dataset('json', data_files={str(dataset)!r})['train']"
        raise ConfigError(f"{argument}={str(dataset)!r}: must be rows, of a JSON file for example {of_file}")
    if not isinstance(dataset, Iterable):
        raise ConfigError(f"{argument}={dataset!r}: must be a list of rows, or another iterable of them")
    rows: list[Mapping[str, Any]] = []
    for index, item in enumerate(dataset):
        is_mapping = isinstance(item, Mapping)
        known = ("prompt", "answer", "get_reward", *named)
        row = dict(item) if is_mapping else {name: getattr(item, name) for name in known if hasattr(item, name)}
        if "prompt" not in row and not is_mapping:
            raise ConfigError(
                f"{argument}: row {index} is a {type(item).__name__}; rows are mappings with `prompt` and `answer`, or objects with these "
                "attributes"
            )
        if rewards and row.get("answer") is not None and row.get("get_reward") is None:
            answers = extract_answers(row["answer"], None, f"{argument}: row {index}: answer")
            row["get_reward"] = bind_answers(rewards, row, answers)
        rows.append(row)
    return rows


def bind_answers(functions: Sequence[RewardFunction], row: Mapping[str, Any], answers: tuple[str, ...]) -> Callable[[str], float | None]:
    """Return a function from a completion to the sum of the rewards, each the best over the answers; None where none can judge."""
    prompt = row.get("prompt")
    text = prompt if isinstance(prompt, str) or not prompt else prompt[-1]["content"]
    rewards = [Reward(name_of(function), function) for function in functions]

    def get_reward(completion: str) -> float | None:
        items = [{**row, "prompt": text, "completion": completion, "answer": answer} for answer in answers]
        values = [best([as_number(value, reward.name) for value in judge(reward, items)]) for reward in rewards]
        return sum(known) if (known := [value for value in values if value is not None]) else None

    get_reward.__name__ = " + ".join(reward.name for reward in rewards)
    return get_reward


def name_of(function: RewardFunction) -> str:
    """Return a function's name; of an object that can be called, its class."""
    return str(getattr(function, "__name__", type(function).__name__))


def as_number(value: Any, name: str) -> float | None:
    """Return a reward as a float, or None. Raises `RewardError` for anything else. `name`: that of the function that returned it."""
    try:
        number = None if value is None else math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise RewardError(f"{name} returned {value!r}; it must return a finite number, or None for a completion that it cannot judge")
    return number


def judge(reward: Reward, items: Sequence[Item]) -> list[Any]:
    """Return the rewards of answers. Asynchronous functions run in a thread: a notebook has an event loop of its own in this one."""
    if not reward.is_async:
        return reward.judge(items)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(reward.judge, items).result()
