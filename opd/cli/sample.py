"""Let student and teacher answer: `opd sample`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from opd.cli import arguments
from opd.cli import hydra_app as entry
from opd.config.schema import Config


def main(words: Sequence[str]) -> int:
    """Find the models, answer each prompt with both; returns the exit code."""
    return entry.launch_with_flags(parser(), answer, words, "prompts are given as --prompt TEXT")


def parser() -> arguments.Parser:
    own = arguments.own("sample")
    own.add_argument("--json", action="store_true")
    own.add_argument("--prompt", action="append", default=[])
    own.add_argument("--file")
    own.add_argument("--teacher")
    own.add_argument("-n", "--samples", type=arguments.some, default=1)
    return own


def answer(config: Config, folder: Path, given: argparse.Namespace) -> None:
    from rich.console import Console

    from opd.evaluation import sample_score
    from opd.evaluation.show import completion_table
    from opd.evaluation.target import NONE, find_target
    from opd.training import runner  # torch is imported here and not before

    runner.quiet_libraries()
    target = find_target(given.target, config, given.teacher)
    pair = sample_score.load_pair(target.config, with_teacher=given.teacher != NONE)
    console = Console(highlight=False)
    if not given.prompt and given.file is None and sys.stdin.isatty():
        console.print("a prompt a line; an empty one ends")
    for prompt in sample_score.read_prompts(given.prompt, given.file, input):
        answers = sample_score.sample(pair, prompt, given.samples)
        if given.json:
            print(json.dumps({"prompt": prompt, **answers}, ensure_ascii=False), flush=True)
        else:
            console.print(completion_table(prompt, answers))
