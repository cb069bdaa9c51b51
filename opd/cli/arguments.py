"""What every verb with plain arguments does: read them, do the task, and turn what goes wrong into one line and an exit code."""

import argparse
import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from opd import errors
from opd.runs.text import one_line

# Hydra's flags that take the next word.
WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--info", "-i", "--package", "-p")


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise errors.ConfigError(f"{message}; {self.prog} --help shows the arguments")


def parser(verb: str, does: str, example: str) -> Parser:
    """For `opd VERB`: add its arguments. example: one command line or several, a line each."""
    return Parser(
        prog=f"opd {verb}",
        description=does,
        epilog="\n".join(f"  {line}" for line in ("examples:", *example.splitlines())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def own(verb: str) -> Parser:
    """For the flags that `opd VERB` has besides the config's options and Hydra's."""
    return Parser(prog=f"opd {verb}", add_help=False, allow_abbrev=False)


def launch(arguments: Parser, task: Callable[[argparse.Namespace], int], words: Sequence[str]) -> int:
    """Call `task` with what `words` say, and return its exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `opd ls | head -1` ends without a complaint
    try:
        return task(arguments.parse_args(words))
    except SystemExit as stop:
        return int(stop.code or errors.OK)
    except KeyboardInterrupt:
        return errors.INTERRUPTED
    except errors.OpdError as error:
        message, code = f"error: {error}", error.exit_code
    except OSError as error:
        message, code = f"error: {error.filename or 'file'}: {error.strerror}", errors.OUTPUT
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends in a message and an exit code
        traceback.print_exception(error)
        message, code = f"internal error: {type(error).__name__}: {error}", errors.INTERNAL
    with contextlib.suppress(BrokenPipeError):
        print(f"opd: {one_line(message)}", file=sys.stderr, flush=True)
    return code


def count(word: str) -> int:
    """A whole number from 0 on, as argparse takes types."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 0 on")
    return int(word)


def some(word: str) -> int:
    """A whole number from 1 on, as argparse takes types."""
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from 1 on")
    return int(word)


def targets(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that name what to look at, and those that are left for Hydra: flags with their values, and overrides.

    A target has no `=`, or is a folder all the same, as those of a sweep's members are.
    """
    named, rest, value = [], [], False
    for word in words:
        if not value and not word.startswith(("-", "+", "~")) and ("=" not in word or Path(word).is_dir()):
            named.append(word)
        else:
            rest.append(word)
        value = word in WITH_VALUE
    return named, rest
