"""Judge a run or a model: `opd eval`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from opd.cli import arguments
from opd.cli import hydra_app as entry
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
    from opd.models import together  # torch is imported here and not before
    from opd.training import runner

    runner.quiet_libraries()
    if given.out is not None:
        files.check_output_path(given.out)
    target = find_target(given.target, config, given.teacher, given.baseline)
    found = {**judge.told(target), "tasks": judge.judge(target, {"evaluation": target.config}, folder)}
    if not together.in_main_process():
        return
    out = given.out or (judge.place_of(target.run) if target.run is not None else None)
    content = json.dumps(found, indent=2, ensure_ascii=False)
    if given.json:
        print(content)
    else:
        show(found, out)
    if out is not None:
        files.write_output(out, f"{content}\n")
