"""Load the rows of the configured dataset, as dictionaries, for training and for evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.schema import DataConfig, Source
from opd.data import arithmetic, hub
from opd.errors import ConfigError, DataError

Row = Mapping[str, Any]
Rows = Sequence[Row]

MAX_HELD_OUT = 500  # rows


def load_rows(config: DataConfig) -> tuple[Rows, Rows]:
    """Return the rows for training and for evaluation. Raises `DataError` if a file, split, column or all rows are missing."""
    train, evaluation = LOADERS[config.source](config)
    if len(evaluation) == 0:
        raise DataError(f"the evaluation set of data.source={config.source.value} is empty; {origin(config)}")
    return check_rows(train, evaluation, config)


def check_rows(train: Rows, evaluation: Rows, config: DataConfig) -> tuple[Rows, Rows]:
    """Return both sets. Raises `DataError` if there is nothing to train on or a column is missing."""
    if len(train) == 0:
        raise DataError(f"the training set of data.source={config.source.value} is empty; {origin(config)}")
    columns = {"prompt": config.prompt, "answer": config.answer, "system": config.system}
    if config.source is Source.python:
        del columns["answer"]  # rows may mix answers and `get_reward`
    for rows, which in ((train, "training"), (evaluation, "evaluation")):
        for option, column in columns.items():
            if len(rows) and column is not None and column not in rows[0]:
                raise DataError(
                    f"data.{option}={column}: the {which} set has no such column; it has {', '.join(sorted(rows[0]))}: set "
                    f"data.{option}=COLUMN" + ("" if option == "prompt" else f", or data.{option}=null for none")
                )
    return train, evaluation


def origin(config: DataConfig) -> str:
    if config.source is Source.python:
        return "check train_dataset"
    if config.source in (Source.jsonl, Source.parquet):
        return f"check data.train_path={config.train_path} and data.eval_path={config.eval_path}"
    return f"check data.path={config.path}, data.train_split={config.train_split}, data.eval_split={config.eval_split}"


def load_arithmetic(config: DataConfig) -> tuple[Rows, Rows]:
    return arithmetic.rows("train", config.seed), arithmetic.rows("eval", config.seed)


def load_gym(config: DataConfig) -> tuple[Rows, Rows]:
    """Generate `data.size` questions of a reasoning-gym task: the first half to train on, the new ones of the second to evaluate on."""
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
    train, rest = rows[: config.size // 2], rows[config.size // 2 :]
    trained_on = {row["question"] for row in train}
    return train, [row for row in rest if row["question"] not in trained_on]


def load_files(config: DataConfig) -> tuple[Rows, Rows]:
    """Read local JSON Lines or Parquet files. Without `data.eval_path` the tail of the training file is held out."""
    assert config.train_path is not None
    rows = read_file(config.train_path, "data.train_path", config.source)
    if config.eval_path is not None:
        return rows, read_file(config.eval_path, "data.eval_path", config.source)
    train = len(rows) - min(MAX_HELD_OUT, len(rows) // 10)
    if train == len(rows):
        raise DataError(
            f"data.train_path={config.train_path}: {len(rows)} rows are too few to hold out a tenth for evaluation; set data.eval_path=FILE"
        )
    return rows.select(range(train)), rows.select(range(train, len(rows)))


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
    """Load two splits of a dataset on the hub, or in a local folder with the same layout."""
    from datasets import load_dataset

    assert config.path is not None
    hub.expect(config.path)
    try:
        return tuple(load_dataset(config.path, config.subset, split=split) for split in (config.train_split, config.eval_split))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path={config.path} data.subset={config.subset}: cannot be loaded ({reason}). Offline: use a local copy with "
            "data.path=FOLDER, or data=jsonl data.train_path=FILE; experiment=tiny needs no download"
        ) from None


def load_python(config: DataConfig) -> tuple[Rows, Rows]:
    raise ConfigError("data.source=python: is for the rows of OnPolicyDistillationTrainer; use data=jsonl, data=parquet or data=hub")


LOADERS = {
    Source.arithmetic: load_arithmetic,
    Source.gym: load_gym,
    Source.hub: load_hub,
    Source.jsonl: load_files,
    Source.parquet: load_files,
    Source.python: load_python,
}
