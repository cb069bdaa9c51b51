"""What student and teacher think of each token of a text: `opd score`."""

import json
from collections.abc import Sequence
from pathlib import Path

from opd import arguments, entry, errors, files
from opd.config.schema import Config


def main(argv: Sequence[str]) -> int:
    """Find the models, score the text with both; returns the exit code."""
    own = arguments.Parser(prog="opd score", add_help=False, allow_abbrev=False)
    own.add_argument("--json", action="store_true")
    for flag in ("--text", "--file", "--prompt", "--teacher"):
        own.add_argument(flag)
    own.add_argument("--html", type=Path)
    parsed = arguments.own_flags(own, argv)
    if isinstance(parsed, int):
        return parsed
    flags, words = parsed
    named, rest = arguments.targets(words)

    def task(config: Config, folder: Path) -> None:
        from rich.console import Console

        from opd import runner  # torch is imported here and not before
        from opd.judging import speak
        from opd.judging.speak_display import coloured
        from opd.judging.target import find_target

        runner.quiet_libraries()
        if sum(given is not None for given in (flags.text, flags.file)) != 1 or len(named) > 1:
            raise errors.ConfigError("give one text, as --text TEXT or --file FILE (- reads the standard input), and one target")
        text = flags.text if flags.text is not None else speak.read_text("/dev/stdin" if flags.file == "-" else flags.file)
        target = find_target(named[0] if named else None, config, flags.teacher)
        scored = speak.score(speak.load_pair(target.config), text, flags.prompt)
        if flags.html is not None:
            files.write_text(flags.html, speak.page(scored, f"{target.name} and {target.config.teacher.path}"))
        if flags.json:
            print(json.dumps(scored.to_dict(), ensure_ascii=False))
        else:
            console = Console(highlight=False, soft_wrap=True)
            for part in coloured(scored):
                console.print(part)

    return entry.launch(task, rest, "score")
