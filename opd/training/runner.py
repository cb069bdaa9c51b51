"""The runner: checks what can be checked, finds where to begin, runs the loop and writes what happens to the run folder."""

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from opd import signals
from opd.config.compose import to_dict
from opd.config.schema import Config
from opd.errors import INTERNAL, INTERRUPTED, ConfigError, OpdError, OutputError, PeerError, Preempted
from opd.models.accelerator import layerwise, make_accelerator, shards_weights
from opd.models.memory import estimate
from opd.models.sharding import at_rest, gathered, is_sharded, strategy, weight, whole
from opd.models.together import is_peer_failure, on_main_process, stop_all_processes
from opd.report import page
from opd.runs.files import write_text
from opd.runs.folder import FINAL, METRICS, REPORT, ROLLOUTS, RunFolder, Status
from opd.runs.outcome import objective
from opd.runs.reader import open_run
from opd.training.build import Built, Given, build, kept_choices
from opd.training.checkpoint import Checkpoint, Checkpoints, model_tensors, read, verify
from opd.training.display import Display, NoteHandler, describe_rewards
from opd.training.evaluate import Evaluation
from opd.training.final import export
from opd.training.identity import check_content, check_same, identity
from opd.training.loop import Evaluated, Rewound, StepDone, Trainer
from opd.training.record import record, sample_text
from opd.training.summary import device_name, peak_memory, summarise
from opd.training.tracking import check_tracker, start_tracking, tracked
from opd.training.watchdog import watched

log = logging.getLogger(__name__)


def run(config: Config, folder: Path) -> float | None:
    """Train as configured and return what a sweep looks at."""
    return objective(config.sweep, train(config, folder))


def train(config: Config, folder: Path, given: Given | None = None) -> dict[str, Any]:
    """Distil into `folder` and return the summary that is written there. Raises `OpdError` for all that is not a defect."""
    quiet_libraries()
    fresh_memory()
    check_tracker(config.track.tool)
    accelerator = make_accelerator(config, folder)
    run_folder = RunFolder(folder, writes=accelerator.is_main_process)
    with ExitStack() as stack:
        stack.enter_context(signals.deferred())
        on_main_process(accelerator, lambda: claim(run_folder, stack))
        checkpoints = Checkpoints(
            run_folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_best, config.checkpoint.background
        )
        wanted = identity(config, accelerator)
        finished = on_main_process(accelerator, lambda: find_finished(config, run_folder, wanted))
        if finished is not None:
            display = Display(finished["steps"], shown=accelerator.is_main_process)
            display.note(f"{folder} holds this run, finished; nothing to do (a new one: name=…)")
            display.summarise(finished, places(folder))
            return finished
        start, forced = on_main_process(accelerator, lambda: find_start(config, run_folder, checkpoints, wanted))
        keep_composed(config, run_folder)
        run_folder.set_status(Status.running)
        with told(accelerator, run_folder, checkpoints):
            summary = distil(config, accelerator, run_folder, checkpoints, start, forced, given or Given())
        run_folder.set_status(Status.done, exit_code=0)
        return summary


def keep_composed(config: Config, run_folder: RunFolder) -> None:
    """Write `.hydra/`, if Hydra composed this run. Hydra itself would before it is known whether this run may have the folder."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return
    hydra = HydraConfig.get()
    if Path(hydra.runtime.output_dir).resolve() == run_folder.path.resolve():
        parts = {"config": to_dict(config), "hydra": {"hydra": hydra}, "overrides": hydra.overrides.task}
        run_folder.write_composed({name: OmegaConf.to_yaml(part) for name, part in parts.items()})


def claim(run_folder: RunFolder, stack: ExitStack) -> None:
    """Make the run folder and let no other process write to it."""
    run_folder.prepare()
    stack.enter_context(run_folder.held())


@contextmanager
def told(accelerator: Accelerator, run_folder: RunFolder, checkpoints: Checkpoints) -> Iterator[None]:
    """Whatever ends the run is in its `status.json`, with the exit code."""
    try:
        yield
    except KeyboardInterrupt:
        run_folder.set_status(Status.failed, "interrupted", INTERRUPTED)
        raise
    except Preempted as error:
        moments = checkpoints.moments()
        saved = f"the same command goes on from {checkpoints.path(*moments[-1])}" if moments else "nothing was learnt yet"
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
            gone = PeerError("another process of the run ended; what it said is the reason")
            run_folder.set_status(Status.failed, str(gone), gone.exit_code)
            raise gone from error
        code = error.exit_code if isinstance(error, OpdError) else INTERNAL
        run_folder.set_status(Status.failed, f"{type(error).__name__}: {error}", code)
        raise


def distil(
    config: Config,
    accelerator: Accelerator,
    run_folder: RunFolder,
    checkpoints: Checkpoints,
    start: Checkpoint | None,
    forced: list[str],
    given: Given,
) -> dict[str, Any]:
    """Build, run the loop, write what happens, export. forced: what differs from the run that goes on, and is done nevertheless."""
    if given.student is None and given.teacher is None:
        zero = accelerator.distributed_type is DistributedType.DEEPSPEED
        kind = (shards_weights(accelerator), layerwise(accelerator), zero)
        memory = on_main_process(accelerator, lambda: estimate(config, accelerator.num_processes, accelerator.device, *kind))
        Display(0, shown=accelerator.is_main_process).note(str(memory))
    with ExitStack() as stack:
        built = build(config, accelerator, checkpoints, given, stack, None if start is None else kept_choices(start.state, config))
        trainer = built.trainer
        if start is not None:
            forced = forced + check_content(start.state, trainer.saved_state, start.path, config.resume_force)
            trainer.go_on(start, anew=bool(forced))
        on_main_process(accelerator, lambda: begin_logs(run_folder, checkpoints, trainer, start))
        history = catch_up(accelerator, run_folder, checkpoints, trainer)
        display = Display(trainer.max_steps, shown=accelerator.is_main_process)
        handler = NoteHandler(display)
        logging.getLogger("opd").addHandler(handler)
        stack.callback(logging.getLogger("opd").removeHandler, handler)
        introduce(display, config, built, start)
        for difference in forced:
            log.warning("resume_force=true: %s", difference)
        start_tracking(config, accelerator, run_folder.path)
        stop_all_processes(accelerator)
        beat = stack.enter_context(watched(config.train.watchdog_minutes, run_folder.stacks(accelerator.process_index), run_folder.hung))
        teacher_evaluation = evaluate_teacher(built, run_folder, history)
        if teacher_evaluation is not None and teacher_evaluation.rewards is not None:
            display.note(f"teacher: reward {describe_rewards(teacher_evaluation.rewards)}")
        stack.callback(display.end)
        display.begin(trainer.step)
        for event in trainer.run():
            beat()
            match event:
                case StepDone(step, metrics, by_position, scored):
                    run_folder.add_metrics({"step": step, **metrics, "by_position": by_position})
                    run_folder.write_rollouts(step, (record(built.tokenizer, item) for item in scored))
                    accelerator.log(metrics, step=step)
                    display.show(event, sample_text(built.tokenizer, scored))
                case Evaluated(evaluation):
                    run_folder.add_evaluation({"model": "student", **evaluation.to_dict()})
                    accelerator.log(tracked(evaluation), step=evaluation.step)
                    display.show(event)
                case Rewound(step, left_out):
                    log.warning("going on from step %d again, without %d samples", step, len(left_out))
                    on_main_process(accelerator, lambda step=step: forget_after(step, run_folder, checkpoints))  # type: ignore[misc]
                    catch_up(accelerator, run_folder, checkpoints, trainer)
        display.end()
        on_main_process(accelerator, checkpoints.wait)
        peak = peak_memory(accelerator)
        device = device_name(accelerator.device)
        summary = on_main_process(accelerator, lambda: summarise(config, run_folder, trainer.step, peak, trainer.grown, device))
        student, weights = finished(built)
        if accelerator.is_main_process:
            export(run_folder.path / FINAL, student, built.tokenizer, built.eos, config, summary, weights)
        run_folder.write_summary(summary)
        if accelerator.is_main_process:
            write_report(run_folder.path, summary)
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:  # not end_training, which ends the process group that the next member of a sweep needs
            tracker.finish()
        display.summarise(summary, places(run_folder.path))
        return summary


def finished(built: Built) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """The student without adapters, and all of its weights where this process holds a part of them only; the main process's alone count."""
    trainer, leads = built.trainer, built.trainer.accelerator.is_main_process
    if built.adapters is None:
        return trainer.student, gathered(model_tensors(trainer.student), keep=leads) if is_sharded(trainer.policy) else None
    with whole(trainer.policy):
        student = built.adapters.merge_and_unload() if leads else trainer.student
        if not is_sharded(trainer.policy):
            return student, None
        return student, {name: value.detach().to("cpu", copy=True) for name, value in student.named_parameters()} if leads else None


@dataclass(frozen=True, slots=True)
class History:
    """What a run logged before it goes on: metrics, evaluations, and the step and score of its best."""

    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    best: dict[str, float] | None


def fresh_memory() -> None:
    """Let go of what an earlier member of a sweep left behind, and begin to measure anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries would tear the display."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it says of a file that it cannot read is in the error that follows


def find_finished(config: Config, run_folder: RunFolder, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of this very run, if it is done. Raises `ConfigError` when the folder holds another run, or may not be touched."""
    held = run_folder.identity()
    if held is None:
        return None
    kept = run_folder.status() is Status.done or any(run_folder.checkpoints.glob("*step_*"))
    if config.resume == "never" and kept:
        raise ConfigError(f"resume=never: {run_folder.path} holds a run already; take another name=…, or resume=auto to go on")
    if not kept or config.resume != "auto":
        return None
    changed = check_same(held, wanted, run_folder.path, config.resume_force)
    return run_folder.summary() if run_folder.status() is Status.done and not changed else None


def find_start(
    config: Config, run_folder: RunFolder, checkpoints: Checkpoints, wanted: Mapping[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, by `resume`, and what differs from its run although `resume_force` says to go on.

    Raises `ConfigError` when it is another run's, `OutputError` when it is unusable.
    """
    if config.resume == "never":
        return None, []
    if config.resume == "auto":
        start = checkpoints.newest()
    else:
        problem = verify(Path(config.resume))
        if problem is not None:
            raise OutputError(
                f"resume={config.resume}: not a usable checkpoint: {problem}; name a folder as "
                "runs/NAME/checkpoints/step_000100, or take auto or never"
            )
        start = read(Path(config.resume))
    return start, [] if start is None else check_same(start.state, wanted, start.path, config.resume_force)


def begin_logs(run_folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer, start: Checkpoint | None) -> None:
    """Let the logs end where the run begins: nowhere, or at the checkpoint it goes on from."""
    if start is None:
        run_folder.clear()
    else:
        run_folder.adopt(start.path.parent.parent)
        run_folder.rewind(start.step)
        checkpoints.set_aside(start.moment)
    run_folder.set_identity(trainer.saved_state)


def forget_after(step: int, run_folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Let logs and checkpoints end at `step`, from which the run goes on another way."""
    run_folder.rewind(step)
    checkpoints.set_aside((step, 0))


def catch_up(accelerator: Accelerator, run_folder: RunFolder, checkpoints: Checkpoints, trainer: Trainer) -> History:
    """Let the trainer know what the run did before, and return it."""
    history = on_main_process(accelerator, lambda: History(run_folder.metrics(), run_folder.evaluations(), checkpoints.best()))
    trainer.graded_tokens = int(sum(line["tokens"] for line in history.metrics))
    if any(line["model"] == "student" and line["step"] == trainer.step for line in history.evaluations):
        trainer.evaluated = trainer.step
    if history.best is not None and history.best["step"] <= trainer.step:
        trainer.best = history.best["score"]
    return history


def evaluate_teacher(built: Built, run_folder: RunFolder, history: History) -> Evaluation | None:
    """The teacher under the student's decoding, once a run."""
    if any(line["model"] == "teacher" for line in history.evaluations):
        return None
    with built.trainer.batches.teacher_ready(), built.teacher.active():
        rewards, example = built.trainer.evaluator.rewards(built.teacher_sampler, as_teacher=True)
    evaluation = Evaluation(0, rewards, None, example)
    run_folder.add_evaluation({"model": "teacher", **evaluation.to_dict()})
    return evaluation


def introduce(display: Display, config: Config, built: Built, start: Checkpoint | None) -> None:
    """Say what is about to happen."""
    trainer, processes = built.trainer, built.trainer.accelerator.num_processes
    size, n = config.train.batch_size, config.sampling.n
    parameters = sum(weight(parameter).numel() for parameter in trainer.student.parameters())
    display.note(
        f"{config.model.path} ({parameters / 1e6:,.1f} M parameters) learns from {config.teacher.path} on {trainer.accelerator.device}"
    )
    display.note(
        f"each step: {size} prompts × {processes} {'processes' if processes > 1 else 'process'} × {n} completions = "
        f"{size * processes * n} rollouts; "
        f"{trainer.max_steps} steps over {len(trainer.prompts):,} prompts"
    )
    if is_sharded(trainer.policy):
        held = f"{at_rest(trainer.policy) / 1e6:,.2f} M of the parameters"
        display.note(f"sharded ({strategy(trainer.policy)}): each process holds {held} between its computations")
    display.note(f"sampling: {built.sampling}" + (f" ({built.sampling.why})" if built.sampling.why else ""))
    for line in built.differences:
        display.note(f"warning: {line}")
    if start is not None:
        display.note(f"going on after step {start.step} from {start.path}")
        asked = config.train.max_tokens_per_micro_batch
        if trainer.batches.max_tokens != asked:
            display.note(
                f"micro-batches of {trainer.batches.max_tokens} tokens, for which memory sufficed: "
                f"train.max_tokens_per_micro_batch={asked} did not fit before, and another number is tried"
            )


def write_report(folder: Path, summary: dict[str, Any]) -> None:
    """The run as a page. What was learnt is safe by then: a page that cannot be made is told in the log and ends nothing."""
    try:
        write_text(folder / REPORT, page([replace(open_run(folder), status=Status.done.value, summary=summary)]))
    except Exception:
        log.exception("%s cannot be written; opd report %s tries again", folder / REPORT, folder)


def places(folder: Path) -> dict[str, str]:
    """Where a finished run left what a person looks for."""
    found = {"model": folder / FINAL, "metrics": folder / METRICS, "samples": folder / ROLLOUTS, "report": folder / REPORT}
    return {label: str(place) for label, place in found.items() if place.exists()}
