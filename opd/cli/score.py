"""What student and teacher think of each token of a text: `opd score`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from opd import errors
from opd.cli import arguments
from opd.cli import hydra_app as entry
from opd.config.schema import Config
from opd.runs.folder import check_output_path, write_output


def main(words: Sequence[str]) -> int:
    """Find the models, score the text with both; returns the exit code."""
    return entry.launch_with_flags(parser(), score, words, "the text is given as --text TEXT")


def parser() -> arguments.Parser:
    own = arguments.own("score")
    own.add_argument("--json", action="store_true")
    for flag in ("--text", "--file", "--prompt", "--teacher"):
        own.add_argument(flag)
    own.add_argument("--html", type=Path)
    return own


def score(config: Config, folder: Path, given: argparse.Namespace) -> None:
    from rich.console import Console

    from opd.evaluation import sample_score
    from opd.evaluation.show import score_page, score_parts
    from opd.evaluation.target import find_target
    from opd.training import runner  # torch is imported here and not before

    runner.quiet_libraries()
    if sum(text is not None for text in (given.text, given.file)) != 1:
        raise errors.ConfigError("give one text, as --text TEXT or --file FILE (- reads the standard input)")
    if given.html is not None:
        check_output_path(given.html)
    text = given.text if given.text is not None else sample_score.read_text("/dev/stdin" if given.file == "-" else given.file)
    target = find_target(given.target, config, given.teacher)
    scored = sample_score.score(sample_score.load_pair(target.config), text, given.prompt)
    if given.html is not None:
        write_output(given.html, score_page(scored, f"{target.name} and {target.config.teacher.path}"))
    if given.json:
        print(json.dumps(scored.to_dict(), ensure_ascii=False))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for part in score_parts(scored):
            console.print(part)
