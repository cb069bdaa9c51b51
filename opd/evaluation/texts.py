"""The files and texts that `opd sample` and `opd score` take. Does not import torch, so that a mistake is reported at once."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from opd.config.files import eval_file, local_path
from opd.config.schema import Config
from opd.config.templates import columns_of
from opd.errors import ConfigError, DataError
from opd.runs.folder import check_output_path


def check_request(config: Config, out: Path, only_right: bool) -> None:
    """Check the arguments of `completions.write_completions`.

    Raises:
        ConfigError: The options do not go together, or there are several datasets.
        OutputError: `out` or its evaluation rows cannot be created.
    """
    for file in (out, eval_file(out)):
        check_output_path(file)
        if file.exists():
            raise ConfigError(f"--out {out}: {file} exists already; remove it, or name another file")
    if config.data.mix:
        labels = ", ".join(config.data.mix)
        raise ConfigError(f"data.mix: --out takes one dataset: leave it out, and set the options of one of {labels} as data.OPTION")
    named_columns(config)
    if only_right and config.eval.reward is None:
        raise ConfigError("--only-right: nothing is judged with eval.reward=null; set eval.reward=NAME")


def named_columns(config: Config) -> list[str]:
    """Return the columns that the teacher's views name, which training on the file needs too.

    Raises `ConfigError` where the file has something else in a column of that name.
    """
    own = ["completion", "reward", *(["system"] if config.data.system not in (None, "system") else [])]
    names = []
    for option, template in (("teacher.prompt", config.teacher.prompt), ("teacher.contrast", config.teacher.contrast)):
        names += columns_of(template)
        if taken := [name for name in columns_of(template) if name in own]:
            raise ConfigError(f"{option}: --out FILE has something else in the column {taken[0]}; rename it in the data and in {option}")
    return names


def read_prompts(texts: Sequence[str], file: str | None, ask: Callable[[], str]) -> Sequence[str]:
    """Return the prompts of the command line and the lines of a file; without either, `ask` until an empty answer or the end of input."""
    prompts = list(texts)
    if file is not None:
        prompts += [line for line in read_text(file).split("\n") if line.strip()]
    if not texts and file is None:
        with suppress(EOFError):
            while line := ask():
                prompts.append(line)
    return prompts


def read_text(file: str) -> str:
    """Return the content of a text file. Raises `DataError` where it is not one."""
    try:
        with open(local_path(file), encoding="utf-8") as stream:  # noqa: PTH123 - "/dev/stdin" too
            return stream.read()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not a text in UTF-8") from None
