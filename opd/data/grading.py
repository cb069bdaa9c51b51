"""The process that untrusted rewards run in: `python -m opd.data.grading NAME TIME_LIMIT MEMORY_LIMIT_MB`, started by `opd.data.rewards`.

Imports the reward, says that it is ready, then answers one pair per line until its input ends. It outlives a killed parent by little
more than the time limit: an idle child sees the end of its input, and a hanging one is ended by an alarm that needs no Python code to
run (a reward that sets an alarm of its own takes this one away, and is ended by a living parent only).
"""

import difflib
import importlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from opd import signals
from opd.errors import ConfigError

# (completion, answer) -> the reward, or None when the pair cannot be judged.
RewardFunction = Callable[[str, str], float | None]

MARK = "__opd_reward__"  # the attribute that `@opd.reward` sets
START_LIMIT = 60.0  # seconds the import of a reward may take; that of a large library from a cold disk is slow
MEMORY_EXIT = 3  # the exit code when an answer ran into the memory limit
GRACE = 1.0  # seconds after the parent's limit until the child's own alarm
ERROR_LENGTH = 300  # characters; keeps a reply short enough for the pipe to take it in one piece

# What math-verify looks for before it reads a text as LaTeX.
DELIMITED = re.compile(r"\\boxed|\\\(|\\\[|(?<!\\)\$.*(?<!\\)\$", re.DOTALL)


def is_reward(value: object) -> bool:
    """Returns whether `value` carries the mark of `@opd.reward`."""
    return getattr(value, MARK, False) is True


def one_line(error: BaseException) -> str:
    """Returns the type and the message of an exception as one line of bounded length."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:ERROR_LENGTH]


def load_math() -> RewardFunction:
    """Returns the `math` reward: 1.0 when math-verify finds the completion equal to the answer, else 0.0.

    An answer in which it finds nothing to compare with is None.

    Raises ConfigError when math-verify cannot be imported. https://github.com/huggingface/Math-Verify
    """
    try:
        math_verify = importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(f"reward `math` needs math-verify ({one_line(error)}): pip install 'opd[math]'") from None
    # Its own limits are off, since the parent keeps the time, and it warns about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def math(completion: str, answer: str) -> float | None:
        try:
            # An answer without delimiters is all mathematics; undelimited, math-verify would see only the 3 in `2\sqrt{3}`.
            gold = math_verify.parse(answer if DELIMITED.search(answer) else f"${answer}$", parsing_timeout=None)
            if not gold:
                return None
            return float(math_verify.verify(gold, math_verify.parse(completion, parsing_timeout=None), timeout_seconds=None))
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - what math-verify cannot digest is not the answer
            return 0.0

    return math


def load_user(name: str) -> RewardFunction:
    """Returns the function that `module:function` names, without calling it; raises ConfigError when there is none or it is unmarked."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - an import may also call sys.exit
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"reward `{name}`: there is no module `{module_name}`; run from its folder, or install it (without `.py` in the name)"
            ) from None
        raise ConfigError(f"reward `{name}`: its module failed at import: {one_line(error)}") from None
    try:
        function = getattr(module, function_name)
    except AttributeError:
        close = difflib.get_close_matches(function_name, vars(module), n=1)
        meant = f"did you mean `{module_name}:{close[0]}`?" if close else "check the name after the colon"
        raise ConfigError(f"reward `{name}`: module `{module_name}` has no `{function_name}`; {meant}") from None
    if not is_reward(function):
        raise ConfigError(f"reward `{name}` is not marked as a reward and was not called; put `@opd.reward` on the function")
    marked: RewardFunction = function
    return marked


def checked(value: object) -> float | None:
    """Returns a reward as a float or None; raises ValueError for anything but None and a finite number."""
    if value is None:
        return None
    # The comparison is false for NaN, for infinity, and for a whole number that no float can hold.
    if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
        return float(value)
    shown = str(value) if isinstance(value, float) else f"a value of type {type(value).__name__}"
    raise ValueError(f"it returned {shown}, not a finite number or None")


def judge(name: str, function: RewardFunction, completion: str, answer: str) -> dict[str, Any]:
    """Returns the reply for one pair; raises MemoryError at the memory limit."""
    try:
        value = function(completion, answer)
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - a reward may also call sys.exit
        return {"error": f"reward `{name}` failed on an answer: {one_line(error)}"}
    try:
        return {"reward": checked(value)}
    except ValueError as error:
        return {"error": f"reward `{name}` failed on an answer: {error}"}


def limit_memory(megabytes: int) -> None:
    """Lets this process take `megabytes` MiB of address space more than it has now; does nothing outside Linux.

    More than it has now, because the imports alone may map any amount: torch reserves gigabytes that it never touches.
    """
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def claim_pipes() -> tuple[BinaryIO, int]:
    """Returns the requests and the descriptor of the replies, out of reach of the reward.

    What the reward prints goes to standard error, also from C and from programs it starts, and it reads an empty standard input.
    """
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


def send(replies: int, reply: dict[str, Any]) -> None:
    """Writes one reply; ends the process quietly when the parent is gone."""
    try:
        os.write(replies, json.dumps(reply).encode() + b"\n")
    except BrokenPipeError:
        leave(0)


def leave(code: int) -> NoReturn:
    """Ends the process at once: threads that a reward has left behind would keep it alive."""
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Ends this process when the block takes longer than `seconds`, which matters when the parent is no longer there to do it."""
    # With its default action the signal ends the process in the kernel, even inside one long C call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(name: str, time_limit: float, memory_limit_mb: int) -> NoReturn:
    """Serves one reward until the parent closes the pipe."""
    signals.die_with_parent(signal.SIGKILL)
    requests, replies = claim_pipes()
    try:
        with ended_after(START_LIMIT + GRACE):
            function = load_math() if name == "math" else load_user(name)
    except ConfigError as error:
        send(replies, {"error": str(error)})
        leave(0)
    limit_memory(memory_limit_mb)
    send(replies, {"ready": True})
    try:
        for line in requests:
            if not line.endswith(b"\n"):  # the parent went away in the middle of it
                break
            completion, answer = json.loads(line)
            with ended_after(time_limit + GRACE):
                reply = judge(name, function, completion, answer)
            send(replies, reply)
    except MemoryError:
        leave(MEMORY_EXIT)
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
