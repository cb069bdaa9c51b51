"""Copy a shipped YAML file to change it: `opd cp`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from opd import errors
from opd.cli import arguments, catalogue

EXAMPLES = "opd cp experiment/tiny\nopd cp optim/adamw --name slow --to ./conf"


def main(argv: Sequence[str]) -> int:
    """Copy the file and say how to use it; returns the exit code."""
    return arguments.launch(parser(), copy, argv)


def parser() -> arguments.Parser:
    own = arguments.parser("cp", "Copy a shipped YAML file into a folder of yours, to change it and use it by --config-dir.", EXAMPLES)
    own.add_argument("file", help="group/name, or a name that one group alone has (opd ls)")
    own.add_argument("--to", type=Path, default=Path("conf"), help="the folder (./conf)")
    own.add_argument("--name", help="what the copy is called (my_NAME): a shipped file wins over one of the same name")
    return own


def copy(parsed: argparse.Namespace) -> int:
    group, target = catalogue.copy(parsed.file, parsed.to, parsed.name)
    print(f"{target}: change it, then: opd train --config-dir {shlex.quote(str(parsed.to))} {group}={target.stem}")
    return errors.OK
