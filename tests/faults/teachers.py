"""Served teachers that are, or become, the wrong one."""

import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fake_vllm import ScoringServer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from faults import hooks
from faults.harness import RUN, Tries, Try, new_folder, resume_to_reference, run, status, valid_checkpoints, wait_until
from opd.config.compose import PACKAGE

Answer = dict[str, Any]

FAULTY_FROM = 4  # steps done
SHORT = 8  # tokens, of a server whose limit is too low
NOISE = 4.0  # nats, of one that never gives the same scores
WRONG = Path("wrong.txt")  # in the folder of all tries: while it exists, the server is wrong in the way that it names


class Kind(NamedTuple):
    """A way of being wrong.

    Attributes:
        from_start: whether from the start of the run, else after `FAULTY_FROM` steps.
        has_weights: whether the right teacher's weights are at `teacher.path`, else its tokenizer alone.
        is_told: whether the run only has to say so.
    """

    from_start: bool = True
    has_weights: bool = False
    is_told: bool = False


KINDS = {
    "another model": Kind(from_start=False),
    "uniform from the start": Kind(),
    "null": Kind(from_start=False),
    "another model from the start": Kind(has_weights=True),
    "other tokens": Kind(),
    "too short": Kind(),
    "never the same": Kind(),
    "NaN": Kind(from_start=False),
    "the student": Kind(is_told=True),
    "short answers": Kind(from_start=False),
    "shuffled answers": Kind(from_start=False),
    "uniform": Kind(from_start=False),
}


def change_last(value: Any) -> Callable[[Answer, Any], None]:
    def change(answer: Answer, body: Any) -> None:
        answer["choices"][0]["prompt_logprobs"][-1][str(body["prompt"][-1])]["logprob"] = value

    return change


def edit_entries(edit: Callable[[list[Any]], object]) -> Callable[[Answer, Any], None]:
    return lambda answer, body: edit(answer["choices"][0]["prompt_logprobs"])  # type: ignore[return-value]


def add_noise(entries: list[Any]) -> None:
    for entry in entries[1:]:
        for value in entry.values():
            value["logprob"] -= random.uniform(0, NOISE)


ANSWERS: dict[str, Callable[[Answer, Any], None]] = {
    "null": change_last(None),
    "NaN": change_last(math.nan),
    "short answers": edit_entries(lambda entries: entries.pop()),
    "shuffled answers": edit_entries(lambda entries: entries.insert(1, entries.pop())),
    "never the same": edit_entries(add_noise),
}
MODELS = {
    "uniform": "uniform",
    "uniform from the start": "uniform",
    "another model": "base",
    "another model from the start": "base",
    "the student": "base",
}


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / name, dtype=torch.float32).eval()


def serve(root: Path) -> None:
    """Serve the bundled teacher, or what `WRONG` says instead. Never returns."""
    torch.set_num_threads(1)
    disable_progress_bar()
    models = {"": load("tiny-teacher"), "base": load("tiny-student"), "uniform": load("tiny-teacher")}
    models["uniform"].lm_head.weight.data = torch.zeros_like(models["uniform"].lm_head.weight)  # as after a wake-up without weights
    server = ScoringServer(models[""], AutoTokenizer.from_pretrained(PACKAGE / "assets/tiny-teacher"))

    def now() -> str:
        return (root / WRONG).read_text() if (root / WRONG).exists() else ""

    def respond(handler: Any, body: Any) -> None:
        wrong = now()
        server.model = models[MODELS.get(wrong, "")]
        if "prompt_logprobs" not in body:
            server.sample(handler, body)
            return
        answer = server.scores(body["prompt"], body["prompt_logprobs"])
        if wrong in ANSWERS and body["prompt_logprobs"] == 0:  # the canary, with 1, does not notice
            ANSWERS[wrong](answer, body)
        handler.reply(answer)

    def detokenize(handler: Any, body: Any) -> None:
        ids = body["tokens"][::-1] if now() == "other tokens" else body["tokens"]
        handler.reply({"prompt": server.tokenizer.decode(ids)})

    def list_models(handler: Any, body: Any) -> None:
        handler.reply({"data": [{"id": "teacher", "max_model_len": SHORT if now() == "too short" else 4096}]})

    server.answers |= {"/v1/completions": respond, "/detokenize": detokenize, "/v1/models": list_models}
    (root / "url.new").write_text(server.url)
    (root / "url.new").rename(root / "url.txt")
    server.serve_forever()


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Let a process of its own serve for the block: threads that compute would be lost in forked runs."""
    pid = os.fork()
    if pid == 0:
        try:
            serve(root)
        finally:
            sys.stderr.flush()
            os._exit(1)
    try:
        assert wait_until(lambda: (root / "url.txt").exists())
        yield (root / "url.txt").read_text()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wrong_teachers(times: int, root: Path) -> Tries:
    """A served teacher that is or becomes wrong: another model, uniform, noisy, the student, other tokens, a low limit, broken answers.

    The run ends with 76 and names the server, and what it saved is from before; with the right teacher it resumes, and final weights are
    bitwise those of an undisturbed run. That the teacher is the student it says in the log.
    """
    AutoTokenizer.from_pretrained(PACKAGE / "assets/tiny-teacher").save_pretrained(root / "tokenizer")
    with served(root) as url:
        shared = (word for word in RUN if not word.startswith("eval.kl_max_new_tokens="))  # a served teacher has no exact KL
        words = (*shared, f"teacher.url={url}", "teacher.timeout=5", "ppo.temperature=1", "eval.kl_prompts=0")
        for number in range(times):
            name, kind = list(KINDS.items())[number % len(KINDS)]
            own = words if kind.has_weights else (*words, f"teacher.path={root / 'tokenizer'}")
            yield one_teacher(name, kind, own, root)
    return None


def one_teacher(name: str, kind: Kind, words: Sequence[str], root: Path) -> Try:
    folder, wrong = new_folder(root, "run"), root / WRONG

    def become_wrong(step: int) -> None:
        if step == FAULTY_FROM:
            wrong.write_text(name)

    if kind.from_start:
        wrong.write_text(name)
    ended = run(folder, words, None if kind.from_start else lambda: hooks.before_steps(become_wrong))
    fired = wrong.exists()
    wrong.unlink(missing_ok=True)
    if kind.is_told:
        is_told = "they are the same model" in (folder / "runs/run/train.log").read_text()
        return Try(name, fired, ended.unless(0) or (None if is_told else "the log does not say that the teacher is the student"))
    problem = ended.unless(76)
    kept = [path.name for path in valid_checkpoints(folder)][-1:]
    if problem is None and "teacher.url" not in status(folder)["reason"]:
        problem = f"the reason is {status(folder)['reason']}"
    elif problem is None and kept != ([] if kind.from_start else [f"step_{FAULTY_FROM:06}"]):
        problem = f"the newest checkpoint is {kept}"
    return Try(name, fired, problem or resume_to_reference(folder, words))
