"""The command `opd`: it knows the verbs, and imports the one that is asked for. Torch and Hydra are not needed to ask for help."""

import difflib
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from opd import __version__, errors


class Verb(NamedTuple):
    """`module:function` of `target` takes the arguments after the verb and returns the exit code."""

    does: str
    example: str
    target: str


VERBS = {
    "train": Verb("distil a teacher into a student", "opd train model=qwen05b teacher=qwen15b", "opd.train:main"),
    "doctor": Verb("look whether a run is ready, without training", "opd doctor model=qwen05b teacher=qwen15b", "opd.cli.doctor:main"),
    "eval": Verb("judge a run or a model against its teacher", "opd eval runs/NAME eval.samples=8", "opd.cli.eval:main"),
    "sample": Verb("let student and teacher answer side by side", "opd sample runs/NAME --prompt TEXT", "opd.cli.sample:main"),
    "score": Verb("what student and teacher think of each token of a text", "opd score runs/NAME --text TEXT", "opd.cli.score:main"),
    "ls": Verb("list models, data, experiments and runs", "opd ls runs", "opd.cli.ls:main"),
    "cp": Verb("copy a shipped YAML file to change it", "opd cp experiment/tiny", "opd.cli.cp:main"),
    "compare": Verb(
        "rank runs, with the options in which they differ", "opd compare sweeps/first --svg curves.svg", "opd.cli.compare:main"
    ),
    "report": Verb("show runs as one HTML file, token by token", "opd report runs/first", "opd.cli.report:main"),
    "export": Verb("write a run's model as a folder of its own", "opd export runs/first --out first", "opd.cli.export:main"),
    "completion": Verb("print tab completion for bash, zsh or fish", 'eval "$(opd completion bash)"', "opd.cli.completion:main"),
}


def usage() -> str:
    """All verbs, one line with what it does and one with an example each."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:<{width}}{verb.does}\n  {'':<{width}}{verb.example}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "Usage: opd VERB [arguments]",
            "",
            "On-policy distillation: a small language model writes, a better one scores every token, the small one follows.",
            "",
            *lines,
            "",
            "  opd VERB --help   more about one of them",
            "  opd --version     the version",
            "",
            "Without a network, in about a minute: opd train experiment=tiny",
        ]
    )


def unknown(word: str) -> str:
    """What to say to a first word that is not a verb."""
    if "=" in word:
        return f"{word}: say what to do first, for example opd train {word}"
    close = difflib.get_close_matches(word, VERBS, n=1)
    return f"{word}: no such verb; " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(VERBS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the first word says with the rest, and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    first, rest = (words[0], words[1:]) if words else ("help", [])
    if first in ("help", "-h", "--help"):
        if rest:
            return main([rest[0], "--help"])
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `opd --help | head -1` ends without a complaint
        print(usage())
        return errors.OK
    if first == "--version":
        print(f"opd {__version__}")
        return errors.OK
    if first not in VERBS:
        print(f"opd: error: {unknown(first)}", file=sys.stderr)
        return errors.USAGE
    module, _, function = VERBS[first].target.partition(":")
    code: int = vars(import_module(module))[function](rest)
    return code
