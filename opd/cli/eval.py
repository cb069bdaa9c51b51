"""Judge a run or a model: `opd eval`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.cli import arguments
from opd.cli import hydra_app as entry
from opd.config import compose as store
from opd.config.schema import Config
from opd.runs import files


def main(words: Sequence[str]) -> int:
    """Compose the config, find the models, judge them, show and keep the result; returns the exit code."""
    return entry.launch_with_flags(parser(), judge, words, "another one to judge it against is --baseline")


def parser() -> arguments.Parser:
    own = arguments.own("eval")
    own.add_argument("--json", action="store_true")
    own.add_argument("--teacher")
    own.add_argument("--baseline")
    own.add_argument("--out", type=Path)
    return own


def judge(config: Config, folder: Path, given: argparse.Namespace) -> None:
    from opd.evaluation import judge
    from opd.evaluation.show import show
    from opd.evaluation.target import find_target
    from opd.models import distributed  # torch is imported here and not before
    from opd.training import runner

    runner.quiet_libraries()
    if given.out is not None:
        files.check_output_path(given.out)
    target = find_target(given.target, config, given.teacher, given.baseline)
    found = {**judge.told(target), "tasks": judge.judge(target, tasks_of(target.config), folder)}
    if not distributed.in_main_process():
        return
    out = given.out or (judge.place_of(target.run) if target.run is not None else None)
    content = json.dumps(found, indent=2, ensure_ascii=False)
    if given.json:
        print(content)
    else:
        show(found, out)
    if out is not None:
        files.write_output(out, f"{content}\n")


def tasks_of(config: Config) -> dict[str, Config]:
    """The sets to judge on: the config's own, or those of `eval.tasks`: the config with their options put on it.

    How many answers and at what temperature is the config's, unless a task says so itself.
    """
    from hydra import compose

    from opd.cli import hydra_errors as mistakes
    from opd.evaluation.target import changed

    tasks = {}
    for name, options in config.eval.tasks.items():
        kept = {key: f"eval.{key}={literal(getattr(config.eval, key))}" for key in ("samples", "temperature")}
        words = [word for key, word in kept.items() if f"eval.{key}" not in options]
        words += [f"{key}={literal(value)}" for key, value in options.items()]
        words.sort(key=lambda word: "." in word.partition("=")[0])  # groups first: they would overwrite single options
        composed = mistakes.explained(lambda words=words: compose("config", overrides=words))  # type: ignore[misc]
        plain = store.to_dict(replace(config, eval=replace(config.eval, tasks={})))
        tasks[name] = changed(plain, store.to_config(composed), words)
    return tasks or {"evaluation": config}


def literal(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    return json.dumps(value, ensure_ascii=False)
