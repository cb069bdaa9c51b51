"""`opd eval`: evaluate a run or a model against its teacher and a baseline."""

import argparse
import json
import sys
from pathlib import Path

from opd.cli.hydra_app import FlagParser
from opd.config.files import local_path
from opd.config.schema import Config
from opd.runs.answers import as_text, file_beside
from opd.runs.folder import check_output_path, write_output
from opd.runs.progress import progress_on
from opd.runs.text import make_console


def make_parser() -> FlagParser:
    parser = FlagParser("eval", evaluate, "compare it with another one with --baseline")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--teacher")
    parser.add_argument("--baseline")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--out", type=local_path)
    return parser


def evaluate(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Evaluate the models, print the result, and store it in the run folder or in `--out`."""
    from opd.evaluation.target import find_target, locate_models

    if flags.out is not None:
        check_output_path(flags.out)
    target = find_target(flags.target, config, flags.teacher, flags.baseline, flags.best)
    named = locate_models(target)

    from opd import signals
    from opd.evaluation import judge
    from opd.evaluation.show import WIDTH, show_evaluation, show_models
    from opd.models import distributed
    from opd.training import runner  # imports torch, which neither --help nor a mistake needs

    runner.quiet_libraries()
    console = make_console(WIDTH, soft_wrap=True)
    if not flags.json and signals.launched_as()[0] == 0:
        show_models(console, named)
    if signals.launched_as()[0] == 0:
        for line in judge.changed_inputs(target):
            print(f"warning: {line}", file=sys.stderr)
    result, lines = judge.judge(target, named, folder, None if flags.json else progress_on(console))
    if not distributed.in_main_process():
        return
    out = flags.out or (judge.unused_result_file(target.run) if target.run is not None else None)
    content = json.dumps(result, indent=2, ensure_ascii=False)
    if flags.json:
        print(content)
    else:
        show_evaluation(console, result, out)
    if out is not None:
        write_output(out, f"{content}\n")
        if lines:
            write_output(file_beside(out), as_text(lines))
