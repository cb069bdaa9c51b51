"""What goes wrong inside a running job: numbers that are none, memory that runs out, a call that never returns, a second writer."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_cases.harness import RUN, Outcome, Sabotage, end_alike, finish, fresh, reference, reference_folder, start, status, valid, weights
from safetensors.torch import load_file

ONE_STEP = (*RUN, "ppo.steps=1")


def bent(kind: str, hit: Callable[[int], bool]) -> Sabotage:
    """Lets the numbers of the `hit` updates (from 1) be no numbers, and has it written down whether an update that is left out changed
    anything.
    """
    from opd.teachers import LocalTeacher
    from opd.training import update
    from opd.training.update import NotFinite, Update

    def sabotage() -> None:
        count = 0
        apply, logp, loss = Update.apply, LocalTeacher.logp, update.chunked_loss

        def applied(self: Update, *args: Any, **kwargs: Any) -> NotFinite | None:
            nonlocal count
            count += 1
            if hit(count) and kind == "gradient":
                next(iter(self.policy.parameters())).grad.view(-1)[0] = math.inf
            before = everything(self)
            problem = apply(self, *args, **kwargs)
            after = everything(self)
            same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
            with Path("updates.txt").open("a") as file:
                file.write(f"{'left out' if problem else 'taken'} {'unchanged' if same else 'changed'}\n")
            return problem

        def scored(self: LocalTeacher, *args: Any) -> torch.Tensor:
            found = logp(self, *args)
            if hit(count + 1) and kind in ("nan", "inf"):
                found[0] = math.nan if kind == "nan" else -math.inf
            return found

        def lost(*args: Any, **kwargs: Any) -> Any:
            value, stats = loss(*args, **kwargs)
            return (value * math.nan if hit(count + 1) and kind == "loss" else value), stats

        Update.apply = applied  # type: ignore[method-assign]
        LocalTeacher.logp = scored  # type: ignore[method-assign]
        update.chunked_loss = lost

    return sabotage


def everything(update: Any) -> dict[str, torch.Tensor]:
    from opd.training.checkpoint import model_tensors, optimizer_tensors

    found = {**model_tensors(update.policy), **optimizer_tensors(update.optimizer)}
    return {name: tensor.clone() for name, tensor in found.items()}


def not_finite(times: int, root: Path) -> Outcome:
    """NaN or infinity in loss, gradient or teacher scores, once: that update alone is left out, and nothing changes by it."""
    outcome = Outcome()
    kinds = ("nan", "inf", "loss", "gradient")
    for number in range(times):
        kind, place = kinds[number % 4], 1 + number * 5 % 9
        folder = fresh(root, "bent")
        [child] = start(folder, ONE_STEP, 1, bent(kind, lambda count, place=place: count == place))
        ended = child.wait()
        updates = (folder / "updates.txt").read_text().split("\n")[:-1] if (folder / "updates.txt").exists() else []
        left_out = [index for index, line in enumerate(updates, 1) if line.startswith("left out")]
        log = (folder / "runs/run/train.log").read_text()
        problem = None
        if ended.code != 0 or left_out != [place] or updates[place - 1] != "left out unchanged" or len(updates) != 9:
            problem = f"exit code {ended.code}, updates {updates}"
        elif "the update is left out (sample ids " not in log:
            problem = "the log does not name the samples"
        outcome.add(f"{kind} in update {place}", len(updates) >= place, problem)
    outcome.note = "weights and optimizer bitwise unchanged"
    return outcome


def stubborn() -> None:
    """A teacher that has no number for half of the samples of the second epoch."""
    from opd.training.batches import Batches

    score = Batches.scored

    def scored(self: Batches, current: Any) -> Any:
        found = score(self, current)
        for batch, scores in found:
            for index, rollout in enumerate(current.learnt):
                if rollout.request.epoch == 1 and rollout.request.prompt.sample_id % 2 == 0:
                    Path("fired.txt").write_text("")
                    scores.logp_N[batch.sequence_N == index] = math.nan
        return found

    Batches.scored = scored  # type: ignore[method-assign]


def rewinds(times: int, root: Path) -> Outcome:
    """Samples that three steps in a row cannot be learnt from are left out; also when the run is killed on the way; if all are, 77."""
    outcome = Outcome()
    words = (*ONE_STEP, "train.max_steps=12", "checkpoint.every=2")
    for number in range(times):
        folder, other = fresh(root, "stubborn"), fresh(root, "stubborn-killed")
        ended = start(folder, words, 1, stubborn)[0].wait()
        left_out = newest_state(folder)["trouble"]["left_out"] if ended.code == 0 else []
        problem = None if len(left_out) == 6 else f"exit code {ended.code}, left out {left_out}: {ended.text.strip()[-300:]}"
        if problem is None:
            [child] = start(other, words, 1, stubborn)
            time.sleep(0.6 + 0.25 * number)
            child.kill(signal.SIGKILL)
            child.wait()
            again = start(other, words, 1, stubborn)[0].wait()
            if again.code != 0 or weights(other) != weights(folder):
                problem = f"killed and continued: exit code {again.code}, or other weights"
        outcome.add(f"stubborn teacher {number}", (folder / "fired.txt").exists(), problem)
        hopeless = fresh(root, "hopeless")
        ended = start(hopeless, words, 1, bent("nan", lambda count: count > 4))[0].wait()
        right = ended.code == 77 and status(hopeless)["exit_code"] == 77 and bool(valid(hopeless))
        outcome.add(
            f"hopeless teacher {number}", ended.code != 0, None if right else f"exit code {ended.code}: {ended.text.strip()[-300:]}"
        )
    outcome.note = "gone back and on without them, killed on the way too; 77 where nothing helps"
    return outcome


def newest_state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/run/checkpoints" / valid(folder)[-1] / "state.json").read_text())
    return found


def little_memory(limit: int) -> Sabotage:
    """A device on which no more than `limit` tokens fit."""
    from opd.models.policy import Policy

    def sabotage() -> None:
        forward = Policy.forward

        def tried(self: Policy, inputs: Any, loss: Any) -> Any:
            if inputs.ids_BT.numel() > limit:
                Path("fired.txt").write_text("")
                raise torch.OutOfMemoryError("CUDA out of memory (made up)")
            return forward(self, inputs, loss)

        Policy.forward = tried  # type: ignore[method-assign]

    return sabotage


def out_of_memory(times: int, root: Path) -> Outcome:
    """Memory for a third of a batch, in one process of one or two: smaller micro-batches, the same gradients; kept on going on."""
    from opd.training import build

    outcome, words = Outcome(), (*RUN, "optim.weight_decay=0.0")  # a reference of its own
    build.ADAM_EPS = 1e-3  # also in the children, which are forks: at its default AdamW blows up rounding errors
    for number in range(times):
        processes = 1 + number % 2
        undisturbed = reference_folder(root, words, processes)
        folder = fresh(root, "memory")
        ended = [child.wait() for child in start(folder, words, processes, little_memory(50))]
        problem = None
        if any(one.code != 0 for one in ended):
            problem = f"exit codes {[one.code for one in ended]}: {ended[-1].text.strip()[-300:]}"
        elif not newest_state(folder)["choices"]["max_tokens"] <= 100:
            problem = "the choice is not in the checkpoint"
        elif "out of memory" not in (folder / "runs/run/train.log").read_text():
            problem = "it is not in the log"
        else:
            gap = difference(folder, undisturbed)
            problem = None if gap < 1e-5 else f"weights differ by {gap}"
        outcome.add(f"{processes} processes", (folder / "fired.txt").exists(), problem)
    build.ADAM_EPS = 1e-8
    outcome.note = "weights within 1e-5 of the run with enough memory"
    return outcome


def difference(one: Path, other: Path) -> float:
    mine, theirs = (load_file(folder / "runs/run/final/model.safetensors") for folder in (one, other))
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def hangs(times: int, root: Path) -> Outcome:
    """A step that never ends."""
    from opd.training.loop import Trainer

    def sabotage() -> None:
        train_step = Trainer.train_step

        def hang(self: Trainer) -> Any:
            if self.step == 3:
                Path("fired.txt").write_text("")
                time.sleep(1000)
            return train_step(self)

        Trainer.train_step = hang  # type: ignore[method-assign]

    outcome = Outcome()
    for number in range(times):
        folder = fresh(root, "hang")
        ended = start(folder, [*RUN, "train.watchdog_minutes=0.2"], 1, sabotage)[0].wait()
        stacks = folder / "runs/run/stacks.txt"
        problem = None
        if ended.code != 70 or status(folder)["exit_code"] != 70:
            problem = f"exit code {ended.code}, status {status(folder)}"
        elif not stacks.is_file() or "in hang" not in stacks.read_text():
            problem = "no stacks"
        outcome.add(f"hang {number}", (folder / "fired.txt").exists(), problem or end_alike(root, folder))
    return outcome


def second_writers(times: int, root: Path) -> Outcome:
    """The same command while the run is going: refused with 74; the run goes on. The lock goes with a killed process."""
    outcome = Outcome()
    for number in range(times):
        folder = fresh(root, "second")
        [first] = start(folder, RUN, 1)
        while not valid(folder):
            time.sleep(0.01)
        first.kill(signal.SIGSTOP)
        second = start(folder, RUN, 1)[0].wait()
        first.kill(signal.SIGCONT)
        problem = None
        if second.code != 74 or "another run writes here" not in second.text:
            problem = f"exit code {second.code}: {second.text.strip()[-300:]}"
        if number % 2:
            first.kill(signal.SIGKILL)
            first.wait()
            problem = problem or end_alike(root, folder)
        else:
            code = first.wait().code
            problem = problem or (None if code == 0 and weights(folder) == reference(root) else f"the first run ended with {code}")
        outcome.add(f"second writer {number}", True, problem)
    return outcome


def second_interrupts(times: int, root: Path) -> Outcome:
    """Ctrl-C twice leaves at once, without a save."""
    outcome = Outcome()
    for number in range(times):
        folder = fresh(root, "twice")

        def sabotage(folder: Path = folder) -> None:
            from opd.training.loop import Trainer

            def saving(self: Trainer, *args: Any, **kwargs: Any) -> Any:
                (folder / "fired.txt").write_text("")
                time.sleep(60)

            Trainer.save = saving  # type: ignore[method-assign]

        [child] = start(folder, RUN, 1, sabotage)
        while not (folder / "fired.txt").exists():
            time.sleep(0.01)
        child.kill(signal.SIGINT)
        time.sleep(0.1)
        child.kill(signal.SIGINT)
        began = time.monotonic()
        ended = child.wait()
        took = time.monotonic() - began
        right = ended.code == 130 and took < 5
        outcome.add(f"twice {number}", True, None if right else f"exit code {ended.code} after {took:.1f} s")
    return outcome


def changed(times: int, root: Path) -> Outcome:
    """Options, data, tokenizer or teacher that are not those the run began with: refused with what differs; `resume_force` goes on."""
    from opd.config.compose import PACKAGE

    outcome = Outcome()
    kinds = ("options", "training data", "tokenizer", "teacher")
    for number in range(times):
        kind, folder = kinds[number % 4], fresh(root, "changed")
        for role in ("student", "teacher"):
            shutil.copytree(PACKAGE / "assets" / f"tiny-{role}", folder / role)
        words = [*RUN, "model.path=student", "teacher.path=teacher"]
        stopped = start(folder, [*words], 1, stop_after(4))[0].wait()
        extra = change(kind, folder)
        refused = start(folder, [*words, *extra], 1)[0].wait()
        named = {"options": "optim.lr was 0.0001, is 0.0002"}.get(kind, f"{kind} changed")
        problem = None
        if stopped.code != 75:
            problem = f"exit code {stopped.code} on stopping"
        elif refused.code != 64 or named not in refused.text:
            problem = f"exit code {refused.code}: {refused.text.strip()[-300:]}"
        else:
            problem = finish(folder, [*words, *extra, "resume_force=true"])
            if problem is None and named not in (folder / "runs/run/train.log").read_text():
                problem = "what differs is not in the log"
        outcome.add(kind, True, problem)
    return outcome


def stop_after(step: int) -> Sabotage:
    from opd.training.loop import Trainer

    def sabotage() -> None:
        train_step = Trainer.train_step

        def stopping(self: Trainer) -> Any:
            if self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(self)

        Trainer.train_step = stopping  # type: ignore[method-assign]

    return sabotage


def change(kind: str, folder: Path) -> list[str]:
    """Make it another run; returns the options that do so, if options do."""
    if kind == "options":
        return ["optim.lr=2e-4"]
    if kind == "training data":
        lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "train.jsonl").write_text("".join([*lines[:-1], '{"prompt": "11+11=", "answer": "22"}\n']))
    elif kind == "tokenizer":
        for role in ("student", "teacher"):
            file = folder / role / "chat_template.jinja"
            file.write_text(file.read_text() + " ")
    else:
        from safetensors.torch import save_file

        file = folder / "teacher/model.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 0.01
        save_file(tensors, file, {"format": "pt"})
    return []
