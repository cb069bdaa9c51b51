"""What goes wrong inside a running job: non-finite numbers, too little memory, a step that hangs, a second writer, a changed run."""

import os
import shutil
import signal
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from faults import hooks
from faults.harness import (
    RUN,
    Try,
    each_try,
    final_digest,
    final_weights,
    finish,
    new_folder,
    reference,
    resume_to_reference,
    run,
    start,
    status,
    valid_checkpoints,
    wait_until,
)  # fmt: skip
from opd.config.compose import PACKAGE

ONE_INNER_STEP = (*RUN, "ppo.steps=1")


@each_try
def not_finite(number: int, folder: Path, root: Path) -> Try:
    """NaN or infinity in loss, gradient or teacher log-probs of one update.

    That update is skipped, with weights and optimizer bitwise unchanged; the log names the samples.
    """
    kind, place = ("nan", "inf", "loss", "gradient")[number % 4], 1 + number * 5 % 9
    ended = run(folder, ONE_INNER_STEP, lambda: hooks.corrupt_numbers(kind, lambda count: count == place))
    record = folder / "updates.txt"
    updates = record.read_text().splitlines() if record.exists() else []
    problem = ended.unless(0)
    if updates != ["applied changed"] * (place - 1) + ["skipped unchanged"] + ["applied changed"] * (9 - place):
        problem = problem or f"updates {updates}"
    elif "sample ids" not in (folder / "runs/run/train.log").read_text():
        problem = problem or "the log does not name the samples"
    return Try(f"{kind} in update {place}", len(updates) >= place, problem)


@each_try
def rewinds(number: int, folder: Path, root: Path) -> Try:
    """NaN teacher log-probs, in turn for half of the samples of an epoch and in every update after the fourth.

    The run rewinds and continues without those samples, with the same weights when it is killed on the way; or ends with 77 and a usable
    checkpoint.
    """
    if number % 2:
        ended = run(folder, ONE_INNER_STEP, lambda: hooks.corrupt_numbers("nan", lambda count: count > 4))
        expected = ended.code == status(folder)["exit_code"] == 77 and valid_checkpoints(folder)
        return Try(f"{number}: after update 4", ended.code != 0, None if expected else str(ended))

    def fault() -> None:
        hooks.lose_teacher_scores(epoch=1, samples=lambda sample_id: sample_id % 2 == 0)

    words = (*ONE_INNER_STEP, "train.max_steps=12", "checkpoint.every=2")
    problem = run(folder, words, fault).unless(0)
    if problem is None and len(left_out := hooks.left_out_samples(valid_checkpoints(folder)[-1])) != 6:
        problem = f"left out {left_out}"
    if problem is None:
        other = new_folder(root, "killed")
        [child] = start(other, words, 1, fault)
        time.sleep(0.6 + 0.125 * number)
        child.kill(signal.SIGKILL)
        child.wait()
        problem = run(other, words, fault).unless(0)
        if problem is None and final_digest(other) != final_digest(folder):
            problem = "killed and resumed, final weights differ"
    return Try(f"{number}: half of an epoch", (folder / hooks.FIRED).exists(), problem)


@each_try
def out_of_memory(number: int, folder: Path, root: Path) -> Try:
    """Memory for a third of a batch, in turn in one process and in one of two.

    All processes take smaller micro-batches, also after a resume; final weights are within 1e-5 of those of an undisturbed run.
    """
    words, processes = (*RUN, "optim.eps=1e-3"), 1 + number % 2
    ended = [child.wait() for child in start(folder, words, processes, lambda: hooks.limit_memory(50))]
    problem = next((str(one) for one in ended if one.code != 0), None)
    if problem is None and hooks.max_tokens(valid_checkpoints(folder)[-1]) > 100:
        problem = "the smaller micro-batches are not in the checkpoint"
    elif problem is None and "out of memory" not in (folder / "runs/run/train.log").read_text():
        problem = "it is not in the log"
    elif problem is None:
        one, other = final_weights(folder), reference(words, processes).weights
        gap = max(float((one[name] - other[name]).abs().max()) for name in one)
        problem = None if gap < 1e-5 else f"final weights differ by {gap}"
    return Try(f"{number}: {processes} processes", (folder / hooks.FIRED).exists(), problem)


@each_try
def hangs(number: int, folder: Path, root: Path) -> Try:
    """A step that never ends.

    The watchdog writes the stacks of all threads and ends the run with 70; resumed, final weights are bitwise those of an undisturbed run.
    """

    def hang(step: int) -> None:
        if step == 3:
            hooks.FIRED.touch()
            time.sleep(1000)

    problem = run(folder, [*RUN, "train.watchdog_minutes=0.2"], lambda: hooks.before_steps(hang)).unless(70)
    stacks = folder / "runs/run/stacks.txt"
    if status(folder)["exit_code"] != 70:
        problem = problem or f"status {status(folder)}"
    elif not stacks.is_file() or "in hang" not in stacks.read_text():
        problem = problem or "no stacks of the threads"
    return Try(f"number {number}", (folder / hooks.FIRED).exists(), problem or resume_to_reference(folder))


@each_try
def second_writers(number: int, folder: Path, root: Path) -> Try:
    """The same command while the run is going, which then in turn finishes and is killed.

    The second ends with 74; final weights of the first are bitwise those of an undisturbed run.
    """
    [first] = start(folder)
    assert wait_until(lambda: valid_checkpoints(folder))
    first.kill(signal.SIGSTOP)
    problem = run(folder).unless(74)
    first.kill(signal.SIGCONT)
    if number % 2:
        first.kill(signal.SIGKILL)
        first.wait()
    else:
        problem = problem or first.wait().unless(0)
    return Try(f"{number}: {'killed' if number % 2 else 'finished'}", True, problem or resume_to_reference(folder))


@each_try
def second_interrupts(number: int, folder: Path, root: Path) -> Try:
    """Ctrl-C twice.

    The run ends with 130 within five seconds.
    """

    def hang_in_save() -> None:
        hooks.FIRED.touch()
        time.sleep(60)

    [child] = start(folder, RUN, 1, lambda: hooks.before_saves(hang_in_save))
    fired = wait_until((folder / hooks.FIRED).exists)
    child.kill(signal.SIGINT)
    time.sleep(0.1)
    child.kill(signal.SIGINT)
    begin = time.monotonic()
    problem = child.wait().unless(130)
    seconds = time.monotonic() - begin
    return Try(f"number {number}", fired, problem or (None if seconds < 5 else f"after {seconds:.1f} s"))


@each_try
def changed(number: int, folder: Path, root: Path) -> Try:
    """Another option, training row, tokenizer or teacher on resuming, in turn.

    The run ends with 64 and names what differs; `resume_force=true` continues and logs it.
    """
    for role in ("student", "teacher"):
        shutil.copytree(PACKAGE / "assets" / f"tiny-{role}", folder / role)
    words = [*RUN, "model.path=student", "teacher.path=teacher"]

    def stop(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    problem = run(folder, words, lambda: hooks.before_steps(stop)).unless(75)
    kind = ("optim.lr", "training data", "tokenizer", "teacher")[number % 4]
    if kind == "optim.lr":
        words.append("optim.lr=2e-4")
    elif kind == "training data":
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join([*lines[:-1], '{"prompt": "11+11=", "answer": "22"}\n']))
    elif kind == "tokenizer":
        for role in ("student", "teacher"):
            file = folder / role / "chat_template.jinja"
            file.write_text(file.read_text() + " ")
    else:
        file = folder / "teacher/model.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 0.01
        save_file(tensors, file, {"format": "pt"})
    refused = run(folder, words)
    problem = problem or refused.unless(64) or (None if kind in refused.output else f"{kind} is not named: {refused}")
    problem = problem or finish(folder, [*words, "resume_force=true"])
    if problem is None and kind not in (folder / "runs/run/train.log").read_text():
        problem = f"{kind} is not in the log"
    return Try(kind, True, problem)
