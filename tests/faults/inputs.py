"""What users type and what files contain: command lines of all kinds, code where data belong, names that lead out, broken data."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from faults import hooks
from faults.harness import RUN, Fault, Tries, Try, each_try, finish, resume_to_reference, run, valid_checkpoints
from opd.config.compose import PACKAGE
from opd.data.rewards import make_grader
from opd.errors import USAGE, OpdError

# Events that must not occur while a config is composed: https://docs.python.org/3/library/audit_events.html
CALLS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect", "os.fork", "os.remove")
HOSTILE = (
    "__import__('os').system('touch pwned')", "{_target_: os.system, command: touch pwned}", "$(touch pwned)", "`touch pwned`",
    "!!python/object/apply:os.system [touch pwned]", "${eval:__import__('os').system('touch pwned')}", "${oc.decode:'!!python/name:os'}",
    "{_target_: builtins.eval, _args_: [\"open('pwned','w')\"]}", "os:system", "{_target_: torch.hub.load, repo_or_dir: a/b, model: c}",
    "; touch pwned", "| touch pwned", "{_partial_: true, _target_: subprocess.call}", "${oc.create:{_target_: os.abort}}", "../../pwned",
    "file:///etc/passwd", "${hydra:runtime.cwd}/../pwned", "lambda: open('pwned','w')", "\"'; import os; os.system('touch pwned') #\"",
    "cos\\nsystem\\n(S'touch pwned'\\ntR.",
)  # fmt: skip
VALID = (
    "optim.lr=2e-5", "seed=3", "train.max_steps=5", "sampling.temperature=0.9", "name=mine", "ppo.steps=2", "eval.limit=null",
    "model=qwen3b", "data.system=null", "teacher.dtype=bfloat16", "checkpoint.background=true", "data.options={a: 1}",
    "optim.betas=[0.9,0.99]",
)  # fmt: skip
PLAIN_VALUES = (
    "0", "1", "-1", "0.5", "1e-5", "1e999", "nan", "null", "true", "[]", "[1,2]", "{}", "{a: 1}", "''", "auto", "2" * 30, "x" * 300,
)  # fmt: skip
ODD_VALUES = (
    "[", "{", "'", '"', "${", "${name}", "${seed}", "${no.such}", "${oc.env:NOTHING}", "é", "日本", "\u202e", "\t", "a,b", "range(1,3)",
    "=", "\\",
)  # fmt: skip
LETTERS = string.ascii_lowercase + "._=+~-[]{}'\"$,: 1é"


def random_command_lines(draw: random.Random) -> Iterator[list[str]]:
    """Yield command lines between right and absurd."""
    options, groups = list(hooks.options()), hooks.group_choices()

    def text(longest: int) -> str:
        return "".join(draw.choices(LETTERS, k=draw.randrange(longest)))

    def value() -> str:
        return draw.choice([draw.choice(PLAIN_VALUES), draw.choice(ODD_VALUES), draw.choice(HOSTILE), text(12)])

    def typo(word: str) -> str:
        place = draw.randrange(len(word))
        return draw.choice([word[:place] + word[place + 1 :], word[:place] + draw.choice(LETTERS) + word[place:], word.upper()])

    words: list[tuple[float, Callable[[], str]]] = [  # with the share of words up to each
        (0.1, lambda: draw.choice(groups)),
        (0.4, lambda: draw.choice(VALID)),
        (0.5, lambda: typo(draw.choice(groups))),
        (0.7, lambda: f"{draw.choice(['', '', '', '+', '++', '~'])}{draw.choice(options)}={value()}"),
        (0.9, lambda: f"{typo(draw.choice(options))}={value()}"),
        (1.0, lambda: text(20)),
    ]
    while True:
        shares = [draw.random() for _ in range(draw.choice((1, 1, 2, 3)))]
        yield [next(word for most, word in words if share < most)() for share in shares]


def command_lines(times: int, root: Path) -> Tries:
    """Random command lines, every fiftieth through the whole command.

    Each is composed, or refused in one line with a remedy; no traceback.
    """
    composed = 0
    os.chdir(root)
    with hooks.cached_yaml():
        for number, words in zip(range(times), random_command_lines(random.Random(4)), strict=False):
            problem, is_composed = through_the_command(words) if number % 50 == 0 else compose(words)
            composed += is_composed
            yield Try(" ".join(words), True, problem)
    return f"{composed} composed"


def compose(words: Sequence[str]) -> tuple[str | None, bool]:
    """Return what is wrong with how a command line is handled, or None, and whether it composed."""
    try:
        hooks.compose_config(words)
    except OpdError as error:
        text = str(error)
        expected = error.exit_code == USAGE and len(text) > 10 and "Traceback" not in text
        return (None if expected else f"exit code {error.exit_code}: {text}"), False
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a problem
        return f"{type(error).__name__}: {error}", False
    return None, True


def through_the_command(words: Sequence[str]) -> tuple[str | None, bool]:
    errors = io.StringIO()
    quiet = ["hydra.output_subdir=null", "hydra/job_logging=errors", "hydra/hydra_logging=none"]
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = hooks.command([*words, *quiet])
    text = errors.getvalue()
    expected = code in (USAGE, 74) and text.startswith("opd: error: ") and len(text.strip().splitlines()) == 1
    return (None if code == 0 or expected else f"exit code {code}: {text[-300:]}"), code == 0


def hostile_values(times: int, root: Path) -> Tries:
    """Option values that are code somewhere.

    Nothing is called, as the interpreter's audit events show.
    """
    draw = random.Random(5)
    os.chdir(root)
    calls: list[str] = []
    watching = False

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in CALLS:
            calls.append(f"{event} {args}")

    sys.addaudithook(watch)
    keys = [key for key, kind in hooks.options().items() if kind in (str, str | None)]
    keys += ["data.options.x", "data.chat_template_kwargs.x", "model._target_", "_target_", "hydra.sweeper.x"]
    with hooks.cached_yaml():
        for number in range(times):
            value, key = HOSTILE[number % len(HOSTILE)], draw.choice(keys)
            quoted = '"' not in value and draw.random() < 0.5
            word = f'{draw.choice(["", "+"])}{key}="{value}"' if quoted else f"{key}={value}"
            calls.clear()
            watching = True
            problem, _ = compose(["experiment=debug", word])
            watching = False
            if calls or (root / "pwned").exists():
                problem = f"called: {calls or 'the file is there'}"
            yield Try(word, True, problem)
    return None


def refused(folder: Path, words: Sequence[str], code: int, part: str, fault: Fault | None = None) -> str | None:
    """Return None if a run ends with the exit code and one line that contains `part`."""
    ended = run(folder, words, fault)
    lines = [line for line in ended.output.splitlines() if line.startswith("opd: ")]
    expected = ended.code == code and len(lines) == 1 and part in lines[0] and "Traceback" not in ended.output
    return None if expected else f"instead of {code} and {part!r}: {ended}"


@each_try
def outside(number: int, folder: Path, root: Path) -> Try:
    """Names and links that leave the output folder; code in checkpoints, model folders and chat templates.

    Refused or ignored, and no code runs.
    """
    names = [f"name='{name}'" for name in ("../x", "a/../../x", "/tmp/x", "..", "~/x", "a\\0b")]
    faults = ["linked folder", "pickle in a checkpoint", "code in a model", "endless chat template", "escaping chat template", *names]
    fault = faults[number % len(faults)]
    if fault in names:
        problem = refused(folder, [*RUN, fault], 64, "name")
    elif fault == "linked folder":
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        (folder / "runs/run").mkdir(parents=True)
        (folder / "runs/run/checkpoints").symlink_to(elsewhere)
        problem = refused(folder, RUN, 74, "checkpoints") or ("the linked folder was used" if any(elsewhere.iterdir()) else None)
    elif fault == "pickle in a checkpoint":
        words = [*RUN, "train.max_steps=3"]
        assert finish(folder, words) is None
        (folder / "runs/run/status.json").write_text('{"status": "failed"}')
        newest = valid_checkpoints(folder)[-1]
        (newest / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
        (newest / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
        problem = resume_to_reference(folder, words)
    elif fault == "code in a model":
        student = copy_model(folder, "student")
        config = json.loads((student / "config.json").read_text())
        config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (student / "config.json").write_text(json.dumps(config))
        (student / "code.py").write_text("open('pwned', 'w')\n")
        problem = refused(folder, [*RUN, "model.path=./student"], 64, "model.path")
    elif fault == "endless chat template":
        loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
        for role in ("student", "teacher"):
            (copy_model(folder, role) / "chat_template.jinja").write_text(loops)
        words = [*RUN, "model.path=./student", "teacher.path=./teacher"]
        problem = refused(folder, words, 65, "chat template", lambda: hooks.limit_chat_template(1.0))
    else:
        attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch pwned') }}"
        (copy_model(folder, "student") / "chat_template.jinja").write_text(attack)
        problem = refused(folder, [*RUN, "model.path=./student"], 65, "chat template")
    return Try(fault, True, "the injected code ran" if (folder / "pwned").exists() else problem)


def copy_model(folder: Path, role: str) -> Path:
    return Path(shutil.copytree(PACKAGE / f"assets/tiny-{role}", folder / role))


class Bomb:
    """Creates the file `pwned` when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


GOOD = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10, 22)]
# Training rows (text as it is, None for no file), options, exit code, and a part of the message.
DATA: dict[str, tuple[Sequence[object] | None, list[str], int, str]] = {
    "no such file": (None, [], 65, "train.jsonl"),
    "an empty file": ([], [], 65, "train.jsonl"),
    "not JSON": (["this is not JSON\n"], [], 65, "train.jsonl"),
    "cut short": ([*GOOD, '{"prompt": "1'], [], 65, "train.jsonl"),
    "no such column": ([{"question": "1+1=", "answer": "2"}], [], 65, "prompt"),
    "a prompt that is null": ([*GOOD, {"prompt": None, "answer": "2"}], [], 65, "row 12"),
    "a prompt that is a number": ([{"prompt": i, "answer": "2"} for i in range(12)], [], 65, "row 0"),
    "prompts that are too long": (GOOD, ["data.max_prompt_tokens=2"], 65, "data.max_prompt_tokens=2"),
    "training answers that are null": ([{**row, "answer": None} for row in GOOD], [], 0, ""),
    "a row of 50 MB": ([*GOOD, {"prompt": "1" * 50_000_000, "answer": "2"}], [], 0, ""),
    "text that is HTML": ([*GOOD, {"prompt": "<script>alert(1)</script>", "answer": "<b>"}], [], 0, ""),
    "all completions truncated": (GOOD, ["sampling.max_new_tokens=1"], 0, ""),
    "fewer prompts than a step takes": (GOOD[:2], [], 0, ""),
}


@each_try
def data(number: int, folder: Path, root: Path) -> Try:
    """Broken data files and rows.

    Each has its defined outcome: 0, or 65 with the place in one line.
    """
    what = list(DATA)[number % len(DATA)]
    rows, options, code, part = DATA[what]
    (folder / "train.jsonl").unlink()
    if rows is not None:
        (folder / "train.jsonl").write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    words = [*RUN, "train.max_steps=2", *options]
    return Try(what, True, finish(folder, words) if code == 0 else refused(folder, words, code, part))


@each_try
def vocabularies(number: int, folder: Path, root: Path) -> Try:
    """A teacher with permuted token ids, and with a padded output layer, in turn.

    The first is refused with the tokens that differ; the second is cut to the common width.
    """
    teacher, words = copy_model(folder, "teacher"), [*RUN, "train.max_steps=2", "teacher.path=./teacher"]
    if number % 2 == 0:
        content = json.loads((teacher / "tokenizer.json").read_text())
        ids = content["model"]["vocab"]
        ids["1"], ids["2"] = ids["2"], ids["1"]
        (teacher / "tokenizer.json").write_text(json.dumps(content))
        return Try("permuted ids", True, refused(folder, words, 64, "'1'"))
    config, tensors = json.loads((teacher / "config.json").read_text()), load_file(teacher / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.shape[0] == config["vocab_size"] and ("embed" in name or "lm_head" in name):
            tensors[name] = torch.cat((tensor, tensor.new_zeros(8, *tensor.shape[1:])))
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    (teacher / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    return Try("a padded output layer", True, finish(folder, words))


REWARD = "import opd\n\n\n@opd.reward\ndef evaluate(completion, answer):\n    return float(eval(completion) == eval(answer))\n"
ANSWERS = (
    "2**" * 6 + "2", "9**9**9**9", "(" * 5000 + ")" * 5000, "__import__('os').system('touch pwned')", "<script>alert(1)</script>",
    "\\frac{1}{" * 300, "x^{" * 300, "1" * 100_000, "\\boxed{" * 2000, "\0\0\0", "${jndi:ldap://x}", "$10^{10^{10^{10}}}$",
)  # fmt: skip


def answers(times: int, root: Path) -> Tries:
    """Answers that hang a reward or fill its memory: under every built-in reward and, last, under one that evaluates them.

    Each is judged, or given up within the limits of time and memory.
    """
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    (root / "reward.py").write_text(REWARD)
    names = ["exact", "number", *(["math"] if find_spec("math_verify") else [])]
    with contextlib.ExitStack() as stack:
        graders = [stack.enter_context(make_grader(name, seconds=2.0, memory_mib=512)) for name in names]
        for number in range(times - 1):
            name, grader, answer = names[number % len(names)], graders[number % len(names)], ANSWERS[number // len(names) % len(ANSWERS)]
            begin = time.monotonic()
            (reward,) = grader.grade([{"completion": answer, "answer": "2"}])
            seconds = time.monotonic() - begin
            expected = seconds < 10 and reward in (0.0, 1.0, None) and not (root / "pwned").exists()
            yield Try(f"{name}: {answer[:30]}", True, None if expected else f"{reward} after {seconds:.1f} s")
    with make_grader("reward:evaluate", seconds=2.0, memory_mib=512) as grader:
        begin = time.monotonic()
        rewards = grader.grade([{"completion": text, "answer": "2"} for text in ("9**9**9", "[0] * 10**12", "2")])
        seconds = time.monotonic() - begin
        expected = rewards == [None, None, 1.0] and seconds < 20
        yield Try("a reward that evaluates", grader.not_judged == 2, None if expected else f"{rewards} after {seconds:.1f} s")
    return None
