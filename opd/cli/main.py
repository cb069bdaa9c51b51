"""The command `opd`: finds the verb and imports its module. Help needs neither torch nor Hydra."""

import difflib
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from opd import __version__, errors
from opd.cli.arguments import prepare_process


class Verb(NamedTuple):
    """`parser` names what returns a `Parser`, whose `run` takes the words after the verb: a callable of a module of `opd`."""

    summary: str
    example: str
    parser: str


VERBS = {
    "train": Verb("distil a teacher into a student", "opd train model=qwen05b teacher=qwen15b", "train:make_parser"),
    "doctor": Verb("check a run without training", "opd doctor model=qwen05b teacher=qwen15b", "cli.doctor:DoctorParser"),
    "eval": Verb("evaluate a run or a model against its teacher", "opd eval runs/NAME eval.samples=8", "cli.eval:make_parser"),
    "sample": Verb("compare answers of student and teacher", "opd sample runs/NAME --prompt TEXT", "cli.sample_score:make_sample_parser"),
    "score": Verb("compare their log-probs of a text's tokens", "opd score runs/NAME --text TEXT", "cli.sample_score:make_score_parser"),
    "ls": Verb("list models, data, experiments and runs", "opd ls runs", "cli.ls:make_ls_parser"),
    "cp": Verb("copy a shipped YAML file to change it", "opd cp experiment/tiny", "cli.ls:make_cp_parser"),
    "compare": Verb("rank runs, with the options that differ", "opd compare sweeps/first", "cli.report:make_compare_parser"),
    "report": Verb("show runs as one HTML file, token by token", "opd report runs/first", "cli.report:make_report_parser"),
    "export": Verb("save a run's model as a model folder", "opd export runs/first --out first", "cli.export:make_parser"),
    "completion": Verb("print tab completion for bash, zsh or fish", 'eval "$(opd completion bash)"', "cli.completion:make_parser"),
}


def make_parser(verb: str) -> Any:
    """Import the module of `verb` and return its `Parser`."""
    module, _, function = VERBS[verb].parser.partition(":")
    return vars(import_module(f"opd.{module}"))[function]()


def usage() -> str:
    """Return the help text: for each verb one line with its summary and one with an example."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{verb.summary}\n  {'':<{width}}{verb.example}" for name, verb in VERBS.items())
    return f"""Usage: opd VERB [arguments]

On-policy distillation: a small language model generates, a better one scores every token, the small one is trained towards it.

{verbs}

  opd VERB --help   help for one verb
  opd --version     the version

Try it without a network, in about a minute: opd train experiment=tiny"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first word names with the other words, and return the exit code."""
    prepare_process()
    words = list(sys.argv[1:] if argv is None else argv)
    first, rest = (words[0], words[1:]) if words else ("help", [])
    if first == "help" and rest:
        first, rest = rest[0], ["--help"]
    if first in ("help", "-h", "--help", "--version"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `opd --help | head -1` must not end in a traceback
        print(f"opd {__version__}" if first == "--version" else usage())
        return errors.OK
    if any("\udc80" <= character <= "\udcff" for word in words for character in word):  # bytes that are no text here
        print(f"opd: error: {' '.join(words)!a} is not text in the encoding of this locale: set PYTHONUTF8=1", file=sys.stderr)
        return errors.USAGE
    if first in VERBS:
        code: int = make_parser(first).run(rest)
        return code
    if "=" in first:
        problem = f"{first}: name a verb first, for example opd train {first}"
    else:
        close = difflib.get_close_matches(first, VERBS, n=1)
        problem = f"{first}: no such verb; " + (f"did you mean {close[0]}?" if close else f"choose from {', '.join(VERBS)}")
    print(f"opd: error: {problem}", file=sys.stderr)
    return errors.USAGE
