"""Grade completions against reference answers: the built-in rewards, a user's own, and the process that untrusted ones run in.

`exact` and `number` take time linear in the text and run in this process. `math` and a user's function may hang or exhaust the memory, so
they run in a child process (`opd.data.grading`) that is killed when an answer takes too long. A thread could not be killed, and
math-verify's own limit is an alarm signal, which works in the main thread only and waits for a long C call to return.

Parent and child exchange JSON messages over a socket, never pickles:

    child   {"ready": true, "many": whether it takes more than one}         or  {"error": "why the reward cannot be used"}
    parent  [[{"completion": …, "answer": …, "prompt": …, columns}, …], seconds for all of them]
    child   {"rewards": [number | null, …], "late": how many took too long}  or  {"error": "how the reward failed"}
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from multiprocessing import Pipe
from typing import Any, TypeVar

from opd.config.rules import check_reward_name
from opd.data.grading import MARK, MEMORY_EXIT, START_LIMIT, Item, RewardFunction
from opd.errors import ConfigError, RewardError

F = TypeVar("F", bound=RewardFunction)

CHILD_FLAG = "OPD_GRADING_CHILD"  # set in the environment of the child

# Rewritten before a text is searched, so that the patterns below see one spelling of each.
CHARACTERS = str.maketrans("\u2212\uff0c\uff0e\u066c\u066b\u2019\u00a0\u2007\u2009\u202f~", "-,.,.'     ")
SPELLINGS = (
    (re.compile(r"\{,\}|,\\!"), ","),  # 1{,}234
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox) ?\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:left|right|approx|quad|[()\[\],;: ])|<[/|]?\w+\|?>"), " "),  # 70\,000, <answer>
    (re.compile(r"(?<=\d) ?(?:\\times|\\cdot|[×·x*]) ?10 ?(?:\^|\*\*) ?\{?([-+]?\d+)\}?"), r"e\1"),
    (re.compile(r"(?<![\w.,^/*({-])10(?:\^|\*\*)\{?([-+]?\d+)\}?"), r"1e\1"),
)
# A word is matched with its digits, which are no number: H2O, m^2, x_{1}, GPT-4. What is joined to a number without a space is one term
# with it: 3/2, 9:30, 2023-05-01, 2^{10}. Repetitions are possessive, or end at a digit: the search is linear.
TERM = re.compile(
    r"(?P<sign>(?:\b[Mm]inus |\b[Nn]egative |(?<![\w)}\]])[-+])(?:\\?[$€£¥₹])?|[$€£¥₹][-+])?"
    r"(?P<term>\d{1,3}(?: \d{3}){1,8}+(?:[.,]\d++)?(?! ?\d)|(?:(?<!\w)\.)?\d(?:(?:[^\w\s=<>]|[\d_])*\d)?(?:[eE][-+]?\d++)?)"
    r"|[^\W\d_]\w*+(?:[-^_]\{?-?\w++\}?)*+"
)
# A number with its digits in groups as in English or in India; and with a decimal comma, where it cannot be a comma between groups.
PLAIN = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}([ '_])\d{3}(?:\1\d{3})*|\d*)(?:\.\d+)?(?:[eE][-+]?\d{1,4})?")
DECIMAL_COMMA = re.compile(r"\d{1,3}(?:(?:\.\d{3}){2,}|(?:\.\d{3})+,\d+|(?:[ ']\d{3})+,\d+)")
# What makes a plain number a part of something else: an operator, a function, the rest of a mixed number; then a power, a variable.
BEFORE = re.compile(
    r"(?:[+/×÷·±√^<≤≥≠] ?|(?<![->=])> ?|[<>!]= ?|\||[\w)\]}](?:\*+| \* )|- |[)\]}]-|\d [–—] |\d[ :.]|[\w)\]}][({\[]|\\[A-Za-z]+ ?\{?)\Z"
)
AFTER = re.compile(
    r" ?(?:[+×÷·±√<≤≥≠]|\^(?!\{?\\circ)|\\(?!circ|degree|[%$&\\]))|[²³¹⁰-⁹₀-₉½¼¾⅐-⅟({]| \* |\*(?=\w)| ?(?:[-/*] ?)?[xyzπ](?!\w)"
    r"|(?![dghlmstACFGHJLNTVW])[^\W\d_](?![^\W\d_])|(?:bn|mn)\b| dozen\b| and a half|[,;] ?\\"
)
SCALE = re.compile(r"[ -](hundred|thousand|lakh|million|crore|billion|trillion)\b")
POWERS = {"hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12}


def reward(function: F) -> F:
    """Mark a function as a reward, so that `module:function` may name it in a config. Use it without parentheses: `@opd.reward`.

    The function takes `(completion, answer)`, or what the names of its parameters say, and returns a finite number, or None for what cannot
    be graded. Of several accepted answers the one with the highest reward counts. Parameters:

        completion, answer, prompt      of one answer; the prompt is the text of its last message
        completions, answers, prompts   of many: the function gets lists and returns a list
        any other name                  the column of that name

    An `async` function judges several answers at a time.
    """
    setattr(function, MARK, True)
    return function


def exact(completion: str, answer: str) -> float:
    """Return 1.0 if the two are equal except for surrounding white space, else 0.0."""
    return float(completion.strip() == answer.strip())


def find_numbers(text: str) -> tuple[int, Decimal | None]:
    """Return how many numbers are in `text`, and the last one exactly: None where it is part of something else, such as 3/2 or (2, 4)."""
    text = text.translate(CHARACTERS)
    for spelling, replacement in SPELLINGS:
        text = spelling.sub(replacement, text)
    terms = [match for match in TERM.finditer(text) if match["term"]]
    if not terms:
        return 0, None
    last, before = terms[-1], text[max(0, terms[-1].start() - 16) : terms[-1].start()]
    in_tuple = before.rstrip(" ")[-1:] in (",", ";") and text[last.end() : last.end() + 1] in (")", "]", "}")
    term = last["term"].translate(str.maketrans(",.", ".,")) if DECIMAL_COMMA.fullmatch(last["term"]) else last["term"]
    if in_tuple or not PLAIN.fullmatch(term) or BEFORE.search(before) or AFTER.match(text, last.end()):
        return len(terms), None
    scale = SCALE.match(text, last.end())
    mantissa, _, exponent = re.sub("[, '_]", "", term).lower().partition("e")
    value = Decimal(f"{mantissa}e{int(exponent or 0) + (POWERS[scale[1]] if scale else 0)}")
    return len(terms), value.copy_negate() if last["sign"] and "+" not in last["sign"] else value


def last_boxed(text: str) -> str | None:
    r"""Return what is in the last `\boxed{...}` of `text`, or None."""
    _, boxed, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[:end]
    return rest if boxed else None


def only_number(text: str) -> Decimal | None:
    count, value = find_numbers(text)
    return value if count == 1 else None


def last_number(text: str) -> Decimal | None:
    r"""Return the number in the last `\boxed{}` of `text`, else its last number; None where that is not one plain number.

    Reads `1,234`, `1 234.5`, `1.234,5`, `12,34,567`, `-5`, `$18.00`, `-$3`, `.5`, `1.5e3`, `2 \times 10^{5}`, `3 million`. Percent signs
    and units are ignored.
    """
    boxed = last_boxed(text)
    return find_numbers(text)[1] if boxed is None else only_number(boxed)


def number(completion: str, answer: str) -> float | None:
    r"""Return 1.0 if the last number in the completion equals the answer's, else 0.0.

    None for an answer (after its last `####`, or in its last `\boxed{}`) without a number, with several, or with one that is part of a
    fraction, a date, a tuple or a formula.
    """
    reference = only_number(last_boxed(answer) or answer.rpartition("####")[2])
    return None if reference is None else float(last_number(completion) == reference)


def best(rewards: Iterable[float | None]) -> float | None:
    """Return the highest of the rewards against each accepted answer; None where none could be graded."""
    return max((reward for reward in rewards if reward is not None), default=None)


IN_PROCESS: dict[str, RewardFunction] = {"exact": exact, "number": number}


class Grader:
    """Grades completions with one reward; made by `make_grader`. Close it, or use it in a `with` block.

    Attributes:
        not_judged: How many answers hit the time or memory limit, or crashed the child. They have no reward.
        reported: How many a warning named last, so that evaluations do not repeat it.
        limits: The limits, as options.
    """

    def __init__(self, name: str, seconds: float, memory_mib: int) -> None:
        self.not_judged = 0
        self.reported = 0
        self.limits = f"eval.reward_seconds={seconds:g}, eval.reward_memory={memory_mib}"
        self._name = name
        self._seconds = seconds
        self._memory = memory_mib
        self._takes_many = False
        self._function = IN_PROCESS.get(name)
        self._process: subprocess.Popen[bytes] | None = None
        if self._function is None:
            self._start()

    def grade(self, items: Sequence[Item]) -> list[float | None]:
        """Return the reward of each answer, in order; None where it cannot be graded, or hit a limit.

        After an answer that hit a limit a new child grades the rest; its start does not count against them.

        Raises:
            RewardError: The user's function raised, ended its process, or did not return finite numbers or None.
            ConfigError: The child cannot be started again.
        """
        if (function := self._function) is not None:
            return [function(item["completion"], item["answer"]) for item in items]
        if self._process is None:
            self._start()
        parts = [items] if self._takes_many and items else [[item] for item in items]
        return [reward for part in parts for reward in self._grade_in_child(part)]

    def close(self) -> None:
        """Kill the child and what it has started. A second call does nothing."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            self._connection.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._connection, connection = Pipe()
        arguments = [str(part) for part in (connection.fileno(), self._name, self._seconds, self._memory)]
        with connection:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "opd.data.grading", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what the reward prints goes to our standard error, also from C and from programs it starts
                pass_fds=[connection.fileno()],
                start_new_session=True,  # Ctrl-C only reaches the parent, and one kill also ends what the reward has started
                env={**os.environ, CHILD_FLAG: "1"},
            )
        try:
            reply = self._receive(START_LIMIT)
            if reply is None:
                remedy = "move slow work out of the top level of its module"
                raise ConfigError(f"reward `{self._name}` was not imported within {START_LIMIT:g} s; {remedy}")
            if "error" in reply:
                raise ConfigError(reply["error"])
            self._takes_many = reply["many"]
        except EOFError:
            code = self._exit_code()
            self.close()
            raise ConfigError(f"the process of reward `{self._name}` ended with exit code {code} at its import") from None
        except BaseException:
            self.close()
            raise

    def _grade_in_child(self, items: Sequence[Item]) -> list[float | None]:
        if self._process is None:
            self._start()
        seconds = self._seconds * len(items)
        try:
            self._connection.send_bytes(json.dumps([items, seconds], default=str).encode())
            reply, code = self._receive(seconds), None
        except (EOFError, ConnectionError):
            reply, code = None, self._exit_code()
        except BaseException:
            self.close()  # an interrupted exchange would leave its reply for the next answer
            raise
        if reply is None:
            self.close()
            if code is not None and code >= 0 and code != MEMORY_EXIT:
                raise RewardError(f"reward `{self._name}` ended its process with exit code {code} on an answer; return a number")
            self.not_judged += len(items)
            return [None] * len(items)
        if "error" in reply:
            raise RewardError(reply["error"])
        self.not_judged += reply["late"]
        values: list[float | None] = reply["rewards"]
        return values

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next reply, or None when it takes too long. Raises `EOFError` when the child has closed its end."""
        return json.loads(self._connection.recv_bytes()) if self._connection.poll(seconds) else None

    def _exit_code(self) -> int:
        """Return the exit code of a child that has closed its end; negative for a signal."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):  # a kill before the process has ended would hide its exit code
            return self._process.wait(timeout=5)
        self._process.kill()
        return self._process.wait()


def make_grader(name: str, *, seconds: float = 5.0, memory_mib: int = 1024) -> Grader:
    """Return a grader for a reward, with its process started where it needs one.

    Args:
        name: `exact`, `number`, `math`, or `module:function` for a function marked with `@opd.reward`. The module is looked for in
            the working folder first, and imported in the child only.
        seconds: Of wall clock for one answer.
        memory_mib: MiB of address space for an answer on top of what the imports took; Linux only.

    Raises:
        ConfigError: There is no such reward, it is not marked (and not called), its import fails or takes more than a minute, or
            math-verify is not installed.
    """
    check_reward_name(name)
    if CHILD_FLAG in os.environ:
        raise ConfigError("a reward's module starts a run when it is imported; put the run under `if __name__ == '__main__':`")
    return Grader(name, seconds, memory_mib)
