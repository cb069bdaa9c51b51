"""`opd eval`: evaluate a run or a model against its teacher and a baseline."""

import argparse
import json
from pathlib import Path

from opd.cli.hydra_app import FlagParser
from opd.config.files import local_path
from opd.config.schema import Config
from opd.runs.folder import check_output_path, write_output


def make_parser() -> FlagParser:
    parser = FlagParser("eval", evaluate, "compare it with another one with --baseline")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--teacher")
    parser.add_argument("--baseline")
    parser.add_argument("--out", type=local_path)
    return parser


def evaluate(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Evaluate the models, print the result, and store it in the run folder or in `--out`."""
    from opd.evaluation import judge
    from opd.evaluation.show import show_evaluation
    from opd.evaluation.target import find_target
    from opd.models import distributed
    from opd.training import runner  # imports torch, which --help does not need

    runner.quiet_libraries()
    if flags.out is not None:
        check_output_path(flags.out)
    target = find_target(flags.target, config, flags.teacher, flags.baseline)
    result = judge.judge(target, folder)
    if not distributed.in_main_process():
        return
    out = flags.out or (judge.unused_result_file(target.run) if target.run is not None else None)
    content = json.dumps(result, indent=2, ensure_ascii=False)
    if flags.json:
        print(content)
    else:
        show_evaluation(result, out)
    if out is not None:
        write_output(out, f"{content}\n")
