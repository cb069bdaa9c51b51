"""The runner: check what can be checked, find where to start, run the loop, and write what happens to the run folder."""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from opd import signals
from opd.config.compose import to_dict
from opd.config.files import local_path
from opd.config.options import Control
from opd.config.schema import Config
from opd.errors import INTERNAL, INTERRUPTED, ConfigError, OpdError, OutputError, PeerError, Preempted
from opd.models.distributed import gather_tensors, is_peer_failure, make_accelerator, on_main_process, shards_weights, stop_all_processes
from opd.models.memory import estimate
from opd.models.policy import is_quantized
from opd.report import render_report
from opd.runs.folder import (
    CHECKPOINTS,
    EVALUATIONS,
    FINAL,
    METRICS,
    REPORT,
    ROLLOUTS,
    RUN,
    SUMMARY,
    RunFolder,
    Status,
    read_json,
    read_lines,
    write_text,
)
from opd.runs.outcome import objective, summarised
from opd.runs.reader import open_run
from opd.training.build import Built, Given, build, resumed_choices
from opd.training.checkpoint import Checkpoint, Checkpoints, model_tensors, read, verify
from opd.training.display import Display, NoteHandler, describe_datasets, describe_rewards
from opd.training.export import merge_quantized, save_model
from opd.training.identity import check_content, check_same, identity
from opd.training.logs import check_tracker, evaluation_metrics, start_tracking, watchdog
from opd.training.loop import Evaluated, Event, Rewound, StepDone, Trainer
from opd.training.metrics import rollout_records, run_costs, sample_text
from opd.training.spans import describe

log = logging.getLogger(__name__)

OnEvent = Callable[[Event], None]


def run(config: Config, folder: Path) -> float | None:
    """Train as configured and return the objective of a sweep."""
    return objective(config.sweep, train(config, folder))


def train(config: Config, folder: Path, given: Given | None = None, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Distil into `folder` and return the summary. Raises `OpdError` for everything but defects.

    Args:
        given: Objects that replace what the config names.
        on_event: Called with every event of the loop.
    """
    quiet_libraries()
    gc.collect()  # an earlier run of a sweep may have left memory behind
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    check_tracker(config.track.tool)
    accelerator = make_accelerator(config, folder)
    run_folder = RunFolder(folder, writes=accelerator.is_main_process)
    with ExitStack() as stack:
        stack.enter_context(signals.deferred())
        on_main_process(accelerator, lambda: claim(run_folder, stack))
        stack.enter_context(run_folder.unchanged_if_refused())
        background = accelerator.device.type == "cuda" if config.checkpoint.background is None else config.checkpoint.background
        checkpoints = Checkpoints(run_folder.path / CHECKPOINTS, config.checkpoint.keep_last, config.checkpoint.keep_best, background)
        wanted = identity(config, accelerator)
        finished = on_main_process(accelerator, lambda: find_finished(config, run_folder, wanted))
        if finished is not None:
            display = Display(finished["steps"], shown=accelerator.is_main_process)
            display.note(f"{folder} contains this run, finished; nothing to do (for a new run, set name=…)")
            display.summarise(finished, places(folder))
            return finished
        start, forced = on_main_process(accelerator, lambda: find_start(config, run_folder, checkpoints, wanted))
        run_folder.set_status(Status.running)
        with status_on_exit(accelerator, run_folder, checkpoints):
            summary = distil(config, accelerator, run_folder, checkpoints, start, forced, given or Given(), on_event)
        run_folder.set_status(Status.done, exit_code=0)
        return summary


def evaluate(config: Config, folder: Path, given: Given) -> dict[str, float]:
    """Evaluate the student without training and return the metrics as trackers get them. `folder`: for temporary files."""
    quiet_libraries()
    with ExitStack() as stack:
        built = build(config, make_accelerator(config, folder), Checkpoints(folder, 1, keep_best=False), given, stack, None)
        evaluations = [event.evaluation for event in built.trainer.evaluate() if isinstance(event, Evaluated)]
        return evaluation_metrics(evaluations[0])


def quiet_libraries() -> None:
    """Turn off progress bars and advice of the libraries, which would tear the display."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # an error that follows repeats what it logs about a file


def claim(run_folder: RunFolder, stack: ExitStack) -> None:
    """Make the run folder and lock it against other processes."""
    run_folder.prepare()
    stack.enter_context(run_folder.lock())


def write_composed_config(config: Config, run_folder: RunFolder) -> None:
    """Write `.hydra/`, if Hydra composed this run. Hydra itself would write it before it is certain that the folder will have this run."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return
    hydra = HydraConfig.get()
    if Path(hydra.runtime.output_dir).resolve() == run_folder.path.resolve():
        parts = {"config": to_dict(config), "hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
        run_folder.write_hydra({name: OmegaConf.to_yaml(part) for name, part in parts.items()})


@contextmanager
def status_on_exit(accelerator: Accelerator, run_folder: RunFolder, checkpoints: Checkpoints) -> Iterator[None]:
    """Write whatever ends the run to `status.json`, with the exit code."""
    try:
        yield
    except KeyboardInterrupt:
        run_folder.set_status(Status.failed, "interrupted", INTERRUPTED)
        raise
    except Preempted as error:
        moments = checkpoints.moments()
        saved = f"the same command resumes from {checkpoints.path(*moments[-1])}" if moments else "nothing was trained yet"
        stopped = Preempted(f"{error}; {saved}")
        run_folder.set_status(Status.preempted, str(stopped), stopped.exit_code)
        raise stopped from None
    except torch.OutOfMemoryError as error:
        out_of_memory = ConfigError(
            f"{accelerator.device} has too little memory ({str(error).splitlines()[0]}): lower train.max_tokens_per_micro_batch, set "
            "train.activation_checkpointing=true, or, while sampling, lower sampling.batch_size and eval.batch_size"
        )
        run_folder.set_status(Status.failed, str(out_of_memory), out_of_memory.exit_code)
        raise out_of_memory from error
    except Exception as error:
        if is_peer_failure(error):
            gone = PeerError("another process of the run ended; its message is the reason")
            run_folder.set_status(Status.failed, str(gone), gone.exit_code)
            raise gone from error
        code = error.exit_code if isinstance(error, OpdError) else INTERNAL
        run_folder.set_status(Status.failed, f"{type(error).__name__}: {error}", code)
        raise


# Where to start.


def find_finished(config: Config, run_folder: RunFolder, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of this very run, if it is finished. Raises `ConfigError` when the folder holds another run."""
    stored = read_json(run_folder.path / RUN)
    if stored is None:
        return None
    is_done = run_folder.status() is Status.done
    has_results = is_done or any((run_folder.path / CHECKPOINTS).glob("*step_*"))
    if config.resume == "never" and has_results:
        raise ConfigError(f"resume=never: {run_folder.path} already contains a run; set another name=…, or resume=auto to resume it")
    if not has_results or config.resume != "auto":
        return None
    changed = check_same(stored, wanted, run_folder.path, config.resume_force)
    return read_json(run_folder.path / SUMMARY) if is_done and not changed else None


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
    else:
        problem = verify(local_path(config.resume))
        if problem is not None:
            raise OutputError(
                f"resume={config.resume}: not a usable checkpoint: {problem}; name a folder such as "
                "runs/NAME/checkpoints/step_000100, or set resume=auto or resume=never"
            )
        start = read(local_path(config.resume))
    return start, [] if start is None else check_same(start.state, wanted, start.path, config.resume_force)


@dataclass(frozen=True, slots=True)
class History:
    """What the run logged before it was resumed, and the step and score of its best evaluation."""

    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    best: dict[str, float] | None


def begin_logs(run_folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer, start: Checkpoint | None) -> None:
    """Cut the logs where the run starts: at nothing, or at the checkpoint it resumes from."""
    run_folder.begun = True
    if start is None:
        run_folder.rewind(-1)
    else:
        run_folder.copy_logs(start.path.parent.parent)
        run_folder.rewind(start.step)
        checkpoints.set_aside(start.moment)
    run_folder.write(RUN, trainer.saved_state)


def restore_history(accelerator: Accelerator, run_folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer) -> History:
    """Set the trainer's counters from the logs, and return the logs."""
    metrics, evaluations = run_folder.path / METRICS, run_folder.path / EVALUATIONS
    history = on_main_process(accelerator, lambda: History(read_lines(metrics), read_lines(evaluations), checkpoints.best()))
    trainer.trained_tokens = int(sum(line["tokens"] for line in history.metrics))
    if any(line["model"] == "student" and line["step"] == trainer.step for line in history.evaluations):
        trainer.evaluated = trainer.step
    if history.best is not None and history.best["step"] <= trainer.step:
        trainer.best = history.best["score"]
    return history


# The run.


def distil(
    config: Config,
    accelerator: Accelerator,
    run_folder: RunFolder,
    checkpoints: Checkpoints,
    start: Checkpoint | None,
    forced: list[str],
    given: Given,
    on_event: OnEvent,
) -> dict[str, Any]:
    """Build, run the loop, write what happens, export. `forced`: differences from the resumed run that are accepted."""
    if given.student is None and given.teacher is None:
        memory = on_main_process(
            accelerator, lambda: estimate(config, accelerator.num_processes, accelerator.device, shards_weights(accelerator))
        )
        Display(0, shown=accelerator.is_main_process).note(str(memory))
    with ExitStack() as stack:
        choices = None if start is None else resumed_choices(start.state, config)
        built = build(config, accelerator, checkpoints, given, stack, choices)
        trainer = built.trainer
        if start is not None:
            forced = forced + check_content(start.state, trainer.saved_state, start.path, config.resume_force)
            trainer.resume(start, restart_step=bool(forced))
        on_main_process(accelerator, lambda: begin_logs(run_folder, checkpoints, trainer, start))
        write_composed_config(config, run_folder)
        history = restore_history(accelerator, run_folder, checkpoints, trainer)
        display = Display(trainer.max_steps, shown=accelerator.is_main_process)
        handler = NoteHandler(display)
        logging.getLogger("opd").addHandler(handler)
        stack.callback(logging.getLogger("opd").removeHandler, handler)
        introduce(display, config, built, start)
        for difference in forced:
            log.warning("resume_force=true: %s", difference)
        start_tracking(config, accelerator, run_folder.path)
        stop_all_processes(accelerator)
        stacks = run_folder.stacks_file(accelerator.process_index)
        beat = stack.enter_context(watchdog(config.train.watchdog_minutes, stacks, run_folder.record_hang))
        evaluate_teacher(built, run_folder, history, display)
        stack.callback(display.end)
        display.begin(trainer.step)
        for event in trainer.run():
            beat()
            write_event(event, config, built, run_folder, display)
            on_event(event)
            if isinstance(event, Rewound):
                on_main_process(accelerator, lambda step=event.step: cut_logs(step, run_folder, checkpoints))  # type: ignore[misc]
                restore_history(accelerator, run_folder, checkpoints, trainer)
        display.end()
        on_main_process(accelerator, checkpoints.wait)
        return finish(config, accelerator, run_folder, built, display)


def introduce(display: Display, config: Config, built: Built, start: Checkpoint | None) -> None:
    """Show models, sizes and settings of the run."""
    trainer, processes = built.trainer, built.trainer.accelerator.num_processes
    size, n = config.train.batch_size, config.sampling.n
    parameters = trainer.student.num_parameters()  # of 4-bit weights as well
    teachers = config.parts_by_teacher
    named = ", ".join(part.teacher_name + (f" ({label or 'others'})" if len(teachers) > 1 else "") for label, part in teachers.items())
    display.note(f"{config.model.path} ({parameters / 1e6:,.1f} M parameters) learns from {named} on {trainer.accelerator.device}")
    display.note(
        f"each step: {size} prompts × {processes} {'processes' if processes > 1 else 'process'} × {n} completions = "
        f"{size * processes * n} rollouts; "
        f"{trainer.max_steps} steps over {len(trainer.prompts):,} prompts"
    )
    if config.data.mix:
        rows = Counter(prompt.dataset for prompt in trainer.prompts)
        shares = {label: dataset.weight for label, dataset in config.data.datasets.items()}
        each = (f"{label} {share / sum(shares.values()):.0%} ({rows[label]:,} prompts)" for label, share in shares.items())
        display.note(f"datasets: {', '.join(each)}")
    if trainer.strategy.is_sharded:
        held = f"{trainer.strategy.held_parameters() / 1e6:,.2f} M of the parameters"
        display.note(f"sharded ({trainer.strategy.name}): each process holds {held} between computations")
    display.note(f"sampling: {built.sampling}")
    if config.control is not Control.none:
        measured = "" if config.control is Control.self else ", which is measured as usual"
        display.note(f"control={config.control.value}: trained without the information of the teacher{measured}")
    if trainer.scoring.spans is not None:
        display.note(describe(trainer.scoring.spans))
    if built.served:
        display.note(f"teacher: {built.served}; scored at temperature 1 (ppo.temperature); no KL in evaluations of its prompts")
    for line in built.differences:
        display.note(f"warning: {line}")
    if start is not None:
        display.note(f"resuming after step {start.step} from {start.path}")
        asked, used = config.train.max_tokens_per_micro_batch, trainer.scoring.choices["max_tokens"]
        if used != asked:
            display.note(
                f"micro-batches of {used} tokens: train.max_tokens_per_micro_batch={asked} did not fit into memory before; set another "
                "number to try it"
            )


def evaluate_teacher(built: Built, run_folder: RunFolder, history: History, display: Display) -> None:
    """Evaluate the teacher under the student's decoding, once per run."""
    if any(line["model"] == "teacher" for line in history.evaluations):
        return
    with built.teacher.ready(), built.teacher.active():
        evaluation = built.trainer.evaluator.teacher(built.teacher_sampler)
    run_folder.append(EVALUATIONS, {"model": "teacher", **evaluation.to_dict()})
    if evaluation.rewards is not None:
        display.note(f"teacher: reward {describe_rewards(evaluation.rewards)}{describe_datasets(evaluation)}")


def write_event(event: Event, config: Config, built: Built, run_folder: RunFolder, display: Display) -> None:
    """Log, store, track and show what happened."""
    accelerator = built.trainer.accelerator
    match event:
        case StepDone():
            run_folder.append(METRICS, {"step": event.step, **event.metrics, "by_position": event.by_position})
            if accelerator.is_main_process:
                stored = config.track.rollouts_per_step
                records = rollout_records(built.tokenizer, event.tokens, stored, event.weights, event.alternatives)
                run_folder.write_rollouts(event.step, records)
            accelerator.log(event.metrics, step=event.step)
            rollouts = event.tokens.rollouts
            shown = next((rollout for rollout in rollouts if not rollout.given), rollouts[0])
            display.show(event, sample_text(built.tokenizer, shown) if config.track.rollouts_per_step else "")
        case Evaluated():
            run_folder.append(EVALUATIONS, {"model": "student", **event.evaluation.to_dict()})
            accelerator.log(evaluation_metrics(event.evaluation), step=event.evaluation.step)
            display.show(event)
        case Rewound():
            log.warning("rewound to step %d; %d samples are left out from here on", event.step, len(event.left_out))
            display.show(event)


def cut_logs(step: int, run_folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Cut logs and checkpoints at `step`: the run takes another way from there."""
    run_folder.rewind(step)
    checkpoints.set_aside((step, 0))


def finish(config: Config, accelerator: Accelerator, run_folder: RunFolder, built: Built, display: Display) -> dict[str, Any]:
    """Export the model, write summary and report, and return the summary."""
    trainer = built.trainer
    costs = run_costs(accelerator, trainer.step, trainer.grown, config.seed)
    metrics, evaluations = run_folder.path / METRICS, run_folder.path / EVALUATIONS
    summary = on_main_process(accelerator, lambda: summarised(read_lines(metrics), read_lines(evaluations))) | costs
    summary["control"] = config.control.value
    if is_quantized(trainer.student) and accelerator.is_main_process:
        student, weights = merge_quantized(trainer.student, trainer.strategy.masters, config, trainer.prompts, summary), None
        display.note(f"adapters merged in {student.dtype}: {summary['merge_gap']:.1e} nats per token from the quantised model")
    else:
        student, weights = final_weights(built)
    if accelerator.is_main_process:
        save_model(run_folder.path / FINAL, student, built.tokenizer, built.eos, config, summary, weights)
    run_folder.write(SUMMARY, summary)
    if accelerator.is_main_process:
        write_report(run_folder.path, summary)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:  # not end_training, which ends the process group that the next run of a sweep needs
        tracker.finish()
    display.summarise(summary, places(run_folder.path))
    return summary


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
