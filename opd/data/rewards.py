r"""Judges a completion against the answer of its row: the built-in rewards, a user's own, and the process the untrusted ones run in.

`exact` and `number` are linear in the length of the text and run where they are called. `math` and a user's function may hang or eat
the memory of the machine, so they run in one child process (`opd.data.grading`) that is killed when an answer takes too long. A process and
not a thread: a thread that hangs cannot be stopped, and math-verify's own limit is an alarm signal, which works in the main thread only
and is not looked at before a long C call has returned.

The parent and the child speak JSON, one line each way:

    child   {"ready": true}            or  {"error": "why the reward cannot be used"}
    parent  [completion, answer]
    child   {"reward": number | null}  or  {"error": "how the reward failed"}
"""

import difflib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from types import TracebackType
from typing import Any, TypeVar

from opd.data.grading import MARK, MEMORY_EXIT, START_LIMIT
from opd.data.grading import RewardFunction as RewardFunction
from opd.errors import ConfigError, RewardError

F = TypeVar("F", bound=RewardFunction)

CHILD_FLAG = "OPD_GRADING_CHILD"  # set in the environment of the child

# A sign counts only where it cannot be a minus between two terms or a hyphen. An alternative fails within a few characters or takes all
# that it has read but the last group, so the search is linear in the text.
NUMBER = re.compile(
    r"(?P<minus>(?<![\w)])[-\u2212](?:\\?\$)?|\$[-\u2212])?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\w)\.[0-9]+)"
)


def reward(function: F) -> F:
    """Marks a function as a reward, so that `module:function` in a config may call it.

    The function takes `(completion, answer)` and returns a finite number, or None when the pair cannot be judged.

    Returns the function itself. Used without parentheses: `@opd.reward`.
    """
    setattr(function, MARK, True)
    return function


def exact(completion: str, answer: str) -> float:
    """Returns 1.0 when the two are equal but for white space around them, else 0.0."""
    return float(completion.strip() == answer.strip())


def last_number(text: str) -> Decimal | None:
    """Returns the last number in `text`, or None when there is none.

    Reads `1,234`, `-5`, `$18.00`, `-$3`, `.5`; a percent sign and a full stop after the number are left aside. The value is exact:
    0.1 is one tenth.
    """
    matches = deque(NUMBER.finditer(text), maxlen=1)
    if not matches:
        return None
    value = Decimal(matches[0]["digits"].replace(",", ""))
    return value.copy_negate() if matches[0]["minus"] else value


def number(completion: str, answer: str) -> float | None:
    """Returns 1.0 when the last number in the completion equals the last in the answer, else 0.0; None for an answer without one."""
    wanted = last_number(answer)
    if wanted is None:
        return None
    return float(last_number(completion) == wanted)


IN_PROCESS: dict[str, RewardFunction] = {"exact": exact, "number": number}
BUILT_IN = (*IN_PROCESS, "math")


class _Stopped(Exception):
    """An answer ran into the time or the memory limit."""


class _Child:
    """The parent's side of one grading process."""

    def __init__(self, name: str, time_limit: float, memory_limit_mb: int) -> None:
        """Starts the process and waits until it has imported the reward; raises ConfigError when it cannot be used."""
        self._name = name
        self._time_limit = time_limit
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opd.data.grading", name, str(time_limit), str(memory_limit_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Its own session: Ctrl-C in the terminal reaches the parent only, and one kill takes what the reward has started as well.
            start_new_session=True,
            env={**os.environ, CHILD_FLAG: "1"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin
        self._replies = self._process.stdout
        try:
            self._shake_hands()
        except BaseException:
            self.stop()
            raise

    def ask(self, completion: str, answer: str) -> float | None:
        """Returns the reward of one pair.

        Raises _Stopped at the time or memory limit, or when a signal ended the process; DataError when the reward itself fails.
        """
        try:
            self._requests.write(json.dumps([completion, answer]).encode() + b"\n")
            self._requests.flush()
            reply = self._receive(self._time_limit)
        except TimeoutError:
            raise _Stopped from None
        except (EOFError, BrokenPipeError):
            code = self._exit_code()
            if code == MEMORY_EXIT or code < 0:
                raise _Stopped from None
            raise RewardError(f"reward `{self._name}` ended its process with exit code {code} on an answer; return a number") from None
        if "error" in reply:
            raise RewardError(reply["error"])
        value: float | None = reply["reward"]
        return value

    def stop(self) -> None:
        """Kills the process and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._replies.close()
        with suppress(BrokenPipeError):  # closing writes what a dead child has not taken
            self._requests.close()

    def _shake_hands(self) -> None:
        try:
            reply = self._receive(START_LIMIT)
        except TimeoutError:
            raise ConfigError(
                f"reward `{self._name}` was not imported within {START_LIMIT:g} s; move slow work out of the top level of its module"
            ) from None
        except EOFError:
            raise ConfigError(f"the process of reward `{self._name}` ended with exit code {self._exit_code()} at its import") from None
        if "error" in reply:
            raise ConfigError(reply["error"])

    def _receive(self, limit: float) -> dict[str, Any]:
        """Returns the next reply; raises TimeoutError after `limit` seconds and EOFError when the child has closed its end."""
        deadline = time.monotonic() + limit
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(self._replies.fileno(), 65536)
            if not part:
                raise EOFError
            line += part
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _exit_code(self) -> int:
        """Returns the exit code of a process that has closed its pipes, minus the signal's number for one that a signal ended."""
        # Between the end of the pipe and the end of the process there is a moment in which a kill would hide the exit code.
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5)
        self._process.kill()
        return self._process.wait()


class Grader:
    """Judges pairs with one reward; made by `make_grader`. Closed with `close` or by leaving its `with` block.

    timeouts: how many answers hit the time limit, or ended the child at the memory limit or by a signal. Each was graded 0.0.
    """

    def __init__(self, name: str, time_limit: float, memory_limit_mb: int) -> None:
        self.timeouts = 0
        self._name = name
        self._time_limit = time_limit
        self._memory_limit_mb = memory_limit_mb
        self._function = IN_PROCESS.get(name)
        self._child = None if self._function is not None else self._start()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Returns the reward of each `(completion, answer)`, in order; None where the pair cannot be judged.

        An answer that hits a limit is 0.0 and the ones after it are judged by a new child, whose start does not count against them.

        Raises DataError when the user's function raises, ends its process, or returns something else than a finite number or None;
        ConfigError when the child cannot be started again.
        """
        return [self._grade_one(completion, answer) for completion, answer in pairs]

    def close(self) -> None:
        """Ends the child process; a second call does nothing."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> _Child:
        return _Child(self._name, self._time_limit, self._memory_limit_mb)

    def _grade_one(self, completion: str, answer: str) -> float | None:
        if self._function is not None:
            return self._function(completion, answer)
        if self._child is None:
            self._child = self._start()
        try:
            return self._child.ask(completion, answer)
        except _Stopped:
            self.close()
            self.timeouts += 1
            return 0.0
        except BaseException:
            # An interrupted exchange leaves its reply in the pipe, where the next pair would take it for its own.
            self.close()
            raise


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` is a built-in reward or reads `module:function`; imports nothing."""
    if name in BUILT_IN:
        return
    module, colon, function = name.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), function]):
        return
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    meant = f" (did you mean `{close[0]}`?)" if close else ""
    raise ConfigError(f"reward `{name}` is not known{meant}; use {', '.join(BUILT_IN)}, or module:function for your own")


def make_grader(name: str, *, time_limit: float = 5.0, memory_limit_mb: int = 1024) -> Grader:
    """Makes what judges completions with the reward `name`, and starts its process where it needs one.

    name: `exact`, `number`, `math`, or `module:function` for a function that carries `@opd.reward`. The module is looked up as
        `python -m` would, the current directory first, and is imported in the child only.
    time_limit: seconds of wall clock for one answer.
    memory_limit_mb: what an answer may take on top of what the imports took, in MiB of address space; on Linux only.

    Returns a Grader, to be closed. Raises ConfigError when there is no such reward, its function is not marked (it is then never
    called), its import fails or takes more than a minute, or math-verify is not installed.
    """
    check_name(name)
    if CHILD_FLAG in os.environ:
        raise ConfigError("a reward's module starts a run when it is imported; put the run under `if __name__ == '__main__':`")
    return Grader(name, time_limit, memory_limit_mb)
