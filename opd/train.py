"""Distil a teacher into a student: `opd train`, `python -m opd.train` and `accelerate launch -m opd.train` run this module."""

import sys
from collections.abc import Sequence
from pathlib import Path

from opd.cli import launch
from opd.cli.arguments import prepare_process
from opd.cli.hydra_app import FlagParser, run_verb
from opd.config.compose import to_dict
from opd.config.files import check_files
from opd.config.schema import Config
from opd.runs.folder import RUN, RunFolder, Status, read_json


def train(config: Config, folder: Path) -> float | None:
    """Train as configured, in this process or in processes of its own, and return the objective for sweepers."""
    is_finished = RunFolder(folder).status() is Status.done and (read_json(folder / RUN) or {}).get("config") == to_dict(config)
    if not is_finished:  # which no longer needs its files
        check_files(config)
    if launch.is_requested(config):
        return launch.run(config, folder)
    from opd.training import runner  # imports torch, which --help, --cfg and completion do not need

    return runner.run(config, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Compose the config from overrides, train, and return the exit code."""
    prepare_process()
    return run_verb(train, sys.argv[1:] if argv is None else argv)


def make_parser() -> FlagParser:
    """Return the parser of `opd train`, which has no flags besides Hydra's."""
    return FlagParser("train", lambda config, folder, flags: train(config, folder))


if __name__ == "__main__":
    sys.exit(main())
