"""Rows of the configured dataset, as dictionaries, for training and for evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.schema import DataConfig, Source
from opd.data import arithmetic, hub
from opd.errors import ConfigError, DataError

Row = Mapping[str, Any]
Rows = Sequence[Row]

LARGEST_HELD_OUT = 500


def load_rows(config: DataConfig) -> tuple[Rows, Rows]:
    """The training and the evaluation rows. Raises `DataError` where a file, split or column is missing or a set is empty."""
    train, evaluation = LOADERS[config.source](config)
    if len(evaluation) == 0:
        raise DataError(f"the evaluation set of data.source={config.source.value} is empty; {where(config)}")
    return check_rows(train, evaluation, config)


def check_rows(train: Rows, evaluation: Rows, config: DataConfig) -> tuple[Rows, Rows]:
    """The two sets. Raises `DataError` where there is nothing to train on or a first row lacks a column."""
    if len(train) == 0:
        raise DataError(f"the training set of data.source={config.source.value} is empty; {where(config)}")
    for rows, which in ((train, "training"), (evaluation, "evaluation")):
        if len(rows):
            check_columns(rows[0], config, which)
    return train, evaluation


def where(config: DataConfig) -> str:
    if config.source is Source.python:
        return "look at train_dataset"
    if config.source in (Source.jsonl, Source.parquet):
        return f"look into data.train_path={config.train_path} and data.eval_path={config.eval_path}"
    return f"look at data.path={config.path}, data.train_split={config.train_split}, data.eval_split={config.eval_split}"


def check_columns(row: Row, config: DataConfig, which: str) -> None:
    for option, column in (("prompt", config.prompt), ("answer", config.answer), ("system", config.system)):
        optional = config.source is Source.python and option == "answer"  # rows of different kinds may be given side by side
        if column is not None and column not in row and not optional:
            remedy = "" if option == "prompt" else ", or null where there is none"
            raise DataError(
                f"data.{option}={column}: the {which} set has no such column; it has {', '.join(sorted(row))}: "
                f"set data.{option}=COLUMN{remedy}"
            )


def load_arithmetic(config: DataConfig) -> tuple[Rows, Rows]:
    return arithmetic.rows("train", config.seed), arithmetic.rows("eval", config.seed)


def load_gym(config: DataConfig) -> tuple[Rows, Rows]:
    """`data.size` questions of a reasoning-gym task: the first half to train on; of the second half, those that are not in the first."""
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("data=gym needs the package reasoning-gym: pip install 'opd[gym]'") from None
    assert config.path is not None
    try:
        questions = reasoning_gym.create_dataset(config.path, size=config.size, seed=config.seed, **config.options)
        rows = [{"question": entry["question"], "answer": str(entry["answer"])} for entry in questions]
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"data.path={config.path} data.options={config.options}: reasoning-gym says: {error}") from None
    train = rows[: config.size // 2]
    known = {row["question"] for row in train}
    return train, [row for row in rows[config.size // 2 :] if row["question"] not in known]


def load_files(config: DataConfig) -> tuple[Rows, Rows]:
    """Local JSON Lines or Parquet files; without `data.eval_path` the tail of the training file is held out."""
    assert config.train_path is not None
    train = read_file(config.train_path, "data.train_path", config.source)
    if config.eval_path is not None:
        return train, read_file(config.eval_path, "data.eval_path", config.source)
    held_out = min(LARGEST_HELD_OUT, len(train) // 10)
    if held_out == 0:
        raise DataError(
            f"data.train_path={config.train_path} has {len(train)} rows, too few to hold a tenth out for evaluation; "
            "set data.eval_path=FILE"
        )
    return train.select(range(len(train) - held_out)), train.select(range(len(train) - held_out, len(train)))


def read_file(path: str, option: str, source: Source) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not Path(path).is_file():
        raise DataError(f"{option}={path}: there is no such file")
    if Path(path).stat().st_size == 0:
        raise DataError(f"{option}={path}: the file is empty")
    try:
        return load_dataset("json" if source is Source.jsonl else "parquet", data_files=path, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"{option}={path}: cannot be read as {source.value}: {reason}") from None


def load_hub(config: DataConfig) -> tuple[Rows, Rows]:
    """Two splits of a dataset of the hub, or of a local folder in the same layout."""
    from datasets import load_dataset

    assert config.path is not None
    hub.expect(config.path)
    try:
        return tuple(load_dataset(config.path, config.subset, split=split) for split in (config.train_split, config.eval_split))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path={config.path} data.subset={config.subset}: cannot be loaded ({reason}). Offline: a local copy as "
            "data.path=FOLDER, or data=jsonl data.train_path=FILE; experiment=tiny needs no download"
        ) from None


def load_python(config: DataConfig) -> tuple[Rows, Rows]:
    raise ConfigError("data.source=python is for rows that OnPolicyDistillationTrainer was given; take data=jsonl, parquet or hub")


LOADERS = {
    Source.arithmetic: load_arithmetic,
    Source.gym: load_gym,
    Source.hub: load_hub,
    Source.jsonl: load_files,
    Source.parquet: load_files,
    Source.python: load_python,
}
