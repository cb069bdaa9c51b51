"""`opd report` and `opd compare`: several runs as one HTML file, or ranked in a table."""

import argparse
import sys
from pathlib import Path

from opd.cli.arguments import Parser
from opd.config.files import local_path
from opd.config.options import Direction
from opd.errors import OutputError
from opd.report import compare, render_report
from opd.report.page import GENERATOR
from opd.runs.folder import REPORT, check_output_path, write_output
from opd.runs.outcome import RANKS
from opd.runs.reader import find_runs
from opd.runs.text import make_console

REPORT_DESCRIPTION = "Write runs as one self-contained HTML file: results, curves, and how student and teacher differ, token by token."
REPORT_EXAMPLES = """opd report runs/first
opd report runs/first runs/second --out both.html
opd report sweeps/lr --out sweep.html"""
COMPARE_DESCRIPTION = "Rank runs by a metric, with the options that differ between them. opd report draws their curves side by side."
COMPARE_EXAMPLES = """opd compare sweeps/first
opd compare runs/a runs/b --metric eval_kl_after
opd compare runs --csv > runs.csv"""


def make_report_parser() -> Parser:
    parser = Parser("report", write_report, REPORT_DESCRIPTION, REPORT_EXAMPLES)
    parser.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN", help="a run folder, or a folder of several; all are shown side by side"
    )
    parser.add_argument("--out", type=local_path, metavar="FILE", help=f"default: RUN/{REPORT} for one run, ./{REPORT} for several")
    return parser


def write_report(parsed: argparse.Namespace) -> None:
    runs = find_runs(parsed.runs)
    out: Path = parsed.out or (runs[0].path / REPORT if len(runs) == 1 else Path(REPORT))
    check_output_path(out)
    is_own = len(runs) == 1 and out == runs[0].path / REPORT
    if out.is_file() and not is_own and GENERATOR.encode() not in out.read_bytes():
        raise OutputError(f"{out}: exists and is no report of opd; nothing was overwritten: name another file with --out FILE")
    replaced = out.is_file() and not is_own
    write_output(out, render_report(runs))
    print(f"{out} (replaced)" if replaced else out)


def make_compare_parser() -> Parser:
    parser = Parser("compare", print_comparison, COMPARE_DESCRIPTION, COMPARE_EXAMPLES)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=local_path, help="a run folder, or a folder of several (runs/, a sweep)")
    parser.add_argument("--metric", choices=sorted(RANKS), help="default: reward_after, or eval_kl_after for runs without rewards")
    parser.add_argument("--direction", choices=[direction.value for direction in Direction], help="default: the metric's better direction")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--csv", action="store_true", help="print one line per run as CSV")
    return parser


def print_comparison(parsed: argparse.Namespace) -> None:
    comparison = compare.compare(find_runs(parsed.folders), parsed.metric, parsed.direction)
    if parsed.json:
        print(compare.as_json(comparison))
    elif parsed.csv:
        sys.stdout.write(compare.as_csv(comparison))
    else:
        compare.show(comparison, make_console(compare.WIDTH))
