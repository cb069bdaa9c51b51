"""Look whether a run is ready: `opd doctor`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from opd import errors
from opd.cli import arguments
from opd.cli import hydra_app as entry
from opd.config.schema import Config


def main(words: Sequence[str]) -> int:
    """Compose the config from overrides, examine it, show what was found; returns the exit code."""
    return entry.launch_with_flags(parser(), examine, words)


def parser() -> arguments.Parser:
    own = arguments.own("doctor")
    own.add_argument("--json", action="store_true")
    own.add_argument("--prompts", type=arguments.count, default=32)
    return own


def examine(config: Config, folder: Path, given: argparse.Namespace) -> None:
    from opd import doctor
    from opd.doctor.show import show
    from opd.training import runner  # torch is imported here and not before

    runner.quiet_libraries()
    report = doctor.examine(config, given.prompts)
    if given.json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        show(report)
    failed = report.of(doctor.Status.fail)
    if failed:
        raise errors.NotReady(f"not ready: {', '.join(finding.check for finding in failed)}")
