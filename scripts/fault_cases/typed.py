"""What users type, or files say: command lines of all kinds, secrets, names and links, code in places where data belong, broken data."""

import contextlib
import copy
import functools
import io
import json
import os
import pickle
import random
import string
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from fault_cases.harness import RUN, Outcome, end_alike, finish, fresh, start, valid
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from opd.cli import hydra_app as entry
from opd.cli import hydra_errors as mistakes
from opd.config import compose as store
from opd.config import secrets
from opd.errors import USAGE, OpdError
from opd.runs.text import one_line

# What must not happen while a config is composed: https://docs.python.org/3/library/audit_events.html
CALLS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect", "os.fork", "os.remove")
HOSTILE = (
    "__import__('os').system('touch pwned')", "{_target_: os.system, command: touch pwned}", "$(touch pwned)", "`touch pwned`",
    "!!python/object/apply:os.system [touch pwned]", "${eval:__import__('os').system('touch pwned')}", "${oc.decode:'!!python/name:os'}",
    "{_target_: builtins.eval, _args_: [\"open('pwned','w')\"]}", "os:system", "{_target_: torch.hub.load, repo_or_dir: a/b, model: c}",
    "; touch pwned", "| touch pwned", "{_partial_: true, _target_: subprocess.call}", "${oc.create:{_target_: os.abort}}", "../../pwned",
    "file:///etc/passwd", "${hydra:runtime.cwd}/../pwned", "lambda: open('pwned','w')", "\"'; import os; os.system('touch pwned') #\"",
    "cos\\nsystem\\n(S'touch pwned'\\ntR.",
)  # fmt: skip


RIGHT = (
    "optim.lr=2e-5", "seed=3", "train.max_steps=5", "sampling.temperature=0.9", "name=mine", "ppo.steps=2", "eval.limit=null",
    "model=qwen3b", "data.system=null", "teacher.dtype=bfloat16", "checkpoint.background=true", "data.options={a: 1}",
    "optim.betas=[0.9,0.99]",
)  # fmt: skip


def command_lines(draw: random.Random) -> Iterator[list[str]]:
    """Command lines between right and absurd."""
    options = list(mistakes.options())
    groups = [f"{group}={name}" for group, names in mistakes.choices().items() if group != "hydra" for name in names]
    plain = [
        "0",
        "1",
        "-1",
        "0.5",
        "1e-5",
        "1e999",
        "nan",
        "null",
        "true",
        "[]",
        "[1,2]",
        "{}",
        "{a: 1}",
        "''",
        "auto",
        "2" * 30,
        "x" * 300,
    ]
    odd = [
        "[",
        "{",
        "'",
        '"',
        "${",
        "${name}",
        "${seed}",
        "${no.such}",
        "${oc.env:NOTHING}",
        "é",
        "日本",
        "\u202e",
        "\t",
        "a,b",
        "range(1,3)",
        "=",
        "\\",
    ]
    letters = string.ascii_lowercase + "._=+~-[]{}'\"$,: 1é"

    def value() -> str:
        return draw.choice(
            [draw.choice(plain), draw.choice(odd), draw.choice(HOSTILE), "".join(draw.choices(letters, k=draw.randrange(12)))]
        )

    def typo(word: str) -> str:
        place = draw.randrange(len(word))
        return draw.choice([word[:place] + word[place + 1 :], word[:place] + draw.choice(letters) + word[place:], word.upper()])

    def word() -> str:
        kind = draw.random()
        if kind < 0.1:
            return draw.choice(groups)
        if kind < 0.4:
            return draw.choice(RIGHT)
        if kind < 0.5:
            return typo(draw.choice(groups))
        if kind < 0.7:
            return f"{draw.choice(['', '', '', '+', '++', '~'])}{draw.choice(options)}={value()}"
        if kind < 0.9:
            return f"{typo(draw.choice(options))}={value()}"
        return "".join(draw.choices(letters, k=draw.randrange(1, 20)))

    while True:
        yield [word() for _ in range(draw.choice((1, 1, 2, 3)))]


def fuzzed(times: int, root: Path) -> Outcome:
    """Composed, or refused with one line that says what to do; every fiftieth through the whole command."""
    outcome, draw, composed = Outcome(), random.Random(4), 0
    os.chdir(root)
    store.register()
    source = FileConfigSource.load_config
    cached = functools.cache(source)
    FileConfigSource.load_config = lambda self, path: copy.deepcopy(cached(self, path))  # type: ignore[method-assign]
    try:
        for number, words in zip(range(times), command_lines(draw), strict=False):
            if number % 50 == 49:
                problem, right = through_the_command(words)
            else:
                problem, right = compose(words)
            composed += right
            outcome.add(" ".join(words), True, problem)
    finally:
        FileConfigSource.load_config = source  # type: ignore[method-assign]
    outcome.note = f"{composed} composed, {outcome.tried - composed} refused with a remedy; no traceback"
    return outcome


def compose(words: Sequence[str]) -> tuple[str | None, bool]:
    """What is wrong with how a command line ends, if anything, and whether it composed."""

    def work() -> None:
        secrets.refuse_in_words(words)
        mistakes.refuse_lists_of_choices(words)
        with hydra.initialize_config_dir(str(store.conf_dir()), version_base="1.3"):
            found = hydra.compose("config", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(found)
        assert isinstance(found, DictConfig)
        str(found.hydra.run.dir)
        with open_dict(found):
            found.pop("hydra")
        store.to_config(found)

    try:
        mistakes.explained(work)
    except OpdError as error:
        text = one_line(str(error))
        right = error.exit_code == USAGE and len(text) > 10 and "Traceback" not in text
        return (None if right else f"exit code {error.exit_code}: {text}"), False
    except BaseException as error:  # noqa: BLE001 - that is what must not happen
        return f"{type(error).__name__}: {error}", False
    return None, True


def through_the_command(words: Sequence[str]) -> tuple[str | None, bool]:
    said, printed = io.StringIO(), io.StringIO()
    quiet = ["hydra.output_subdir=null", "hydra/job_logging=errors", "hydra/hydra_logging=none"]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code = entry.run_verb(lambda config, folder: None, [*words, *quiet])
    text = said.getvalue()
    if code == 0:
        return None, True
    right = code in (USAGE, 74) and "Traceback" not in text and text.startswith("opd: error: ") and len(text.strip().splitlines()) == 1
    return (None if right else f"exit code {code}: {text[-300:]}"), False


def hostile(times: int, root: Path) -> Outcome:
    """Values that are code somewhere: none of it is called. Shown by the interpreter's own audit events, and the file it would make."""
    outcome, draw = Outcome(), random.Random(5)
    os.chdir(root)
    store.register()
    happened: list[str] = []
    watching = False

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in CALLS:
            happened.append(f"{event} {args}")

    sys.addaudithook(watch)
    texts = [key for key, kind in mistakes.options().items() if kind in (str, str | None)]
    for number in range(times):
        text = HOSTILE[number % len(HOSTILE)]
        key = draw.choice([*texts, "data.options.x", "data.chat_template_kwargs.x", "model._target_", "_target_", "hydra.sweeper.x"])
        quoted = f'{draw.choice(["", "+"])}{key}="{text}"' if '"' not in text and draw.random() < 0.5 else f"{key}={text}"
        happened.clear()
        watching = True
        problem, _ = compose(["experiment=debug", quoted])
        watching = False
        if happened or (root / "pwned").exists():
            problem = f"called: {happened or 'the file is there'}"
        outcome.add(quoted, True, problem)
    return outcome


def refused(folder: Path, words: Sequence[str], code: int, part: str) -> str | None:
    """None when a run ends with the exit code and one line in which `part` stands."""
    ended = start(folder, words, 1)[0].wait()
    lines = [line for line in ended.text.splitlines() if line.startswith("opd: ")]
    if ended.code != code or len(lines) != 1 or part not in lines[0] or "Traceback" in ended.text:
        return f"exit code {ended.code} in place of {code}: {ended.text.strip()[-400:]}"
    return None


def outside(times: int, root: Path) -> Outcome:
    """Names and links that lead out of the output folder; code that a checkpoint or a model folder brings along."""
    from opd.config.compose import PACKAGE

    outcome = Outcome()
    tries: dict[str, Callable[[Path], str | None]] = {}
    names: dict[str, Callable[[Path], str | None]] = {}
    for name in ("../x", "a/../../x", "/tmp/x", "..", "~/x", "a\\0b"):
        names[f"name={name}"] = lambda folder, name=name: refused(folder, [*RUN, f"name='{name}'"], 64, "name")

    def linked(folder: Path) -> str | None:
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        (folder / "runs/run").mkdir(parents=True)
        (folder / "runs/run/checkpoints").symlink_to(elsewhere)
        return refused(folder, RUN, 74, "outside of") or ("written elsewhere" if any(elsewhere.iterdir()) else None)

    def pickled(folder: Path) -> str | None:
        assert finish(folder, [*RUN, "train.max_steps=3"]) is None
        (folder / "runs/run/status.json").write_text('{"status": "failed"}')
        newest = folder / "runs/run/checkpoints" / valid(folder)[-1]
        (newest / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
        (newest / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
        problem = end_alike(root, folder, [*RUN, "train.max_steps=3"])
        return problem or ("the pickle ran" if (folder / "pwned").exists() else None)

    def automatic(folder: Path) -> str | None:
        import shutil

        shutil.copytree(PACKAGE / "assets/tiny-student", folder / "student")
        config = json.loads((folder / "student/config.json").read_text())
        config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
        (folder / "student/config.json").write_text(json.dumps(config))
        (folder / "student/code.py").write_text("open('pwned', 'w')\n")
        problem = refused(folder, [*RUN, "model.path=./student"], 64, "model.path")
        return problem or ("the code ran" if (folder / "pwned").exists() else None)

    def endless(folder: Path) -> str | None:
        import shutil

        for role in ("student", "teacher"):
            shutil.copytree(PACKAGE / f"assets/tiny-{role}", folder / role)
            loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
            (folder / role / "chat_template.jinja").write_text(loops)
        return refused_in_time(folder, [*RUN, "model.path=./student", "teacher.path=./teacher"])

    def escaping(folder: Path) -> str | None:
        import shutil

        shutil.copytree(PACKAGE / "assets/tiny-student", folder / "student")
        attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch pwned') }}"
        (folder / "student/chat_template.jinja").write_text(attack)
        problem = refused(folder, [*RUN, "model.path=./student"], 65, "chat template")
        return problem or ("the template ran code" if (folder / "pwned").exists() else None)

    tries |= {
        "a linked output folder": linked,
        "a pickle in a checkpoint": pickled,
        "auto_map code": automatic,
        "an endless chat template": endless,
        "a chat template out of its sandbox": escaping,
        **names,
    }
    for number in range(times):
        what = list(tries)[number % len(tries)]
        outcome.add(what, True, tries[what](fresh(root, "outside")))
    return outcome


def refused_in_time(folder: Path, words: Sequence[str]) -> str | None:
    from opd.data import prompts

    def shorter() -> None:
        prompts.TEMPLATE_SECONDS = 1.0

    ended = start(folder, words, 1, shorter)[0].wait()
    return None if ended.code == 65 and "took too much" in ended.text else f"exit code {ended.code}: {ended.text.strip()[-300:]}"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def rows(*lines: object) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "train.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)) and None
    )


GOOD = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10, 22)]
DATA: dict[str, tuple[Callable[[Path], Any], list[str], int, str]] = {
    "no such file": (lambda folder: (folder / "train.jsonl").unlink(), [], 65, "there is no such file"),
    "an empty file": (rows(), [], 65, "empty"),
    "not JSON": (rows("this is not JSON\n"), [], 65, "cannot be read"),
    "cut short": (rows(*GOOD, '{"prompt": "1'), [], 65, "cannot be read"),
    "no such column": (rows({"question": "1+1=", "answer": "2"}), [], 65, "has no such column"),
    "a prompt that is null": (rows(*GOOD, {"prompt": None, "answer": "2"}), [], 65, "row 12"),
    "a prompt that is a number": (rows(*({"prompt": i, "answer": "2"} for i in range(12))), [], 65, "row 0"),
    "prompts over-long": (rows(*GOOD), ["data.max_prompt_tokens=2"], 65, "no training prompt is that short"),
    "null answers in training": (rows(*({**row, "answer": None} for row in GOOD)), [], 0, ""),
    "a row of 50 MB": (rows(*GOOD, {"prompt": "1" * 50_000_000, "answer": "2"}), [], 0, ""),
    "text that is HTML": (rows(*GOOD, {"prompt": "<script>alert(1)</script>", "answer": "<b>"}), [], 0, ""),
    "all completions truncated": (rows(*GOOD), ["sampling.max_new_tokens=1"], 0, ""),
    "fewer prompts than a step takes": (rows(*GOOD[:2]), [], 0, ""),
}  # fmt: skip


def data(times: int, root: Path) -> Outcome:
    """Files and rows that are not what they should be: each with its defined end."""
    outcome = Outcome()
    for number in range(times):
        what = list(DATA)[number % len(DATA)]
        make, options, code, part = DATA[what]
        folder = fresh(root, "data")
        make(folder)
        words = [*RUN, "train.max_steps=2", *options]
        outcome.add(what, True, finish(folder, words) if code == 0 else refused(folder, words, code, part))
    return outcome


def vocabularies(times: int, root: Path) -> Outcome:
    """A teacher with permuted ids is refused; output layers padded to other widths are cut."""
    import shutil

    from opd.config.compose import PACKAGE

    outcome = Outcome()
    for number in range(times):
        folder = fresh(root, "vocabulary")
        shutil.copytree(PACKAGE / "assets/tiny-teacher", folder / "teacher")
        if number % 2 == 0:
            file = folder / "teacher/tokenizer.json"
            content = json.loads(file.read_text())
            known = content["model"]["vocab"]
            one, other = (token for token in ("1", "2"))
            known[one], known[other] = known[other], known[one]
            file.write_text(json.dumps(content))
            outcome.add("permuted ids", True, refused(folder, [*RUN, "teacher.path=./teacher"], 64, "other ids"))
        else:
            widen(folder / "teacher")
            outcome.add("a padded output layer", True, finish(folder, [*RUN, "train.max_steps=2", "teacher.path=./teacher"]))
    return outcome


def widen(folder: Path) -> None:
    """Eight rows more in embeddings and output layer."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.shape[0] == size and ("embed" in name or "lm_head" in name):
            tensors[name] = torch.cat((tensor, torch.zeros(8, *tensor.shape[1:], dtype=tensor.dtype)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size + 8}))


REWARD = """
import opd, os, time

@opd.reward
def mine(completion, answer):
    return {body}
"""
ANSWERS = (
    "2**" * 6 + "2", "9**9**9**9", "(" * 5000 + ")" * 5000, "__import__('os').system('touch pwned')", "<script>alert(1)</script>",
    "\\frac{1}{" * 300, "x^{" * 300, "1" * 100_000, "\\boxed{" * 2000, "\0\0\0", "${jndi:ldap://x}", "$10^{10^{10^{10}}}$",
)  # fmt: skip


def answers(times: int, root: Path) -> Outcome:
    """Answers that hang or fill the memory of who judges them, under every built-in reward that is installed and one that evaluates."""
    from importlib.util import find_spec

    from opd.data.rewards import make_grader

    outcome = Outcome()
    os.chdir(root)
    sys.path.insert(0, str(root))
    (root / "hungry.py").write_text(REWARD.format(body="float(eval(completion) == eval(answer))"))
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    names = ["exact", "number", *(["math"] if find_spec("math_verify") else [])]
    for name in names:
        with make_grader(name, time_limit=2.0, memory_limit_mb=512) as grader:
            for number in range(max(1, times // len(names))):
                answer = ANSWERS[number % len(ANSWERS)]
                begin = time.monotonic()
                found = grader.grade([(answer, "2")])[0]
                took = time.monotonic() - begin
                wrong = took > 10 or found not in (0.0, 1.0, None) or (root / "pwned").exists()
                outcome.add(f"{name}: {answer[:30]}", True, f"{found} after {took:.1f} s" if wrong else None)
    with make_grader("hungry:mine", time_limit=2.0, memory_limit_mb=512) as grader:
        begin = time.monotonic()
        found = grader.grade([("9**9**9", "2"), ("[0] * 10**12", "2"), ("2", "2")])
        took = time.monotonic() - begin
        right = found == [0.0, 0.0, 1.0] and took < 20
        outcome.add("a reward that evaluates", grader.timeouts == 2, None if right else f"{found} after {took:.1f} s")
    return outcome
