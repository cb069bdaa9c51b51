"""The command line of a verb: its arguments, its task, and how a failure becomes one line and an exit code."""

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from opd import errors
from opd.runs.text import one_line

# Hydra's flags that take the next word.
WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--info", "-i", "--package", "-p")


def prepare_process() -> None:
    """Protect this process and those it starts from the working folder's modules, from closed streams and from poor encodings."""
    if not Path("opd/__init__.py").is_file():  # a source checkout
        os.environ["PYTHONSAFEPATH"] = "1"  # a random.py or opd.py in the working folder is nobody's `random` or `opd`
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # A file of the run with the number of a closed stream would get what is printed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes help as that of the verbs with a config."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "Usage: ")


class Parser(argparse.ArgumentParser):
    """The arguments of `opd VERB`, and the task that gets them.

    Args:
        examples: Command lines for the help text, one per line.
    """

    def __init__(self, verb: str, task: Callable[..., Any], description: str = "", examples: str = "", add_help: bool = True) -> None:
        super().__init__(
            prog=f"opd {verb}",
            description=description,
            epilog="\n  ".join(("Examples:", *examples.splitlines())),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )
        self.verb = verb
        self.task = task
        self._positionals.title, self._optionals.title = "Arguments", "Flags"

    def error(self, message: str) -> NoReturn:
        raise errors.ConfigError(f"{message}; {self.prog} --help shows the arguments")

    def check_dashes(self, words: Sequence[str]) -> None:
        """Raise `ConfigError` for a flag with one dash instead of two, or with two instead of one."""
        for word in words:
            flag = word.partition("=")[0]
            other = flag[1:] if flag.startswith("--") else f"-{flag}"
            if flag.startswith("-") and flag not in self._option_string_actions and other in self._option_string_actions:
                self.error(f"{flag}: no such flag; did you mean {other}?")

    def run(self, words: Sequence[str]) -> int:
        """Parse `words`, run the task and return the exit code."""
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `opd ls | head -1` must not end in a traceback
        try:
            self.check_dashes(words)
            self.task(self.parse_args(words))
            return errors.OK
        except SystemExit as stop:
            return int(stop.code or errors.OK)
        except KeyboardInterrupt:
            return errors.INTERRUPTED
        except errors.OpdError as error:
            message, code = f"error: {error}", error.exit_code
        except OSError as error:
            message, code = f"error: {error.filename or 'file'}: {error.strerror}", errors.OUTPUT
        except Exception as error:  # noqa: BLE001 - any defect must end in a message and an exit code
            traceback.print_exception(error)
            message, code = f"internal error: {type(error).__name__}: {error}", errors.INTERNAL
        with contextlib.suppress(OSError):
            print(f"opd: {one_line(message)}", file=sys.stderr, flush=True)
        return code


def at_least(least: int, word: str) -> int:
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least {least}")
    return int(word)


def split_targets(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `words` into targets (a run, a model) and Hydra's words: overrides, and flags with their values.

    A target contains no `=`, unless it is an existing folder: those of sweep members do.
    """
    targets, hydra_words, is_value = [], [], False
    for word in words:
        if not is_value and not word.startswith(("-", "+", "~")) and ("=" not in word or Path(word).expanduser().is_dir()):
            targets.append(word)
        else:
            hydra_words.append(word)
        is_value = word in WITH_VALUE
    return targets, hydra_words
