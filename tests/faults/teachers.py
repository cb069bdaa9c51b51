"""Served teachers that are, or become, the wrong one."""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fake_vllm import ScoringServer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from faults import hooks
from faults.harness import RUN, Tries, Try, new_folder, resume_to_reference, run, status, valid_checkpoints, wait_until
from opd.config.compose import PACKAGE

Answer = dict[str, Any]

FAULTY_FROM = 4  # steps done
WRONG = Path("wrong.txt")  # in the folder of all tries: while it exists, the server is wrong in the way that it names


def change_last(value: Any) -> Callable[[Answer, Any], None]:
    def change(answer: Answer, body: Any) -> None:
        answer["choices"][0]["prompt_logprobs"][-1][str(body["prompt"][-1])]["logprob"] = value

    return change


def edit_entries(edit: Callable[[list[Any]], object]) -> Callable[[Answer, Any], None]:
    return lambda answer, body: edit(answer["choices"][0]["prompt_logprobs"])  # type: ignore[return-value]


ANSWERS: dict[str, Callable[[Answer, Any], None]] = {
    "null": change_last(None),
    "NaN": change_last(math.nan),
    "short": edit_entries(lambda entries: entries.pop()),
    "shuffled": edit_entries(lambda entries: entries.insert(1, entries.pop())),
}
MODELS = ("uniform", "base")
KINDS = ("uniform", "null", "base", "NaN", "short", "shuffled", "other from the start")


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / name, dtype=torch.float32).eval()


def serve(root: Path) -> None:
    """Serve the bundled teacher, or what `WRONG` says instead. Never returns."""
    torch.set_num_threads(1)
    disable_progress_bar()
    models = {"": load("tiny-teacher"), "base": load("tiny-student"), "uniform": load("tiny-teacher")}
    models["uniform"].lm_head.weight.data = torch.zeros_like(models["uniform"].lm_head.weight)  # as after a wake-up without weights
    server = ScoringServer(models[""], AutoTokenizer.from_pretrained(PACKAGE / "assets/tiny-teacher"))

    def respond(handler: Any, body: Any) -> None:
        wrong = (root / WRONG).read_text() if (root / WRONG).exists() else ""
        server.model = models["base" if wrong == "other from the start" else wrong if wrong in MODELS else ""]
        if "prompt_logprobs" not in body:
            server.sample(handler, body)
            return
        answer = server.scores(body["prompt"])
        if wrong in ANSWERS:
            ANSWERS[wrong](answer, body)
        handler.reply(answer)

    server.answers["/v1/completions"] = respond
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
    """A served teacher that becomes uniform, another model, or answers null, NaN, too little or shuffled; or is another from the start.

    The run ends with 76 and names the server, and what it saved is from before; with the right teacher it resumes, and final weights are
    bitwise those of an undisturbed run.
    """
    with served(root) as url:
        words = (*RUN, f"teacher.url={url}", "teacher.timeout=5", "ppo.temperature=1", "eval.kl_prompts=0")
        for number in range(times):
            kind = KINDS[number % len(KINDS)]
            folder, wrong = new_folder(root, "run"), root / WRONG
            from_start = kind == KINDS[-1]

            def become_wrong(step: int, kind: str = kind, wrong: Path = wrong) -> None:
                if step == FAULTY_FROM:
                    wrong.write_text(kind)

            if from_start:
                wrong.write_text(kind)
            ended = run(folder, words, lambda act=become_wrong: hooks.before_steps(act))  # type: ignore[misc]
            fired = wrong.exists()
            wrong.unlink(missing_ok=True)
            problem = ended.unless(76)
            kept = len(valid_checkpoints(folder)) and valid_checkpoints(folder)[-1].name
            if problem is None and "teacher.url" not in status(folder)["reason"]:
                problem = f"the reason is {status(folder)['reason']}"
            elif problem is None and kept != (0 if from_start else f"step_{FAULTY_FROM:06}"):
                problem = f"the newest checkpoint is {kept}"
            yield Try(kind, fired, problem or resume_to_reference(root, folder, words))
    return None
