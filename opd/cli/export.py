"""`opd export`: save the model of a run or a checkpoint as a model folder."""

import argparse

from opd.cli.arguments import Parser
from opd.config.files import local_path
from opd.config.options import EXPORT_DTYPES

EXAMPLES = """opd export runs/first --out first --dtype bfloat16
opd export runs/first --best --out best
opd export runs/first/checkpoints/step_000150 --out at-150
opd export runs/first --out first --push OWNER/NAME"""


def make_parser() -> Parser:
    description = "Save the model of a run, or of one of its checkpoints, as a plain Hugging Face folder, with adapters merged."
    parser = Parser("export", export, description, EXAMPLES)
    parser.add_argument("source", type=local_path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or a folder in its checkpoints/")
    parser.add_argument("--out", type=local_path, metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--best", action="store_true", help="of a run, the checkpoint with the best evaluation instead of final/")
    parser.add_argument(
        "--dtype", choices=EXPORT_DTYPES, default=EXPORT_DTYPES[0], help="dtype of the weights (float32, as they were trained)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the hub; a new repository is private")
    return parser


def export(parsed: argparse.Namespace) -> None:
    from opd.training.export_source import best_checkpoint, check_request

    source = best_checkpoint(parsed.source) if parsed.best else parsed.source
    check_request(source, parsed.out, parsed.push)

    from opd.training import runner  # imports torch, which neither --help nor a mistake needs
    from opd.training.export import export_model

    runner.quiet_libraries()
    address = export_model(source, parsed.out, parsed.dtype, parsed.push)
    print(parsed.out if address is None else f"{parsed.out}\n{address}")
