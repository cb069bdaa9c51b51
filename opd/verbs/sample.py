"""Let student and teacher answer: `opd sample`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from opd import arguments, entry, errors
from opd.config.schema import Config


def main(argv: Sequence[str]) -> int:
    """Find the models, answer each prompt with both; returns the exit code."""
    own = arguments.Parser(prog="opd sample", add_help=False, allow_abbrev=False)
    own.add_argument("--json", action="store_true")
    own.add_argument("--prompt", action="append", default=[])
    own.add_argument("--file")
    own.add_argument("--teacher")
    own.add_argument("-n", "--samples", type=arguments.count, default=1)
    parsed = arguments.own_flags(own, argv)
    if isinstance(parsed, int):
        return parsed
    flags, words = parsed
    named, rest = arguments.targets(words)

    def task(config: Config, folder: Path) -> None:
        from rich.console import Console

        from opd import runner  # torch is imported here and not before
        from opd.judging import speak
        from opd.judging.speak_display import side_by_side
        from opd.judging.target import NONE, find_target

        runner.quiet_libraries()
        if len(named) > 1:
            raise errors.ConfigError(f"{named[1]}: name one target, and give prompts as --prompt TEXT")
        target = find_target(named[0] if named else None, config, flags.teacher)
        both = speak.load_pair(target.config, with_teacher=flags.teacher != NONE)
        console = Console(highlight=False)
        if not flags.prompt and flags.file is None and sys.stdin.isatty():
            console.print("a prompt a line; an empty one ends")
        for prompt in speak.read_prompts(flags.prompt, flags.file, input):
            answers = speak.write(both, prompt, max(flags.samples, 1))
            if flags.json:
                print(json.dumps({"prompt": prompt, **answers}, ensure_ascii=False), flush=True)
            else:
                console.print(side_by_side(prompt, answers))

    return entry.launch(task, rest, "sample")
