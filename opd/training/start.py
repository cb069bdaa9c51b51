"""Where a run starts: not at all (already finished), from scratch, or from a checkpoint with the logs and counters of its moment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.files import local_path
from opd.config.schema import Config
from opd.errors import ConfigError, OutputError
from opd.models.distributed import on_main_process
from opd.runs.folder import CHECKPOINTS, FINAL, RUN, SUMMARY, RunFolder, Status, read_json
from opd.runs.reader import CHANGES, STARTED_IN
from opd.training.checkpoint import Checkpoint, Checkpoints, Moment, read, verify
from opd.training.finish import read_logs
from opd.training.identity import check_files, check_same
from opd.training.loop import Trainer

Lines = list[dict[str, Any]]


def find_finished(config: Config, run_folder: RunFolder, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of this very run, if it is finished. Raises `ConfigError` when the folder holds another run."""
    stored = read_json(run_folder.path / RUN)
    if stored is None:
        return None
    is_done = run_folder.status() is Status.done
    has_results = is_done or any((run_folder.path / CHECKPOINTS).glob("*step_*"))
    if config.resume == "never" and has_results:
        raise ConfigError(f"resume=never: {run_folder.path} already contains a run; set another name=…, or resume=auto to resume it")
    if has_results and config.resume != "auto" and run_of(local_path(config.resume)) != run_folder.path.resolve():
        raise ConfigError(
            f"resume={config.resume}: {run_folder.path} already contains another run; set another name=…, or resume=auto to resume it"
        )
    if not has_results or config.resume != "auto":
        return None
    changed = check_same(stored, wanted, run_folder.path, config.resume_force)
    if not is_done:
        return None
    changed += check_files(stored, wanted, run_folder.path, config.resume_force)  # of other runs once they are loaded
    return None if changed else read_json(run_folder.path / SUMMARY)


def find_start(
    config: Config, run_folder: RunFolder, checkpoints: Checkpoints, wanted: Mapping[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to resume from, and the differences of its run that `resume_force` accepts.

    Raises `ConfigError` when it is another run's, `OutputError` when it is unusable.
    """
    if config.resume == "never":
        return None, []
    if config.resume == "auto":
        start = checkpoints.newest()
        if start is None and run_folder.status() is Status.done:
            raise ConfigError(
                f"{run_folder.path}: is done and kept no checkpoint to resume from (checkpoint.keep_last): set another name=…, and "
                f"model.path={run_folder.path / FINAL} to train its model further"
            )
    else:
        problem = verify(local_path(config.resume))
        if problem is not None:
            raise OutputError(
                f"resume={config.resume}: not a usable checkpoint: {problem}; name a folder such as "
                "runs/NAME/checkpoints/step_000100, or set resume=auto or resume=never"
            )
        start = read(local_path(config.resume))
    if start is None:
        return None, []
    forced = check_same(start.state, wanted, start.path, config.resume_force)
    if run_folder.status() is Status.done:
        forced += check_files(start.state, wanted, start.path, config.resume_force)
    return start, forced


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to."""
    return checkpoint.resolve().parent.parent


def refuse_finished(run_folder: RunFolder, trainer: Trainer) -> None:
    """Raise `ConfigError` where a finished run has no steps left that other options could apply to."""
    summary = read_json(run_folder.path / SUMMARY)
    if summary is not None and summary["steps"] == trainer.step and trainer.step >= trainer.max_steps:
        raise ConfigError(
            f"{run_folder.path}: its {trainer.step} steps are done, so other options change nothing; set train.max_steps above "
            f"{trainer.step} to train longer, another name=… to train again, or evaluate it with opd eval {run_folder.path}"
        )


def begin_logs(run_folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer, start: Checkpoint | None, forced: list[str]) -> None:
    """Cut the logs where the run starts: at nothing, or at the checkpoint it resumes from, whose options differ by `forced`."""
    run_folder.begun = True
    changes = [*forced]
    if start is not None:
        source = run_of(start.path)
        changes = [*(read_json(source / RUN) or {}).get(CHANGES, ()), *forced]
        run_folder.copy_logs(source)
    cut_logs((-1, 0) if start is None else start.moment, run_folder, checkpoints)
    run_folder.write(RUN, trainer.saved_state | {STARTED_IN: str(Path.cwd()), CHANGES: changes})


def cut_logs(moment: Moment, run_folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Cut checkpoints and logs at a moment. Checkpoints first: logs without their last lines would not fit a checkpoint from after them."""
    checkpoints.set_aside(moment)
    run_folder.rewind(moment[0])


def restore_counters(run_folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer) -> Lines:
    """Set the trainer's counters from the logs, and return the evaluations. Collective."""
    (metrics, evaluations), best = on_main_process(trainer.accelerator, lambda: (read_logs(run_folder), checkpoints.best()))
    trainer.trained_tokens = int(sum(line["tokens"] for line in metrics))
    if any(line["model"] == "student" and line["step"] == trainer.step for line in evaluations):
        trainer.evaluated = trainer.step
    trainer.best = None if best is None or best["step"] > trainer.step else best["score"]
    return evaluations


def changes_teacher(forced: Sequence[str]) -> bool:
    """Return whether accepted differences concern the teacher's evaluation: what answers, and which prompts and rewards."""
    return any(difference.startswith(("teacher", "eval", "data")) for difference in forced)
