"""Distil a teacher into a student: `opd train`, `python -m opd.train` and `accelerate launch -m opd.train` are this."""

import sys
from collections.abc import Sequence
from pathlib import Path

from opd.cli import hydra_app as entry
from opd.cli import launch
from opd.config.schema import Config


def train(config: Config, folder: Path) -> float | None:
    """Run what `config` says in `folder`, here or in processes of its own; returns the objective for sweepers."""
    if launch.wanted(config):
        return launch.run(config, folder)
    from opd.training import runner  # torch is imported here and not before: help, --cfg and completion do without

    return runner.run(config, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Compose the config from overrides and run it; returns the exit code."""
    return entry.launch(train, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
