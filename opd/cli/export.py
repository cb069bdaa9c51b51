"""`opd export`: a run's model, or a checkpoint's, as a model folder of its own."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from opd import errors
from opd.cli import arguments

DTYPES = ("float32", "bfloat16", "float16")


def main(words: Sequence[str]) -> int:
    """Write the folder, upload it where that is asked for, and say where it is; returns the exit code."""
    return arguments.launch(parser(), write, words)


def parser() -> arguments.Parser:
    own = arguments.parser(
        "export",
        "Write the model of a run, or of one of its checkpoints, as a plain Hugging Face folder: adapters merged, in the dtype asked for.",
        "opd export runs/first --out first --dtype bfloat16\n"
        "opd export runs/first/checkpoints/step_000150 --out at-150\n"
        "opd export runs/first --out first --push OWNER/NAME",
    )
    own.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME, or a folder in its checkpoints/")
    own.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="a new folder")
    own.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (float32, in which they were trained)")
    own.add_argument("--push", metavar="OWNER/NAME", help="upload it to the hub too; a repository that is not there is made private")
    return own


def write(parsed: argparse.Namespace) -> int:
    from opd.training import runner  # torch, which --help can do without
    from opd.training.export import export_model

    runner.quiet_libraries()
    address = export_model(parsed.source, parsed.out, parsed.dtype, parsed.push)
    print(parsed.out if address is None else f"{parsed.out}\n{address}")
    return errors.OK
