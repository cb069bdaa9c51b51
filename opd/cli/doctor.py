"""`opd doctor`: check whether a run is ready, without training."""

import argparse
import json
from pathlib import Path

from opd import errors
from opd.cli.arguments import non_negative_int
from opd.cli.hydra_app import FlagParser
from opd.config.schema import Config


def make_parser() -> FlagParser:
    parser = FlagParser("doctor", examine)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=non_negative_int, default=32)
    return parser


def examine(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Examine the composed config and print the findings. Raises `NotReady` if a check failed."""
    from opd import doctor
    from opd.doctor.findings import show
    from opd.training import runner  # imports torch, which --help does not need

    runner.quiet_libraries()
    report = doctor.examine(config, flags.prompts)
    if flags.json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)
    failed = report.of(doctor.Status.fail)
    if failed:
        raise errors.NotReady(f"not ready: {', '.join(finding.check for finding in failed)}")
