"""The process that untrusted rewards run in: `python -m opd.data.grading DESCRIPTOR NAME TIME_LIMIT MEMORY_LIMIT_MB`.

Started by `opd.data.rewards`, which describes the messages. It imports the reward, reports that it is ready, and answers requests until the
parent closes the connection. An alarm that needs no Python code to run ends a reward that hangs after the parent was killed.
"""

import asyncio
import difflib
import importlib
import inspect
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from opd import signals
from opd.errors import ConfigError
from opd.runs.text import one_line

# Takes what its parameters name (`Reward`), and returns a finite number, or None for what cannot be graded.
RewardFunction = Callable[..., Any]
Item = Mapping[str, Any]  # of one answer: `completion`, `answer`, `prompt`, and the columns of its row

MARK = "__opd_reward__"  # the attribute that `@opd.reward` sets
START_LIMIT = 60.0  # seconds for the import of a reward; a large library on a cold disk is slow
MEMORY_EXIT = 3  # the exit code when an answer hit the memory limit
GRACE = 1.0  # seconds between the parent's limit and the child's own alarm
ERROR_LENGTH = 300  # characters
SHOWN_LENGTH = 60  # characters of a text in an error
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
AT_ONCE = 32  # answers that an asynchronous reward judges at a time

# What math-verify looks for before it parses a text as LaTeX.
DELIMITED = re.compile(r"\\boxed|\\\(|\\\[|(?<!\\)\$.*(?<!\\)\$", re.DOTALL)


def is_reward(value: object) -> bool:
    """Return whether `value` is marked with `@opd.reward`."""
    return getattr(value, MARK, False) is True


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error))}"[:ERROR_LENGTH]


def load_math() -> RewardFunction:
    """Return the reward `math`: 1.0 where math-verify finds the completion equal to the answer, None where it cannot parse the answer.

    https://github.com/huggingface/Math-Verify. Raises `ConfigError` if it is not installed.
    """
    try:
        math_verify = importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(f"reward `math` needs math-verify ({describe(error)}): pip install 'opd[math]'") from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off

    def math(completion: str, answer: str) -> float | None:
        try:
            # An answer without delimiters is all mathematics; without them math-verify would only see the 3 in `2\sqrt{3}`.
            gold = math_verify.parse(answer if DELIMITED.search(answer) else f"${answer}$", parsing_timeout=None)
            if not gold:
                return None
            return float(math_verify.verify(gold, math_verify.parse(completion, parsing_timeout=None), timeout_seconds=None))
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - a completion that makes math-verify fail is wrong
            return 0.0

    return math


def load_user(name: str) -> RewardFunction:
    """Return the function `module:function` without calling it. Raises `ConfigError` if it does not exist or is not marked.

    The module itself is looked for in the working folder first. What it imports is looked for there last: a random.py of the user is not
    Python's `random`.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    os.environ.pop("PYTHONSAFEPATH", None)  # programs that the reward starts are found as usual
    top = module_name.partition(".")[0]
    spec = PathFinder.find_spec(top, [here])
    try:
        if spec is not None and spec.loader is not None:
            sys.modules[top] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[top])
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - a module may also call sys.exit
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            remedy = "run opd from its folder, or install it (without `.py` in the name)"
            raise ConfigError(f"reward `{name}`: there is no module `{module_name}`; {remedy}") from None
        raise ConfigError(f"reward `{name}`: its module failed at import: {describe(error)}") from None
    if not hasattr(module, function_name):
        close = difflib.get_close_matches(function_name, vars(module), n=1)
        remedy = f"did you mean `{module_name}:{close[0]}`?" if close else "check the name after the colon"
        raise ConfigError(f"reward `{name}`: module `{module_name}` has no `{function_name}`; {remedy}")
    function: RewardFunction = getattr(module, function_name)
    if not is_reward(function):
        raise ConfigError(f"reward `{name}` is not marked as a reward and was not called; put `@opd.reward` on the function")
    return function


@dataclass(frozen=True)
class Reward:
    """A user's function and what it asks for, by the names of its parameters.

    `completion`, `answer`, `prompt` and the names of columns get those of one answer; `completions` makes it a function of many answers,
    whose parameters all get lists (`prompts` and `answers`, or the names of columns) and which returns a list. In a function without either
    of the two, parameters with other names get the completion and the answer, in this order. `async` functions judge several at a time.
    """

    name: str
    function: RewardFunction

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def takes_lists(self) -> bool:
        return "completions" in self.parameters

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def call(self, item: Item) -> Any:
        """Call the function for one answer, or for the lists of many."""
        kinds = {one.kind for one in self.parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return self.function(item["completion"], item["answer"])
        named = {name: item[name] for name in (item if inspect.Parameter.VAR_KEYWORD in kinds else self.parameters) if name in item}
        missing = [name for name, one in self.parameters.items() if name not in named and one.default is one.empty and one.kind in NAMED]
        if not {"completion", "completions"} & {*self.parameters}:
            named |= dict(zip(missing, [item[name] for name in ("completion", "answer") if name not in named], strict=False))
            missing = [name for name in missing if name not in named]
        if missing:
            taken, there = ", ".join(missing), ", ".join(sorted(item))
            raise ConfigError(f"reward `{self.name}` takes {taken}, but a row has only {there}: name these, or give {taken} a default")
        return self.function(**named)

    def grade(self, items: Sequence[Item], seconds: float) -> dict[str, Any]:
        """Return the reply for these answers. Raises `MemoryError` at the memory limit.

        Args:
            seconds: The limit of an asynchronous call. Others are ended from outside.
        """
        try:
            values = self.judge(items, seconds)
            late = [value is TimeoutError for value in values]
            rewards = [None if is_late else self.as_reward(value) for value, is_late in zip(values, late, strict=True)]
            return {"rewards": rewards, "late": sum(late)}
        except MemoryError:
            raise
        except ConfigError as error:
            return {"error": str(error)}
        except BaseException as error:  # noqa: BLE001 - a reward may also call sys.exit
            texts = "" if len(items) > 1 else f"; completion {shown(items[0]['completion'])}, answer {shown(items[0]['answer'])}"
            return {"error": f"reward `{self.name}` failed on an answer: {self.place(error)}{describe(error)}{texts}"}

    def judge(self, items: Sequence[Item], seconds: float | None = None) -> list[Any]:
        """Return what the function returns for each answer; `TimeoutError` itself for an asynchronous call over the limit."""
        return asyncio.run(self.gather(items, seconds)) if self.is_async else self.values(items)

    def values(self, items: Sequence[Item]) -> list[Any]:
        return self.as_many(self.call(as_lists(items)), items) if self.takes_lists else list(map(self.call, items))

    async def gather(self, items: Sequence[Item], seconds: float | None) -> list[Any]:
        if self.takes_lists:
            return self.as_many(await self.call(as_lists(items)), items)
        free = asyncio.Semaphore(AT_ONCE)

        async def limited(item: Item) -> Any:
            async with free:
                try:
                    return await asyncio.wait_for(self.call(item), seconds)
                except TimeoutError:
                    return TimeoutError

        return list(await asyncio.gather(*map(limited, items)))

    def as_many(self, returned: Any, items: Sequence[Item]) -> list[Any]:
        values = list(returned)
        if len(values) != len(items):
            raise ConfigError(f"reward `{self.name}` failed: it returned {len(values)} rewards for {len(items)} completions")
        return values

    def as_reward(self, value: object) -> float | None:
        """Return a reward as a float, or None. Raises `ConfigError` for anything else."""
        # The comparison is false for NaN, infinity, and an integer that is too large for a float.
        if value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max):
            return None if value is None else float(value)
        found = str(value) if isinstance(value, float) else f"a value of type {type(value).__name__}"
        raise ConfigError(f"reward `{self.name}` failed on an answer: it returned {found}, not a finite number or None")

    def place(self, error: BaseException) -> str:
        """Return where in the function's own file the error is from, as the start of a message."""
        own = inspect.getsourcefile(inspect.unwrap(self.function))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        return f"{Path(own).name}:{lines[-1]}: " if own and lines else ""


def as_lists(items: Sequence[Item]) -> dict[str, list[Any]]:
    """Return answers as lists by name, also by the plural of what every answer has. A row without a column has None there."""
    names = dict.fromkeys(name for item in items for name in item)
    lists = {name: [item.get(name) for item in items] for name in names}
    return lists | {f"{name}s": lists[name] for name in ("completion", "answer", "prompt") if name in lists}


def shown(text: Any) -> str:
    text = one_line(str(text))
    return repr(text if len(text) <= SHOWN_LENGTH else text[:SHOWN_LENGTH] + "…")


def limit_memory(megabytes: int) -> None:
    """Allow this process `megabytes` MiB of address space more than it has now, since imports alone may reserve gigabytes. Linux only."""
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process when the block takes longer. With its default action the signal even ends a long C call."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve(connection: Connection, name: str, seconds: float, megabytes: int) -> None:
    """Load the reward and answer requests. Raises `EOFError` or `OSError` when the parent is gone, `MemoryError` at the limit."""

    def send(reply: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(reply).encode())

    try:
        with time_limit(START_LIMIT + GRACE):
            reward = Reward(name, load_math() if name == "math" else load_user(name))
    except ConfigError as error:
        send({"error": str(error)})
        return
    limit_memory(megabytes)
    send({"ready": True, "many": reward.takes_lists or reward.is_async})
    while True:
        items, limit = json.loads(connection.recv_bytes())
        with time_limit(limit + GRACE):
            reply = reward.grade(items, seconds)
        send(reply)


def main(descriptor: int, name: str, seconds: float, megabytes: int) -> NoReturn:
    signals.die_with_parent(signal.SIGKILL)
    os.set_inheritable(descriptor, False)  # not for the programs that a reward starts
    code = 0
    try:
        serve(Connection(descriptor), name, seconds, megabytes)
    except MemoryError:
        code = MEMORY_EXIT
    except (EOFError, OSError):
        pass
    os._exit(code)  # at once: threads that a reward has started would keep the process alive


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
