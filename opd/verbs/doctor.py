"""Look whether a run is ready: `opd doctor`."""

import json
from collections.abc import Sequence
from pathlib import Path

from opd import arguments, entry, errors
from opd.config.schema import Config


def main(argv: Sequence[str]) -> int:
    """Compose the config from overrides, examine it, show what was found; returns the exit code."""
    own = arguments.Parser(prog="opd doctor", add_help=False, allow_abbrev=False)
    own.add_argument("--json", action="store_true")
    own.add_argument("--prompts", type=arguments.count, default=32)
    parsed = arguments.own_flags(own, argv)
    if isinstance(parsed, int):
        return parsed
    flags, words = parsed

    def task(config: Config, folder: Path) -> None:
        from opd import doctor, runner  # torch is imported here and not before
        from opd.doctor.show import show

        runner.quiet_libraries()
        report = doctor.examine(config, flags.prompts)
        if flags.json:
            print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        else:
            show(report)
        failed = report.of(doctor.Status.fail)
        if failed:
            raise errors.NotReady(f"not ready: {', '.join(finding.check for finding in failed)}")

    return entry.launch(task, words, "doctor")
