"""Inject faults of every kind into real runs, and check that what opd promises holds.

scripts/faults [--full] [--only CASE ...] [--times N] [--hole HOLE] [--holes] [--list]

Prints a Markdown table: case, tries, how often the fault fired, how often the promise held then. Exits with 0 if every fault fired and
every promise held. tests/faults/README.md lists the cases.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from faults.cases import CASES
from faults.harness import Try
from faults.holes import HOLES, Hole


def run_case(name: str, times: int) -> tuple[list[Try], str]:
    """Return the tries of a case and its row of the table."""
    tries: list[Try] = []
    with tempfile.TemporaryDirectory(prefix="opd-faults-") as folder:
        begin = time.monotonic()
        generator = CASES[name][0](times, Path(folder))
        try:
            while True:
                tries.append(next(generator))
        except StopIteration as stop:
            note = f"{stop.value}, " if stop.value else ""
    fired = sum(attempt.fired for attempt in tries)
    survived = sum(attempt.fired and attempt.problem is None for attempt in tries)
    return tries, f"| {name} | {len(tries)} | {fired} | {survived} | {note}{time.monotonic() - begin:.0f} s |"


def finds(hole: Hole) -> bool:
    """Return whether the hole's case fails on a build that has it. In a child, which alone has the hole."""
    pid = os.fork()
    if pid == 0:
        hole.open()
        tries, _ = run_case(hole.case, hole.times)
        os._exit(1 if any(attempt.fired and attempt.problem for attempt in tries) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def list_cases() -> str:
    """Return the table of README.md."""
    lines = ["| case | fault | tries | with --full | what must hold |", "|---|---|---:|---:|---|"]
    for name, (case, default, full) in CASES.items():
        fault, _, promise = (case.__doc__ or "").partition("\n")
        lines.append(f"| {name} | {fault.rstrip('.')} | {default} | {full} | {' '.join(promise.split()).rstrip('.')} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="many tries of each case: about an hour on two cores")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="only these cases")
    parser.add_argument("--times", type=int, help="tries of each case")
    parser.add_argument("--hole", choices=HOLES, help="open a known hole in the build first: the case that looks for it has to fail")
    parser.add_argument("--holes", action="store_true", help="open each of these holes in turn and run its case")
    parser.add_argument("--list", action="store_true", help="print the cases")
    chosen = parser.parse_args()
    logging.lastResort = logging.NullHandler()  # checkpoints log the injected faults
    if chosen.list:
        print(list_cases())
        return 0
    if chosen.holes:
        print("| hole | case | found |\n|---|---|---|", flush=True)
        found = {name: finds(hole) for name, hole in HOLES.items()}
        for name, is_found in found.items():
            print(f"| {name} | {HOLES[name].case} | {'yes' if is_found else 'no'} |")
        return 0 if all(found.values()) else 1
    if chosen.hole is not None:
        HOLES[chosen.hole].open()
    print("| case | tried | fired | survived | |\n|---|---:|---:|---:|---|", flush=True)
    failures: list[str] = []
    for name in chosen.only:
        _, default, full = CASES[name]
        tries, row = run_case(name, chosen.times or (full if chosen.full else default))
        print(row, flush=True)
        failed = [
            f"{name}: {attempt.what}: {attempt.problem or 'the fault did not fire'}"
            for attempt in tries
            if attempt.problem or not attempt.fired
        ]
        failures += failed if tries else [f"{name}: nothing was tried"]
    for line in dict.fromkeys(failures):
        print(line, file=sys.stderr)
    return 1 if failures else 0
