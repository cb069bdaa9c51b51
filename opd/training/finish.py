"""The end of a run: the model in `final/`, summary.json and report.html."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from opd.config.compose import to_dict
from opd.config.options import Best
from opd.models.distributed import gather_tensors, on_main_process
from opd.models.policy import is_quantized
from opd.report import render_report
from opd.runs.folder import EVALUATIONS, FINAL, METRICS, REPORT, ROLLOUTS, SUMMARY, RunFolder, Status, read_lines, write_text
from opd.runs.outcome import find_warnings, summarised
from opd.runs.reader import open_run
from opd.training.build import Built
from opd.training.checkpoint import Checkpoint, Checkpoints, read, verify
from opd.training.display import Display
from opd.training.export import checkpoint_summary, merge_quantized, save_model
from opd.training.metrics import run_costs
from opd.training.tensors import model_tensors, restore_weights

log = logging.getLogger(__name__)

Lines = list[dict[str, Any]]


def read_logs(run_folder: RunFolder) -> tuple[Lines, Lines]:
    """Return the metrics and the evaluations so far."""
    return read_lines(run_folder.path / METRICS), read_lines(run_folder.path / EVALUATIONS)


def finish(run_folder: RunFolder, built: Built, display: Display) -> dict[str, Any]:
    """Export the model, write summary and report, and return the summary."""
    trainer, config, accelerator, checkpoints = built.trainer, built.trainer.config, built.trainer.accelerator, built.trainer.checkpoints
    costs = run_costs(accelerator, trainer.step, trainer.grown, config.seed)
    run_folder.append_unwritten()
    metrics, evaluations = on_main_process(accelerator, lambda: read_logs(run_folder))
    summary = summarised(metrics, evaluations) | costs
    changes = on_main_process(accelerator, lambda: open_run(run_folder.path).changes)
    summary |= {"control": config.control.value, "warnings": find_warnings(evaluations, to_dict(config), changes)}
    summary |= {"prompts": len(trainer.prompts), "rows": built.rows}
    best = on_main_process(accelerator, lambda: find_best(checkpoints, trainer.step)) if config.checkpoint.best is Best.final else None
    card = summary
    if best is not None:
        restore_weights(best, model_tensors(trainer.student, trainer.strategy.masters))
        trainer.strategy.update_module()
        card = summary | checkpoint_summary(best.path.name, metrics, evaluations)
        display.note(f"{FINAL}/ has the weights of step {best.step}, the best evaluation (checkpoint.best=final)")
    if is_quantized(trainer.student) and accelerator.is_main_process:
        student, weights = merge_quantized(trainer.student, trainer.strategy.masters, config, trainer.prompts, card), None
        display.note(f"adapters merged in {student.dtype}: {card['merge_gap']:.1e} nats per token from the quantised model")
    else:
        student, weights = final_weights(built)
    if accelerator.is_main_process:
        save_model(run_folder.path / FINAL, student, built.tokenizer, built.eos, config, card, weights)
    summary |= {name: card[name] for name in ("checkpoint", "merge_gap") if name in card}  # those of final/
    run_folder.write(SUMMARY, summary)
    if accelerator.is_main_process:
        write_report(run_folder.path, summary)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # not end_training, which ends the process group that the next run of a sweep needs
        tracker.finish()
    display.summarise(summary, places(run_folder.path))
    return summary


def find_best(checkpoints: Checkpoints, step: int) -> Checkpoint | None:
    """Return the checkpoint of the best evaluation; None where it is that after the last step, or is damaged."""
    best = checkpoints.best()
    if best is None or int(best["step"]) == step:
        return None
    path = checkpoints.path(int(best["step"]))
    if (problem := verify(path)) is not None:
        log.error("%s, the best checkpoint, is damaged (%s): %s/ is made from the last step", path, problem, FINAL)
        return None
    return read(path)


def final_weights(built: Built) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """Return the student without adapters and, where weights are sharded, all of them, in the main process."""
    trainer, is_main = built.trainer, built.trainer.accelerator.is_main_process
    if trainer.strategy.masters is not None:
        trainer.strategy.masters.restore_module()
    sharded = trainer.strategy.is_sharded
    if built.adapters is None:
        return trainer.student, gather_tensors(model_tensors(trainer.student), keep=is_main) if sharded else None
    with trainer.strategy.gathered_weights():
        student = built.adapters.merge_and_unload() if is_main else trainer.student
        if not sharded or not is_main:
            return student, None
        return student, {name: value.detach().to("cpu", copy=True) for name, value in student.named_parameters()}


def write_report(folder: Path, summary: dict[str, Any]) -> None:
    """Write the run's page. The model is safe by now, so a failure is logged and ends nothing."""
    try:
        write_text(folder / REPORT, render_report([replace(open_run(folder), status=Status.done.value, summary=summary)]))
    except Exception:
        log.exception("%s could not be saved; opd report %s tries again", folder / REPORT, folder)


def places(folder: Path) -> dict[str, str]:
    """Return where a finished run left its results."""
    results = {"model": folder / FINAL, "metrics": folder / METRICS, "samples": folder / ROLLOUTS, "report": folder / REPORT}
    return {label: str(path) for label, path in results.items() if path.exists()}
