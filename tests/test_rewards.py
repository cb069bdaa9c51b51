"""Rewards: what the built-ins accept, which functions may be called, and that no answer hangs the run or exhausts its memory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from decimal import Decimal
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from opd.data import rewards
from opd.data.grading import is_reward
from opd.data.rewards import Grader, exact, last_number, make_grader, number, reward
from opd.errors import ConfigError, DataError

SCORES = '''
import math, os, signal, subprocess, sys, time
from pathlib import Path
from opd.data.rewards import reward

with open("imports", "a") as file:
    file.write(f"{os.getpid()}\\n")
print("printed at import")

@reward
def same(completion, answer):
    return completion == answer

@reward
def by_command(completion, answer):
    """Does what the completion says, then returns 1."""
    if completion == "loop":
        while True:
            pass
    if completion == "deaf_loop":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        while True:
            pass
    if completion == "print_and_loop":
        print("last words")
        while True:
            pass
    if completion == "c_loop":
        10 ** 10 ** 9  # one C call that does not let another thread run
    if completion == "start_and_sleep":
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path("started").write_text(str(other.pid))
        time.sleep(60)
    if completion == "memory":
        return len(bytearray(2 ** 30)) * 0 + 1
    if completion == "crash":
        os.abort()
    if completion == "print":
        print('{"reward": 0.25}')
        os.write(1, b'{"reward": 0.25}\\n')
        subprocess.run(["echo", '{"reward": 0.25}'])
        sys.__stdout__.write("not JSON\\n")
        sys.__stdout__.flush()
    if completion == "read":
        return sys.stdin.read() == ""
    if completion == "raise":
        raise ValueError("two\\nlines" + 10000 * "!")
    if completion == "sys_exit":
        sys.exit(0)
    if completion == "os_exit":
        os._exit(9)
    if completion == "slow_exit":
        os.closerange(3, 100)
        time.sleep(0.5)
        os._exit(9)
    return 1

@reward
def evaluated(completion, answer):
    return eval(completion)

def unmarked(completion, answer):
    Path("called").touch()
    return 1.0
'''

REPOSITORY = Path(rewards.__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a user who has a module of rewards in it."""
    (tmp_path / "scores.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    return tmp_path


def grade(grader: Grader, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    return grader.grade([{"completion": completion, "answer": answer} for completion, answer in pairs])


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def imports(folder: Path) -> list[int]:
    """The processes that have imported the user's module."""
    return [int(line) for line in (folder / "imports").read_text().split()]


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [("18", "18", 1.0), (" 18\n", "18", 1.0), ("18", "\t18 ", 1.0), ("18.0", "18", 0.0), ("a b", "ab", 0.0), ("", "18", 0.0)],
)
def test_exact_compares_text_but_for_surrounding_space(completion: str, answer: str, wanted: float) -> None:
    assert exact(completion, answer) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("18", "18"),
        ("She makes 9 * 2 = $18 every day.", "18"),
        ("18.00", "18"),
        ("the answer is 1,234.", "1234"),
        ("1,234,567.50 dollars", "1234567.5"),
        ("12, 345", "345"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("x = -5.25%", "-5.25"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("-\\$3", "-3"),
        ("**\\$1,000**", "1000"),
        ("50%", "50"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("18cm", "18"),
        ("#### 18", "18"),
        ("It costs 1,00,000 rupees, or 12,34,567", "1234567"),
        ("1 234 567", "1234567"),
        ("in 2024, 345 people", "345"),
        ("12'345.5", "12345.5"),
        ("1.234.567", "1234567"),
        ("1.234,5", "1234.5"),
        ("1{,}234", "1234"),
        ("\\$70\\,000", "70000"),
        ("10,\\!000", "10000"),
        ("\uff14\uff12", "42"),
        ("\u0664\u0662", "42"),
        ("6.02e23", "602000000000000000000000"),
        ("2.5 \\times 10^{-3}", "0.0025"),
        ("10^5", "100000"),
        ("1.5 million dollars", "1500000"),
        ("minus 5", "-5"),
        ("+5", "5"),
        ("12 m^2", "12"),
        ("12 m\u00b2", "12"),
        ("3 m/s^{2}", "3"),
        ("7 mol of H2O", "7"),
        ("60 km/h", "60"),
        ("90^\\circ", "90"),
        ("an 18-year-old", "18"),
        ("Step 3: 18", "18"),
        ("**Total** 18", "18"),
        ("<<9*2=18>>18", "18"),
        ("<answer>18</answer>", "18"),
        ("\\boxed{18\\text{ eggs}}. I checked 3 times.", "18"),
        ("\\[ \\boxed{-5", "-5"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ],
)
def test_last_number_reads_a_number_as_people_write_it(text: str, wanted: str) -> None:
    assert last_number(text) == Decimal(wanted)


@pytest.mark.parametrize("text", ["", "none", "$", "-", ".", "$-.%,", "\u00bd", "H2O"])
def test_last_number_of_a_text_without_one_is_none(text: str) -> None:
    assert last_number(text) is None


# Not one plain number. Each ends with, or contains, digits that are another value.
FRACTIONS = ["3/2", "\\frac{5}{2}", "\\boxed{\\dfrac52}", "3 1/2", "1\u00bd", "2 and a half", "18/20"]
TIMES = ["9:30", "4:5", "2023-05-01", "01.05.2023", "2024-05-01T10:30", "3-5", "3\u20135", "version 3.11.7", "555-1234", "5'10"]
TUPLES = ["(7, 4)", "(2,4)", "\\{2, 4\\}", "1,2", "1234,567", "1,2345", "\\boxed{x = 3, y = 4}"]
FORMULAS = [
    "2^{10}",
    "2**10",
    "10\u00b2",
    "\\sqrt{2}",
    "2\\sqrt{3}",
    "2\\pi",
    "3i",
    "5x",
    "x + 5",
    "x - 5",
    "(2)-5",
    "10 - 5",
    "x^2+5",
    "f(5)",
    "x*5",
]
OTHERS = ["1010_2", "1010_{2}", "1010\u2082", "0x1F", "x > 5", "\u00b15", "|5|", "5M", "2 dozen", "1e99999"]


@pytest.mark.parametrize("text", [*FRACTIONS, *TIMES, *TUPLES, *FORMULAS, *OTHERS])
def test_a_text_that_is_not_one_plain_number_has_none(text: str) -> None:
    assert last_number(text) is None
    assert number(text, text) is None
    for part in re.findall(r"\d+", text):
        assert number(text, part) == 0.0 and number(part, text) is None


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        ("first 7, then 18", "18", 1.0),
        ("18.00", "18", 1.0),
        ("$1,800", "1800", 1.0),
        ("first 18, then 7", "18", 0.0),
        ("-18", "18", 0.0),
        ("0.1000000000000000055511151231257827", "0.1", 0.0),
        ("no idea", "18", 0.0),
        ("18", "eighteen", None),
        ("24", "48 / 2 = 24", None),
        ("24", "48 / 2 = 24\n#### 24", 1.0),
        ("24", "Half of 48 is \\boxed{24}.", 1.0),
        ("5", "negative 5", 0.0),
        ("5 million", "5", 0.0),
        ("5,00,000", "1,00,000", 0.0),
    ],
)
def test_number_compares_the_last_numbers_as_decimals(completion: str, answer: str, wanted: float | None) -> None:
    assert number(completion, answer) == wanted


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1,",
        "1,111",
        ",111",
        "-",
        "-$",
        "$",
        ".",
        ".1",
        "1.",
        "1,111,",
        "11,1111,",
        "-1",
        "\\",
        " ",
        "1,111,111x",
        "\\$",
        " 111",
        "1 111 ",
        "a1-",
        "\\boxed{",
        "\\text{",
    ],
)
def test_number_is_linear_on_a_hostile_line(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    start = time.process_time()
    number(text + "x", "18")
    number("x" + text + ",1111", "18")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("name", ["math", "scores:same"])
def test_modules_of_the_working_folder_do_not_take_the_place_of_others(folder: Path, name: str) -> None:
    for module in ("random", "math", "json", "datasets", "sympy"):
        (folder / f"{module}.py").write_text("raise SystemExit('the wrong module')")
    with make_grader(name) as grader:
        assert grade(grader, [("18", "18")]) == [1.0]


def test_reward_may_have_the_name_of_another_module_and_import_its_neighbours(folder: Path) -> None:
    (folder / "test.py").write_text("import neighbour, opd\n\n@opd.reward\ndef half(completion, answer):\n    return neighbour.HALF\n")
    (folder / "neighbour.py").write_text("HALF = 0.5")
    with make_grader("test:half") as grader:
        assert grade(grader, [("", "")]) == [0.5]


def test_the_mark_leaves_the_function_as_it_is() -> None:
    def score(completion: str, answer: str) -> float:
        return 0.5

    assert not is_reward(score)
    marked = reward(score)
    assert marked is score
    assert is_reward(score)
    assert marked("a", "b") == 0.5
    assert not is_reward(os.system)


def test_exact_and_number_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    for name in ("exact", "number"):
        with make_grader(name) as grader:
            assert grade(grader, [("18", "18"), ("7", "18")]) == [1.0, 0.0]
            assert grader.not_judged == 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("numbr", "did you mean number?"),
        ("nonsense", "use exact, number, math, or module:function"),
        ("", "use exact, number, math, or module:function"),
        ("scores:", "use exact, number, math, or module:function"),
        (":same", "use exact, number, math, or module:function"),
        ("scores:same:same", "use exact, number, math, or module:function"),
        (".scores:same", "use exact, number, math, or module:function"),
        ("scores:same()", "use exact, number, math, or module:function"),
        ("scoers:same", "there is no module `scoers`"),
        ("scores.py:same", "there is no module `scores.py`"),
        ("scores:sane", "did you mean `scores:same`?"),
        ("scores:nothing_like_it", "has no `nothing_like_it`"),
        ("scores:unmarked", "put `@opd.reward` on the function"),
        ("broken:score", "its module failed at import: ModuleNotFoundError: No module named 'not_there'"),
        ("leaving:score", "its module failed at import: SystemExit: 0"),
        ("gone:score", "ended with exit code 5 at its import"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_in_one_line(folder: Path, name: str, wanted: str) -> None:
    (folder / "broken.py").write_text("import not_there\n")
    (folder / "leaving.py").write_text("raise SystemExit(0)\n")
    (folder / "gone.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(ConfigError) as refusal:
        make_grader(name)
    assert wanted in str(refusal.value)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (folder / "called").exists()


def test_an_unmarked_function_is_never_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python imports sitecustomize at its start, so in every child os.system is a function that leaves a file when it is called.
    (folder / "sitecustomize.py").write_text(
        "import os\nfrom pathlib import Path\ndef system(*arguments):\n    Path('called').touch()\n    return 0\nos.system = system\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{REPOSITORY}")
    subprocess.run([sys.executable, "-c", "import os; os.system('true')"], check=True)
    assert (folder / "called").exists(), "the test does not see a call of os.system"
    (folder / "called").unlink()

    with pytest.raises(ConfigError, match="not marked"):
        make_grader("os:system")
    assert not (folder / "called").exists()


def test_a_module_that_hangs_at_import_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "slow.py").write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    monkeypatch.setattr(rewards, "START_LIMIT", 1.0)
    with pytest.raises(ConfigError, match="was not imported within 1 s"):
        make_grader("slow:score")
    assert not is_running(int((folder / "pid").read_text()))


def test_a_reward_whose_module_starts_a_run_does_not_start_runs_without_end(folder: Path) -> None:
    (folder / "script.py").write_text(
        "from opd.data.rewards import make_grader, reward\n"
        "@reward\n"
        "def score(completion, answer):\n"
        "    return 1.0\n"
        "open('runs', 'a').write('run ')\n"
        "make_grader('script:score')\n"
    )
    with pytest.raises(ConfigError, match="__name__ == '__main__'"):
        make_grader("script:score")
    assert (folder / "runs").read_text() == "run "


def test_a_users_function_grades_in_another_process(folder: Path) -> None:
    with make_grader("scores:same") as grader:
        long = "\ud800\u2028\n" + "x" * 300_000
        pairs = [("a", "a"), ("a", "b"), (long, long), ('"\n', '"\n'), ("", "")]
        assert grade(grader, pairs) == [1.0, 0.0, 1.0, 1.0, 1.0]
        assert grader.not_judged == 0
        assert "scores" not in sys.modules
        (child,) = imports(folder)
        assert child != os.getpid()
        assert is_running(child)
    assert not is_running(child)
    grader.close()


@pytest.mark.parametrize("command", ["loop", "deaf_loop", "c_loop"])
def test_a_hanging_answer_is_not_judged_and_the_next_ones_are_graded(folder: Path, command: str) -> None:
    with make_grader("scores:by_command", seconds=0.5) as grader:
        assert grade(grader, [("", ""), (command, ""), ("", ""), ("", "")]) == [1.0, None, 1.0, 1.0]
        assert grader.not_judged == 1
        hung, alive = imports(folder)
        assert not is_running(hung)
        assert is_running(alive)


def test_the_time_limit_is_for_one_answer_and_not_for_the_start(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import time\n"
        "from opd.data.rewards import reward\n"
        "time.sleep(0.6)\n"
        "@reward\n"
        "def score(completion, answer):\n"
        "    time.sleep(float(completion))\n"
        "    return 1.0\n"
    )
    with make_grader("slow:score", seconds=0.4) as grader:
        assert grade(grader, [("9", ""), ("0.15", ""), ("0.15", ""), ("0.15", ""), ("0.15", "")]) == [None, 1.0, 1.0, 1.0, 1.0]
        assert grader.not_judged == 1


def test_a_child_may_wait_longer_than_the_time_limit_for_its_next_answer(folder: Path) -> None:
    with make_grader("scores:same", seconds=0.1) as grader:
        assert grade(grader, [("", "")]) == [1.0]
        time.sleep(1.5)
        assert grade(grader, [("", "")]) == [1.0]
        assert grader.not_judged == 0
        assert len(imports(folder)) == 1


def test_what_a_hanging_answer_has_started_ends_with_it(folder: Path) -> None:
    with make_grader("scores:by_command", seconds=1.0) as grader:
        assert grade(grader, [("start_and_sleep", "")]) == [None]
    assert ends_within(int((folder / "started").read_text()), 2.0)


@pytest.mark.parametrize("command", ["memory", "crash"])
def test_an_answer_that_ends_the_child_is_not_judged_and_the_next_is_graded(folder: Path, command: str) -> None:
    with make_grader("scores:by_command", memory_mib=256) as grader:
        assert grade(grader, [(command, ""), ("", "")]) == [None, 1.0]
        assert grader.not_judged == 1


def test_what_a_reward_prints_or_reads_is_not_taken_for_the_protocol(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with make_grader("scores:by_command", seconds=1.0) as grader:
        assert grade(grader, [("print", ""), ("read", ""), ("print", ""), ("print_and_loop", "")]) == [1.0, 1.0, 1.0, None]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count('{"reward": 0.25}') == 6
    assert "printed at import" in captured.err
    assert "last words" in captured.err


def test_a_reward_that_fails_is_a_data_error_in_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with make_grader("scores:by_command") as grader:
        for command, wanted in [
            ("raise", "reward `scores:by_command` failed on an answer: scores.py:47: ValueError: two lines!!!"),
            ("sys_exit", "reward `scores:by_command` failed on an answer: scores.py:49: SystemExit: 0"),
            ("os_exit", "reward `scores:by_command` ended its process with exit code 9 on an answer"),
            ("slow_exit", "reward `scores:by_command` ended its process with exit code 9 on an answer"),
        ]:
            with pytest.raises(DataError) as failure:
                grade(grader, [("", ""), (command, "")])
            assert str(failure.value).startswith(wanted)
            assert "\n" not in str(failure.value)
            assert "exit code" in wanted or str(failure.value).endswith(f"completion {command!r}, answer ''")
            assert len(str(failure.value)) < 500
        assert grade(grader, [("", "")]) == [1.0]
        assert grader.not_judged == 0
    assert "Traceback" not in capfd.readouterr().err


NAMED = """
import asyncio
from opd.data.rewards import reward

@reward
def all_of_one(prompt, completion, rubric, answer, weight=2.0):
    assert (prompt, rubric, answer) == ("question", "short", "a")
    return weight * (completion == "a")

@reward
def own_names(text, rubric, gold, limit=3):
    return float(text == gold and rubric == "short" and limit == 3)

@reward
def swapped(answer, text):
    return float((text, answer) == ("completion", "a"))

@reward
def everything(completion, **columns):
    return float(sorted(columns) == ["answer", "prompt", "rubric", "weight"])

@reward
def lists(prompts, completions, rubric):
    assert len(prompts) == len(completions) == len(rubric) == 3
    return [float(text == "a") for text in completions]

@reward
def too_few(completions):
    return [1.0]

@reward
def unknown(completion, rubrik):
    return 1.0

running = most = 0

@reward
async def slow(completion):
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(30 if completion == "late" else 0.2)
    running -= 1
    return most

@reward
async def slow_lists(completions):
    await asyncio.sleep(0.1)
    return [float(text == "a") for text in completions]
"""


def items(*completions: str) -> list[dict[str, Any]]:
    return [{"prompt": "question", "completion": text, "answer": "a", "rubric": "short", "weight": 3.0} for text in completions]


def test_a_reward_gets_what_its_parameters_name(folder: Path) -> None:
    (folder / "named.py").write_text(NAMED)
    for name, wanted in [
        ("all_of_one", [3.0, 0.0, 3.0]),
        ("own_names", [1.0, 0.0, 1.0]),
        ("everything", [1.0] * 3),
        ("lists", [1.0, 0.0, 1.0]),
        ("slow_lists", [1.0, 0.0, 1.0]),
    ]:
        with make_grader(f"named:{name}") as grader:
            assert grader.grade(items("a", "b", "a")) == wanted, name
            assert grader.grade([]) == []
    with make_grader("named:swapped") as grader:
        assert grader.grade(items("completion")) == [1.0]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("unknown", "takes rubrik, but a row has only answer, completion.*: name these, or give rubrik a"), ("too_few", "1 rewards for 2")],
)
def test_what_a_reward_asks_for_and_does_not_get_is_named(folder: Path, name: str, wanted: str) -> None:
    (folder / "named.py").write_text(NAMED)
    with make_grader(f"named:{name}") as grader, pytest.raises(DataError, match=wanted):
        grader.grade(items("a", "b"))


def test_asynchronous_rewards_run_side_by_side_and_a_late_one_is_not_judged(folder: Path) -> None:
    (folder / "named.py").write_text(NAMED)
    with make_grader("named:slow", seconds=1.0) as grader:
        found = grader.grade(items("a", "late", *"bcdef"))
        assert found[1] is None and grader.not_judged == 1
        assert max(reward for reward in found if reward is not None) == 7  # all at once


def test_only_finite_numbers_and_none_are_rewards(folder: Path) -> None:
    with make_grader("scores:evaluated") as grader:
        assert grade(grader, [("0.25", ""), ("-3", ""), ("True", ""), ("None", "")]) == [0.25, -3.0, 1.0, None]
        for value, wanted in [
            ("math.nan", "nan"),
            ("-math.inf", "-inf"),
            ("10 ** 400", "type int"),
            ("'1'", "type str"),
            ("[1.0]", "type list"),
            ("1j", "type complex"),
        ]:
            with pytest.raises(DataError, match=f"it returned .*{wanted}, not a finite number or None"):
                grade(grader, [(value, "")])


def test_an_interrupted_exchange_does_not_shift_the_rewards(folder: Path) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    with make_grader("scores:evaluated") as grader:
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                grade(grader, [("time.sleep(1) or 0.25", "")])
        finally:
            signal.signal(signal.SIGALRM, before)
        assert grade(grader, [("0.5", ""), ("0.75", "")]) == [0.5, 0.75]


@pytest.mark.parametrize("command", ["idle", "c_loop"])
def test_a_killed_parent_leaves_no_child(folder: Path, command: str) -> None:
    script = (
        "import signal, sys, time\n"
        "from opd.data.rewards import make_grader\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "grader = make_grader('scores:by_command', seconds=1.0)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60) if sys.argv[1] == 'idle' else grader.grade([{'completion': sys.argv[1], 'answer': ''}])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stderr is not None
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    (child,) = imports(folder)
    assert is_running(child)
    parent.kill()
    parent.wait()
    try:
        assert ends_within(child, 5.0)
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)
    assert b"Traceback" not in parent.stderr.read()
    parent.stdout.close()
    parent.stderr.close()


@pytest.mark.parametrize("sent", ["nothing", "half a message", "a message"])
def test_a_child_whose_parent_is_gone_exits_quietly(folder: Path, sent: str) -> None:
    ours, theirs = Pipe()
    command = [sys.executable, "-u", "-m", "opd.data.grading", str(theirs.fileno()), "scores:same", "5", "1024"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()])
    theirs.close()
    assert json.loads(ours.recv_bytes()) == {"ready": True, "many": False}
    if sent == "a message":
        ours.send_bytes(b'[[{"completion": "", "answer": ""}], 5]')
    if sent == "half a message":
        os.write(ours.fileno(), (8).to_bytes(4, "big") + b'["", ')
    ours.close()
    assert child.communicate(timeout=10) == (b"printed at import\n", b"")
    assert child.returncode == 0


def test_math_without_math_verify_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{REPOSITORY}")
    (folder / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\", name='math_verify')\n")
    with pytest.raises(ConfigError, match=r"pip install 'opd\[math\]'"):
        make_grader("math")


def test_math_grades_what_math_verify_cannot_digest_as_zero(folder: Path) -> None:
    (folder / "math_verify.py").write_text(
        "def parse(text, **options):\n"
        "    return [text.strip('$')]\n"
        "def verify(gold, target, **options):\n"
        "    if target == ['recursion']:\n"
        "        raise RecursionError\n"
        "    return gold == target\n"
    )
    with make_grader("math") as grader:
        assert grade(grader, [("recursion", "1"), ("1", "1"), ("2", "1")]) == [0.0, 1.0, 0.0]
        assert grader.not_judged == 0


def test_math_judges_by_value(folder: Path) -> None:
    pytest.importorskip("math_verify")
    cases = [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", "1/2", 1.0),
        (r"\boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{0.5}", r"\[\frac{1}{2}\]", 1.0),
        (r"\boxed{1 + x^2}", "x^2+1", 1.0),
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", 1.0),
        (r"\boxed{3}", r"2\sqrt{3}", 0.0),
        ("The answer is 18.", "18", 1.0),
        (r"\boxed{\frac{1}{3}}", "0.5", 0.0),
        ("no idea", "18", 0.0),
        ("", "18", 0.0),
        (r"\boxed{\frac{", "18", 0.0),
        ("18", " ", None),
    ]
    with make_grader("math") as grader:
        rewards_of = grade(grader, [(completion, answer) for completion, answer, _ in cases])
    assert dict(zip(cases, rewards_of, strict=True)) == {case: case[2] for case in cases}


def test_math_survives_a_hostile_completion(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("math_verify")
    code = "__import__('os').system('touch x')"
    with make_grader("math", seconds=2.0) as grader:
        pairs = [("$9^{9^{9^{9}}}$", "1"), (r"\boxed{1}", "1"), (code, "1"), (f"\\boxed{{{code}}}", "1"), ("1", f"${code}$")]
        first, second, *injected = grade(grader, pairs)
        assert (first, second) == (None, 1.0)
        assert 1.0 not in injected
        assert grader.not_judged == 1
    assert not (folder / "x").exists()
    assert capfd.readouterr().err == ""
