"""The choice of data that the file of `data.train_path`, or of a dataset of `data.mix`, implies by its ending."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig

from opd.cli import hydra_errors
from opd.config import compose
from opd.config.files import ENDINGS, source_of
from opd.config.options import Source
from opd.runs.reader import open_run

FILES = frozenset({*ENDINGS.values(), *(source.value for source in ENDINGS.values())})  # of a composed and of a stored config


def composed(parsed: argparse.Namespace) -> DictConfig:
    """Return the config that the overrides of a command line give."""
    folder = Path(parsed.config_dir) if parsed.config_dir is not None else None
    mode = RunMode.MULTIRUN if parsed.multirun else RunMode.RUN
    return hydra_errors.explained(
        lambda: compose.loader(folder).load_configuration(parsed.config_name or "config", list(parsed.overrides), mode)
    )


def implied_data(parsed: argparse.Namespace, run: Path | None = None) -> list[str]:
    """Return the overrides that choose what reads the named files, where nothing chooses it.

    A single file chooses as `data=jsonl` does, also where a run has other data. So do the files of a mix if all of its datasets have one;
    else each chooses for its own dataset.

    Args:
        run: The one to whose config the overrides apply.
    """
    if not any("train_path" in word for word in parsed.overrides):
        return []
    words = dict(word.lstrip("+~").partition("=")[::2] for word in parsed.overrides)
    data = composed(parsed).data
    is_chosen = not {"data", "data.source"}.isdisjoint(words)
    stored: Mapping[str, Any] = open_run(run).config.get("data", {}) if run is not None and "data" not in words else {}
    reads_files = (stored.get("source") if stored and "data.source" not in words else data.source) in FILES
    path = words.get("data.train_path", "").split(",")[0].strip("'\"")
    if path and not is_chosen and not reads_files and not data.mix and not stored.get("mix"):
        source = source_of(path)
        return [] if source is None else [f"data={source.value}"]
    found: dict[str, Source] = {}
    for label, entry in data.mix.items():
        if isinstance(entry, Mapping) and isinstance(entry.get("train_path"), str) and "source" not in entry:
            own = {**stored.get("mix", {}).get(label, {})}.get("source")
            source = source_of(entry["train_path"])
            if source is not None and not (reads_files if own is None else own in FILES):
                found[str(label)] = source
    chosen: list[str] = []
    base = None
    if found and not is_chosen and not stored and len(found) == len(data.mix):
        base = next(iter(found.values()))
        chosen.append(f"data={base.value}")
    return chosen + [f"data.mix.{label}.source={source.value}" for label, source in found.items() if source is not base]
