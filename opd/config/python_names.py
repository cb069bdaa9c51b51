"""The options that are arguments of the Python API, and messages in the words of its users."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

import yaml

from opd.config.compose import options
from opd.config.several import did_you_mean
from opd.errors import OpdError

P = ParamSpec("P")

ARGUMENTS = {
    "model.path": "model",
    "teacher.path": "teacher_model",
    "eval.steps": "eval_steps",
    "eval.reward": "reward_funcs",
    "ppo.steps": "ppo_steps",
    "ppo.clip_eps": "clip_eps",
    "sampling.temperature": "sampling_temperature",
    "sampling.max_new_tokens": "max_new_tokens",
    "sampling.n": "samples_per_prompt",
    "train.batch_size": "batch_size",
    "train.max_steps": "max_steps",
    "optim.lr": "learning_rate",
    "optim.max_grad_norm": "max_grad_norm",
    "name": "output_dir",
    "hydra.run.dir": "output_dir",
    "resume": "resume_from_checkpoint",
}
# What a command line sets otherwise.
PHRASES = {
    "resume=auto": "resume_from_checkpoint=True",
    "resume=never": "resume_from_checkpoint=False",
    "eval=kl": "reward_funcs=None",
    "experiment=tiny": 'model="bundled:tiny-student"',
}
# What arguments of transformers' and TRL's trainers and their configs are called here.
OF_TRAINERS = {
    "args": "pass its fields as arguments, such as max_steps and learning_rate",
    "tokenizer": "it is processing_class",
    "ref_model": "it is teacher_model",
    "num_train_epochs": 'it is options={"train.epochs": NUMBER}',
    "per_device_train_batch_size": "it is batch_size",
    "num_generations": "it is samples_per_prompt",
    "max_completion_length": "it is max_new_tokens",
    "temperature": "it is sampling_temperature",
    "beta": 'it is options={"ppo.divergence": NAME}',
    "warmup_steps": 'it is options={"optim.warmup_steps": NUMBER}',
    "report_to": 'it is options={"track.tool": NAME}',
    "seed": 'it is options={"seed": NUMBER}',
}
LITERALS = {"null": "None", "true": "True", "false": "False"}
# An option, with its value where there is one. Words of one part, such as `name`, are options only with a value.
OPTION = re.compile(
    rf"(?<![\w./-])(?:(?:{'|'.join(map(re.escape, PHRASES))})\b|([a-z_]+(?:\.\w+)+|[a-z_]+(?==))(?:=(\[[^]]*\]|[^\s,;:()]+))?)"
)


def in_python(text: str) -> str:
    """Return a message with the API's arguments, and other options as they are passed in `options`, in place of those of a command line."""
    known = options()

    def rename(found: re.Match[str]) -> str:
        option, value = found[1], found[2]
        if found[0] in PHRASES:
            return PHRASES[found[0]]
        if option in ARGUMENTS:
            return ARGUMENTS[option] if value is None else f"{ARGUMENTS[option]}={LITERALS.get(value, value)}"
        return found[0] if option not in known or value is None else f'options={{"{option}": {python_value(value)}}}'

    return re.sub(r"\b(or|to) null\b", r"\1 None", OPTION.sub(rename, text))


def naming_unknown(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor say which of its arguments was meant by one that it does not have. It stays Python's `TypeError`."""
    known = inspect.signature(init).parameters

    @wraps(init)
    def checked(*args: P.args, **arguments: P.kwargs) -> None:
        for name in arguments.keys() - known.keys():
            meant = OF_TRAINERS.get(name) or did_you_mean(name, known).strip()
            raise TypeError(f"there is no argument {name}; {meant or 'other options are passed in options={NAME: VALUE}'}")
        init(*args, **arguments)

    return checked


def python_value(text: str) -> str:
    """Return the value of an option as it is typed in Python; placeholders, such as FOLDER, stay."""
    if text.isupper() or "…" in text:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return f'"{value}"' if isinstance(value, str) else repr(value)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Rewrite the message of an `OpdError` that is raised in the block as `in_python` does."""
    try:
        yield
    except OpdError as error:
        error.args = (in_python(str(error)),)
        raise
