"""`opd report`: runs as one HTML file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from opd import errors
from opd.cli import arguments
from opd.report import render_report
from opd.runs.folder import REPORT, check_output_path, write_output
from opd.runs.reader import find_runs


def main(words: Sequence[str]) -> int:
    """Write the report and say where it is; returns the exit code."""
    return arguments.launch(parser(), write, words)


def parser() -> arguments.Parser:
    own = arguments.parser(
        "report",
        "Write runs as one HTML file that needs nothing else: the result, curves, and where student and teacher differ, token by token.",
        "opd report runs/first\nopd report runs/first runs/second --out both.html\nopd report sweeps/lr --out sweep.html",
    )
    own.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of them; several stand side by side")
    own.add_argument("--out", type=Path, metavar="FILE", help=f"RUN/{REPORT} for one run, ./{REPORT} for several, if left out")
    return own


def write(parsed: argparse.Namespace) -> int:
    runs = find_runs(parsed.runs)
    out: Path = parsed.out or (runs[0].path / REPORT if len(runs) == 1 else Path(REPORT))
    check_output_path(out)
    write_output(out, render_report(runs))
    print(out)
    return errors.OK
