"""Load the rows of the configured dataset, as dictionaries, for training and for evaluation."""

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import pyarrow
from datasets import DatasetDict, ReadInstruction, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError
from fsspec import compression, utils  # type: ignore[import-untyped]
from pyarrow import parquet

from opd.config.files import ENDINGS, data_files, ending_of, local_path, missing
from opd.config.options import DataConfig, Source
from opd.config.several import did_you_mean
from opd.config.templates import columns_of
from opd.data import arithmetic, hub
from opd.errors import ConfigError, DataError
from opd.runs.text import one_line

Row = Mapping[str, Any]
Rows = Sequence[Row]

MAX_HELD_OUT = 500  # rows
NOT_SPACE = re.compile(r"\S")


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
    columns = {"prompt": config.prompt, "answer": config.answer, "system": config.system, "completion": config.completion}
    if config.source is Source.python:
        del columns["answer"]  # rows may mix answers and `get_reward`
    for rows, which in ((train, "training"), (evaluation, "evaluation")):
        for option, column in columns.items():
            if len(rows) == 0 or column is None or has_column(rows, column) or (option == "completion" and rows is not train):
                continue
            hint = did_you_mean(column, rows[0])
            if is_text(option, column) and not (hint and not columns_of(column)):
                lacking = [name for name in columns_of(column) if not has_column(rows, name)]
                if not lacking:
                    continue
                hint, column = did_you_mean(lacking[0], rows[0]), f"{{{lacking[0]}}}"
            kinds = {"prompt": ", or a text with {COLUMN} in it", "system": ", a text of several words, or data.system=null for none"}
            there = ", ".join(sorted({*rows[0]} - {"get_reward"}))
            raise DataError(
                f"data.{option}={column}: the {which} set has no such column; it has {there}: {hint}set "
                f"data.{option}=COLUMN" + kinds.get(option, f", or data.{option}=null for none")
            )
    return train, evaluation


def has_column(rows: Rows, name: str) -> bool:
    return any(name in row for row in rows)


def is_text(option: str, value: str) -> bool:
    """Return whether a value of `data.prompt` or `data.system` that is no column's name is a text: with a {column}, or of several words."""
    return bool(option in ("prompt", "system") and columns_of(value)) or (option == "system" and len(value.split()) > 1)


def prompt_column(config: DataConfig) -> str:
    """Return the column of the prompt, the first of a template."""
    return (columns_of(config.prompt) or [config.prompt])[0]


def origin(config: DataConfig) -> str:
    if config.source is Source.python:
        return "check train_dataset"
    if config.source in (Source.jsonl, Source.parquet):
        return f"check data.train_path={config.train_path} and data.eval_path={config.eval_path}"
    return f"check data.path={config.path}, data.train_split={config.train_split}, data.eval_split={config.eval_split}"


def load_arithmetic(config: DataConfig) -> tuple[Rows, Rows]:
    size = arithmetic.QUESTIONS if config.size is None else config.size
    if not 9 <= size <= arithmetic.QUESTIONS:
        raise ConfigError(f"data.size={size}: data=arithmetic has 9 to {arithmetic.QUESTIONS} questions")
    train, held_out = (arithmetic.rows(split, config.seed, size) for split in ("train", "eval"))
    return train, held_out


def load_gym(config: DataConfig) -> tuple[Rows, Rows]:
    """Generate `data.size` questions of a reasoning-gym task: the first half to train on, the new ones of the second to evaluate on."""
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("data=gym needs the package reasoning-gym: pip install 'opd[gym]'") from None
    assert config.path is not None
    size = config.size or 2000
    try:
        questions = reasoning_gym.create_dataset(config.path, size=size, seed=config.seed, **config.options)
        rows = [{"question": entry["question"], "answer": str(entry["answer"])} for entry in questions]
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"data.path={config.path} data.options={config.options}: reasoning-gym says: {error}") from None
    train, rest = rows[: size // 2], rows[size // 2 :]
    trained_on = {row["question"] for row in train}
    return train, [row for row in rest if row["question"] not in trained_on]


def load_files(config: DataConfig) -> tuple[Rows, Rows]:
    """Read local JSON or Parquet files. Without `data.eval_path` the tail of the training file is held out."""
    assert config.train_path is not None
    option = f"data.train_path={config.train_path}"
    rows = read_files(config.train_path, option, config)
    if config.eval_path is None:
        return hold_out(rows, f"{option}: {len(rows)} rows are too few to hold out a tenth for evaluation; set data.eval_path=FILE")
    return rows, read_files(config.eval_path, f"data.eval_path={config.eval_path}", config)


def read_files(path: str, option: str, config: DataConfig) -> list[Row]:
    """Return the rows of a file, or of all files of a folder or a pattern.

    Raises:
        DataError: There is no such file, `data.source` is of another kind, or a file cannot be read.
    """
    rows: list[Row] = []
    for file in data_files(path) or [local_path(path)]:
        named = option if file == local_path(path) else f"{option}: {file}"
        ending, kind = ending_of(file), config.source.value
        if ending is not None and ENDINGS[ending] is not config.source:
            raise DataError(f"{named}: data={kind} does not read it: set data={ENDINGS[ending].value}")
        rows += read_file(file, "csv" if ending in ("csv", "tsv") else kind, named, prompt_column(config))
    return rows


def hold_out(rows: Rows, too_few: str) -> tuple[Rows, Rows]:
    """Split off the tail for evaluation. Raises `DataError` with the message `too_few`."""
    train = len(rows) - min(MAX_HELD_OUT, len(rows) // 10)
    if train == len(rows):
        raise DataError(too_few)
    return rows[:train], rows[train:]


def read_file(path: Path, kind: str, option: str, prompt: str) -> list[Row]:
    """Return the rows of a file, compressed or not, with the values as they stand there.

    `datasets` would guess types (a text such as 2024-05-01 becomes a time), take `*`, `[` and `::` in a path for patterns, and return the
    rows of an earlier file with the same name, size and time.

    Args:
        kind: jsonl or json (either may be in either), csv or parquet.
        option: The option with its value, for messages.
        prompt: The column that tells a row from an object around the rows.
    """
    try:
        if not path.is_file():
            raise DataError(f"{option}: {missing(path, 'file')}")
        if path.stat().st_size == 0:
            raise DataError(f"{option}: the file is empty")
        with path.open("rb") as packed:
            method = utils.infer_compression(path.name)
            if method == "zip" and len(ZipFile(packed).namelist()) != 1:
                raise ValueError("the archive must contain one file")
            with compression.compr[method](packed, mode="rb") as stream:
                content = stream.read()
        if kind == "parquet":
            return read_parquet(content)
        text = content.decode(json.detect_encoding(content))
        return read_csv(text, "\t" if ".tsv" in path.suffixes else ",") if kind == "csv" else read_json(text, prompt)
    except UnicodeDecodeError as error:
        raise DataError(f"{option}: is not {error.encoding} at byte {error.start + 1:,}: save the file as UTF-8") from None
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - each kind of file and of compression has errors of its own
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"{option}: cannot be read as {kind}: {reason}; correct the file, or name another") from None


class JsonNumber(float):
    """A number whose text is what stands in the file: 1.50, 1e5, -0."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


def read_json(text: str, prompt: str) -> list[Row]:
    """Return the objects of JSON Lines, of a list, or of the one list in an object without the column `prompt`."""
    decoder = json.JSONDecoder(
        object_pairs_hook=unique_keys,
        parse_int=lambda digits: JsonNumber(digits) if digits == "-0" else int(digits),
        parse_float=JsonNumber,
        parse_constant=JsonNumber,
    )
    rows: list[Any] = []
    position = 0
    while found := NOT_SPACE.search(text, position):
        try:
            row, position = decoder.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            begins = text.count("\n", 0, found.start()) + 1
            where = f"line {error.lineno} column {error.colno}, in the object that begins in line {begins}"
            raise ValueError(f"{where}: {error.msg}") from None
        rows.append(row)
    if len(rows) == 1 and isinstance(rows[0], dict) and prompt not in rows[0]:
        lists = [value for value in rows[0].values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if len(lists) == 1 else rows
    elif len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f'row {index} is no object such as {{"{prompt}": "..."}}')
    return rows


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"an object has the same key twice; its keys are {', '.join(key for key, _ in pairs)}")
    return values


def read_csv(text: str, delimiter: str) -> list[Row]:
    """Return the rows of a table. Where the header has one column with `delimiter`, another one that gives it several is the table's."""
    headers = {mark: next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []) for mark in (delimiter, ",", ";", "\t")}
    if len(headers[delimiter]) < 2:
        delimiter = next((mark for mark, names in headers.items() if len(names) > 1), delimiter)
    rows: list[Row] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has more or fewer values than there are columns")
    return rows


def read_parquet(content: bytes) -> list[Row]:
    table = parquet.read_table(pyarrow.BufferReader(content))
    short = (pyarrow.float16(), pyarrow.float32())  # 0.1 would become 0.10000000149011612
    columns = [column.with_type(pyarrow.string()) if column.type in short else column for column in table.schema]
    rows: list[Row] = table.cast(pyarrow.schema(columns)).to_pylist()
    return rows


def load_hub(config: DataConfig) -> tuple[Rows, Rows]:
    """Load two splits of a dataset on the hub, of a local folder with the same layout, or of one that `save_to_disk` wrote."""
    assert config.path is not None
    folder = local_path(config.path)
    try:
        if folder.is_dir():
            return load_folder(folder.absolute(), config)
        hub.detect_offline()
        return tuple(load_dataset(config.path, config.subset, split=split) for split in (config.train_split, config.eval_split))
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "use a local copy with data.path=FOLDER, or data=jsonl data.train_path=FILE; experiment=tiny needs no download"
        remedy = "Check data.train_split and data.eval_split" if folder.is_dir() else f"Offline: {remedy}"
        raise DataError(f"data.path={config.path} data.subset={config.subset}: cannot be loaded ({reason}). {remedy}") from None


def load_folder(folder: Path, config: DataConfig) -> tuple[Rows, Rows]:
    with TemporaryDirectory() as temporary:
        # `datasets` would take `*`, `[` and `::` in the folder's name for patterns.
        links = shutil.copytree(folder, Path(temporary) / "data", copy_function=os.symlink)
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = load_from_disk(links)
            splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
            if saved is not splits and not config.eval_split.startswith("train"):
                train = select(splits, config.train_split)
                return hold_out(train, f"data.path={config.path}: {len(train)} rows are too few to hold out a tenth for evaluation")
        else:
            builder = load_dataset_builder(str(links), config.subset, cache_dir=temporary)
            if builder.name not in ("json", "csv", "parquet"):
                return tuple(load_dataset(str(folder), config.subset, split=split) for split in (config.train_split, config.eval_split))
            splits, column = {}, prompt_column(config)
            for split, files in builder.config.data_files.items():
                options = [(Path(file), f"data.path={config.path}: {Path(file).relative_to(links)}") for file in files]
                splits[str(split)] = [row for file, option in options for row in read_file(file, builder.name, option, column)]
        return select(splits, config.train_split), select(splits, config.eval_split)


def select(splits: Mapping[str, Rows], instruction: str) -> list[Row]:
    """Return the rows that an instruction such as `train[:90%]` names. Raises `ValueError` for an unknown split."""
    parts = ReadInstruction.from_spec(instruction).to_absolute({name: len(rows) for name, rows in splits.items()})
    return [row for part in parts for row in islice(splits[part.splitname], part.from_, part.to)]


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
