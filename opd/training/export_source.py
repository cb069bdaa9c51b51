"""What `opd export` takes, checked from the words and the disk: without torch, so that a mistake is reported at once."""

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from opd.config.compose import restore_config, to_unchecked_config
from opd.config.files import absolute_paths
from opd.config.schema import Config
from opd.errors import ConfigError, DataError, OutputError
from opd.runs.folder import CHECKPOINTS, FINAL
from opd.runs.reader import is_run, open_run
from opd.training.checkpoint import Checkpoint, Checkpoints, verify

NEW_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_request(source: Path, out: Path, repository: str | None) -> None:
    """Check the arguments of `export_model`, and raise what it does."""
    if repository is not None and NEW_REPOSITORY.fullmatch(repository) is None:
        raise ConfigError(f"--push {repository}: must be OWNER/NAME")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out {out}: exists and is not empty; name a new folder")
    check_source(source)
    outer = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        with TemporaryDirectory(dir=outer):  # before the work whose result it is for
            pass
    except OSError as error:
        raise OutputError(f"--out {out}: no folder can be made in {outer} ({error.strerror}); name another place") from None


def check_source(source: Path) -> None:
    """Raise `DataError` unless `source` is a finished run or an intact checkpoint."""
    if is_run(source):
        run = open_run(source)
        if run.summary is None or not (source / FINAL / "config.json").is_file():
            raise DataError(f"{source}: the run is {run.status}, not done, or {FINAL}/ is missing; name one of its checkpoints instead")
        return
    if not source.is_dir():
        others = ", ".join(sorted(path.name for path in source.parent.glob("step_*")))
        raise DataError(f"{source}: there is no such folder" + (f"; there are {others}" if others else ""))
    problem = verify(source)
    if problem is not None:
        raise DataError(
            f"{source}: not a run folder, nor an intact checkpoint ({problem}); name runs/NAME or runs/NAME/checkpoints/step_NUMBER"
        )


def best_checkpoint(run: Path) -> Path:
    """Return a run's checkpoint with the best evaluation. Raises `DataError` where there is none."""
    if not is_run(run):
        raise DataError(f"{run}: --best takes the folder of a run, such as runs/NAME")
    checkpoints = Checkpoints(run / CHECKPOINTS, 1, keep_best=True)
    best = checkpoints.best()
    if best is None:
        kept = ", ".join(checkpoints.path(*moment).name for moment in checkpoints.moments())
        dropped = open_run(run).config.get("checkpoint", {}).get("best") == "drop"
        reason = "no evaluation after step 0 has a checkpoint" + " (checkpoint.best=drop keeps none for it)" * dropped
        raise DataError(f"{run}: {reason}" + (f"; name one of {kept}, as {run}/{CHECKPOINTS}/NAME" if kept else ""))
    return checkpoints.path(int(best["step"]))


def checkpoint_config(checkpoint: Checkpoint) -> Config:
    """Return the config of a checkpoint's run, with paths as they are from here and the learning rate that was chosen."""
    run = checkpoint.path.resolve().parent.parent
    started_in = open_run(run).started_in if is_run(run) else None
    config = to_unchecked_config(restore_config(absolute_paths(checkpoint.state["config"], started_in)))
    rate = config.optim.lr or checkpoint.state.get("choices", {}).get("lr")
    return replace(config, optim=replace(config.optim, lr=rate))
