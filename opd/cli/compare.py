"""`opd compare`: runs side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opd import errors
from opd.cli import arguments
from opd.config.schema import Direction
from opd.report import compare
from opd.runs.reader import find_runs
from opd.runs.text import make_console

EXAMPLES = """opd compare sweeps/first
opd compare runs/a runs/b --metric eval_kl_after
opd compare runs --csv > runs.csv"""


def task(given: argparse.Namespace) -> int:
    comparison = compare.compare(find_runs(given.folders), given.metric, given.direction and Direction[given.direction])
    if given.json:
        print(compare.as_json(comparison))
    elif given.csv:
        sys.stdout.write(compare.as_csv(comparison))
    else:
        compare.show(comparison, make_console(compare.WIDTH))
    return errors.OK


def main(argv: Sequence[str]) -> int:
    """Rank the runs in the folders that `argv` names; returns the exit code."""
    return arguments.launch(parser(), task, argv)


def parser() -> arguments.Parser:
    own = arguments.parser("compare", "Rank runs by what they reached, with the options in which they differ.", EXAMPLES)
    own.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="a run's folder, or one that holds several (runs/, a sweep)")
    own.add_argument("--metric", choices=sorted(compare.RANKS), help="default: reward_after, or eval_kl_after where nothing is judged")
    own.add_argument("--direction", choices=[each.value for each in Direction], help="default: as it is better")
    form = own.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all of it as JSON")
    form.add_argument("--csv", action="store_true", help="print a line a run as CSV")
    return own
