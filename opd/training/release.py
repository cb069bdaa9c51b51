"""A run's model as a folder of its own: from its end or from a checkpoint, adapters merged, in the dtype asked for, and on the hub."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from opd.config.compose import restore_config, to_config
from opd.config.schema import Config
from opd.data import hub
from opd.errors import ConfigError, DataError, OutputError
from opd.models import load as models
from opd.models.policy import add_adapters
from opd.runs.folder import FINAL
from opd.runs.outcome import achieved
from opd.runs.reader import Run, is_run, open_run
from opd.training.checkpoint import Checkpoint, model_tensors, read, restore_weights, verify
from opd.training.final import export

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def release(source: Path, out: Path, dtype: str = "float32", repository: str | None = None) -> str | None:
    """Write the model of a run or checkpoint to the new folder `out`, and upload it where a repository is named: returns its address.

    Raises `OutputError` for a folder that holds something, or a checkpoint that is damaged; `DataError` for what is neither run nor
    checkpoint, or a run without its model.
    """
    if repository is not None and REPOSITORY.fullmatch(repository) is None:
        raise ConfigError(f"--push {repository}: must be OWNER/NAME")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: there is something already; name a new folder")
    config, model, tokenizer, summary = finished(source) if is_run(source) else at_checkpoint(source)
    eos = models.eos_ids(model, tokenizer)
    export(out, model.to(DTYPES[dtype]), tokenizer, eos, config, summary)
    return None if repository is None else hub.push(out, repository)


Loaded = tuple[Config, Any, PreTrainedTokenizerBase, dict[str, Any]]


def finished(folder: Path) -> Loaded:
    """What a run ended with."""
    run = open_run(folder)
    final = folder / FINAL
    if run.summary is None or not (final / "config.json").is_file():
        raise DataError(f"{folder}: the run is {run.status}, not done, or {FINAL}/ is gone; name one of its checkpoints instead")
    model = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    return to_config(restore_config(run.config)), model, AutoTokenizer.from_pretrained(final), run.summary


def at_checkpoint(folder: Path) -> Loaded:
    """What a run was at a checkpoint: its model loaded anew, with the weights that were trained."""
    if not folder.is_dir():
        beside = sorted(path.name for path in folder.parent.glob("step_*"))
        raise DataError(f"{folder}: there is no such folder" + (f"; there are {', '.join(beside)}" if beside else ""))
    problem = verify(folder)
    if problem is not None:
        raise DataError(
            f"{folder}: neither a run folder nor a whole checkpoint ({problem}); give runs/NAME or runs/NAME/checkpoints/step_…"
        )
    checkpoint = read(folder)
    config = to_config(restore_config(checkpoint.state["config"]))
    tokenizer = models.load_tokenizer(config.model, "model")
    model = models.load_model(config.model, "model", torch.device("cpu"))
    adapters = add_adapters(model, config.lora) if config.lora.rank else None
    restore_weights(checkpoint, model_tensors(model))
    return config, model if adapters is None else adapters.merge_and_unload(), tokenizer, so_far(checkpoint)


def so_far(checkpoint: Checkpoint) -> dict[str, Any]:
    """What was measured of this checkpoint, in the words of summary.json, and which it is."""
    run = Run(checkpoint.path.parent.parent)
    metrics = [line for line in run.metrics() if line["step"] <= checkpoint.step]
    return {**achieved(metrics, run.evaluations(), checkpoint.step), "steps": checkpoint.step, "checkpoint": checkpoint.path.name}
