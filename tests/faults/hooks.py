"""Every place where fault cases reach into opd: patches of its internals, and what they read from a checkpoint's state.

When the internals change, only this file has to follow. Except for `file_operations`, each patch stays for the rest of the process, which
is a forked child.
"""

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import safetensors.torch
import torch
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch import nn

from opd import signals
from opd.cli import hydra_app, hydra_errors
from opd.config import compose, secrets
from opd.data import chat_template
from opd.models.distributed import Strategy
from opd.models.policy import Policy
from opd.objective.head import TokenStats
from opd.training import checkpoint, loop, step
from opd.training.checkpoint import Checkpoints, Snapshot
from opd.training.loop import Trainer
from opd.training.step import NotFinite, Step
from opd.training.tensors import model_tensors, optimizer_tensors, snapshot
from opd.training.tokens import Slice, Tokens

FIRED = Path("fired.txt")  # in the working folder of the run


def call_before(owner: Any, name: str, act: Callable[..., object]) -> None:
    """Let `act` be called with the arguments of `owner.name` before each of its calls."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        act(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def before_steps(act: Callable[[int], object]) -> None:
    """Call `act` with the number of finished steps before each step."""
    call_before(Trainer, "train_step", lambda trainer: act(trainer.step))


def before_saves(act: Callable[[], object]) -> None:
    call_before(Checkpoints, "save", lambda *args, **kwargs: act())


def before_signal_checks(act: Callable[[str], object]) -> None:
    """Call `act` before the run looks for signals: with "decode" between decoding steps, "inner" before each inner step."""
    call_before(signals, "check", lambda *args: act("decode"))
    call_before(loop, "stop_all_processes", lambda *args: act("inner"))


def limit_memory(tokens: int) -> None:
    """Raise an out-of-memory error in forward passes of more than `tokens` tokens."""

    def check(policy: Policy, inputs: Any, loss: Any) -> None:
        if inputs.ids_BT.numel() > tokens:
            FIRED.touch()
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    call_before(Policy, "forward", check)


def corrupt_numbers(kind: str, hit: Callable[[int], bool], record: Path = Path("updates.txt")) -> None:
    """Make numbers of some updates non-finite, and record what each update did.

    Args:
        kind: "nan" or "inf" in the teacher's log-probs, "loss", or "gradient".
        hit: whether the update of this number, from 1, is corrupted.
        record: gets one line an update: "applied" or "skipped", and whether weights and optimizer "changed".
    """
    count = 0
    apply, scores, loss = Step.apply, Step.teacher_scores, step.chunked_loss

    def tensors(strategy: Strategy) -> dict[str, torch.Tensor]:
        current = model_tensors(strategy.policy) | optimizer_tensors(strategy.optimizer)
        return {name: tensor.clone() for name, tensor in current.items()}

    def patched_apply(self: Step, *args: Any, **kwargs: Any) -> NotFinite | None:
        nonlocal count
        count += 1
        if hit(count) and kind == "gradient":
            next(iter(self.strategy.policy.parameters())).grad.view(-1)[0] = math.inf
        before = tensors(self.strategy)
        problem = apply(self, *args, **kwargs)
        after = tensors(self.strategy)
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        with record.open("a") as file:
            file.write(f"{'skipped' if problem else 'applied'} {'unchanged' if same else 'changed'}\n")
        return problem

    def patched_scores(self: Step, part: Slice) -> TokenStats:
        columns = scores(self, part)
        if hit(count + 1) and kind in ("nan", "inf"):
            columns["teacher_logp"][0] = math.nan if kind == "nan" else -math.inf
        return columns

    def patched_loss(*args: Any, **kwargs: Any) -> Any:
        value, stats = loss(*args, **kwargs)
        return (value * math.nan if hit(count + 1) and kind == "loss" else value), stats

    Step.apply = patched_apply  # type: ignore[method-assign]
    Step.teacher_scores = patched_scores  # type: ignore[method-assign]
    step.chunked_loss = patched_loss


def lose_teacher_scores(epoch: int, samples: Callable[[int], bool]) -> None:
    """Make the teacher's log-probs of some samples (by id) NaN in one epoch."""
    score = Step.score

    def patched(self: Step, tokens: Tokens) -> None:
        score(self, tokens)
        for index, rollout in enumerate(tokens.rollouts):
            if rollout.request.epoch == epoch and samples(rollout.request.prompt.sample_id):
                FIRED.touch()
                tokens.columns["teacher_logp"][tokens.rollout_N == index] = math.nan

    Step.score = patched  # type: ignore[method-assign]


def left_out_samples(path: Path) -> list[int]:
    """Return the positions in the data that a checkpoint's run does not train on any more."""
    positions: list[int] = json.loads((path / "state.json").read_text())["trouble"]["left_out"]
    return positions


def max_tokens(path: Path) -> int:
    """Return the micro-batch size that a checkpoint's run uses."""
    return int(json.loads((path / "state.json").read_text())["choices"]["max_tokens"])


def report_free_disk(size: int) -> None:
    """Make checkpoints believe that the disk has `size` free bytes."""
    checkpoint.shutil.disk_usage = lambda path: SimpleNamespace(free=size)  # type: ignore[attr-defined]


def snapshot_of(step: int) -> Snapshot:
    """Return a small snapshot to save, all of whose weights are `step`."""
    model = nn.Linear(32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    return snapshot(model_tensors(model), optimizer, {"step": step, "inner": 0, "tokens": None})


# Every call by which a save changes the disk.
OPERATIONS: tuple[tuple[Any, str], ...] = (
    (safetensors.torch, "save_file"), (Path, "write_text"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"),
    (os, "fsync"), (os, "unlink"), (os, "rmdir"),
)  # fmt: skip
Act = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]  # gets the name, the original call and its arguments


@contextmanager
def file_operations(act: Act) -> Iterator[None]:
    """Call `act` instead of each file operation of a save; operations inside `act` are not intercepted."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in OPERATIONS]
    acting = False

    def replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal acting
            if acting:
                return original(*args, **kwargs)
            acting = True
            try:
                return act(name, lambda: original(*args, **kwargs), args)
            finally:
                acting = False

        return call

    for owner, name, original in originals:
        setattr(owner, name, replacement(name, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def limit_chat_template(seconds: float) -> None:
    chat_template.TEMPLATE_SECONDS = seconds


def options() -> dict[str, Any]:
    """Return the type of each option of the config."""
    return compose.options()


def group_choices() -> list[str]:
    """Return `GROUP=NAME` for each YAML file of a config group."""
    return [f"{group}={name}" for group, names in hydra_errors.choices().items() if group != "hydra" for name in names]


@contextmanager
def cached_yaml() -> Iterator[None]:
    """Let Hydra read each YAML file once."""
    load = FileConfigSource.load_config
    cached = functools.cache(load)
    FileConfigSource.load_config = lambda self, path: copy.deepcopy(cached(self, path))  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileConfigSource.load_config = load  # type: ignore[method-assign]


def compose_config(words: Sequence[str]) -> None:
    """Compose a config as `opd train` does, without starting anything. Raises `OpdError`."""

    def work() -> None:
        secrets.refuse_in_words(words)
        hydra_errors.refuse_lists_of_choices(words)
        with hydra.initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
            composed = hydra.compose("config", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        assert isinstance(composed, DictConfig)
        str(composed.hydra.run.dir)
        with open_dict(composed):
            composed.pop("hydra")
        compose.to_config(composed)

    compose.register()
    hydra_errors.explained(work)


def command(words: Sequence[str]) -> int:
    """Run the whole command `opd train` with a task that does nothing; return its exit code."""
    return hydra_app.run_verb(lambda config, folder: None, words)
