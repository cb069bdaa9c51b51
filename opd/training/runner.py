"""The runner: build, find where to start, run the loop, and write what happens to the run folder."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from opd import signals
from opd.config.compose import to_dict
from opd.config.options import Best
from opd.config.python_names import in_python
from opd.config.schema import Config
from opd.errors import INTERNAL, INTERRUPTED, ConfigError, OpdError, PeerError, Preempted
from opd.models.accelerator import make_accelerator
from opd.models.distributed import any_process, is_peer_failure, on_main_process, shards_weights, stop_all_processes
from opd.models.memory import estimate
from opd.runs import answers
from opd.runs.folder import CHECKPOINTS, EVALUATIONS, METRICS, RunFolder, Status, read_lines
from opd.runs.outcome import describe_unjudged, objective
from opd.runs.reader import is_run
from opd.training.build import Built, build, resumed_choices
from opd.training.checkpoint import Checkpoint, Checkpoints
from opd.training.checks import check_prompts, check_rewards, check_teacher, learning_rate_problems
from opd.training.disk import warn_of_disk
from opd.training.display import Display, NoteHandler, describe_datasets, describe_rewards, introduce
from opd.training.events import Evaluated, Event, Rewound, StepDone
from opd.training.finish import finish, places
from opd.training.identity import check_content, identity
from opd.training.inputs import Given
from opd.training.logs import check_tracker, evaluation_log, evaluation_metrics, start_tracking, watchdog
from opd.training.metrics import rollout_records, sample_text
from opd.training.start import begin_logs, changes_teacher, cut_logs, find_finished, find_start, refuse_finished, restore_counters

log = logging.getLogger(__name__)

OnEvent = Callable[[Event], bool | None]


def run(config: Config, folder: Path) -> float | None:
    """Train as configured and return the objective of a sweep."""
    return objective(config.sweep, train(config, folder))


def train(config: Config, folder: Path, given: Given | None = None, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Distil into `folder` and return the summary. Raises `OpdError` for everything but defects.

    Args:
        given: Objects that replace what the config names.
        on_event: Called with every event of the loop. Where it returns True in any process, training ends after the current step.
    """
    quiet_libraries()
    gc.collect()  # an earlier run of a sweep may have left memory behind
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    check_tracker(config.track.tool)
    say = str if given is None else in_python
    accelerator = make_accelerator(config, folder)
    run_folder = RunFolder(folder, writes=accelerator.is_main_process)
    with ExitStack() as stack:
        stack.enter_context(signals.deferred())
        on_main_process(accelerator, lambda: claim(run_folder, stack))
        stack.enter_context(run_folder.unchanged_if_refused())
        background = accelerator.device.type == "cuda" if config.checkpoint.background is None else config.checkpoint.background
        keeps_best = config.checkpoint.best is not Best.drop
        checkpoints = Checkpoints(run_folder.path / CHECKPOINTS, config.checkpoint.keep_last, keeps_best, background)
        wanted = identity(config, accelerator, given or Given())
        finished = on_main_process(accelerator, lambda: find_finished(config, run_folder, wanted))
        if finished is not None:
            display = Display(finished["steps"], shown=accelerator.is_main_process)
            early = finished["steps"] < (config.train.max_steps or 0)
            at = f" at step {finished['steps']} of {config.train.max_steps}, where a callback stopped it" if early else ""
            loaded = "; the model gets its weights" if given is not None and given.student is not None else ""
            display.note(say(f"{folder} contains this run, finished{at}; nothing to do (for a new run, set name=…){loaded}"))
            display.summarise(finished, places(folder))
            return finished
        start, forced = on_main_process(accelerator, lambda: find_start(config, run_folder, checkpoints, wanted))
        run_folder.set_status(Status.running)
        with status_on_exit(accelerator, run_folder, checkpoints, say):
            summary = distil(config, accelerator, run_folder, checkpoints, start, forced, given or Given(), on_event)
        run_folder.set_status(Status.done, exit_code=0)
        on_main_process(accelerator, checkpoints.finish)  # now that the same command does not resume any more
        return summary


def evaluate(config: Config, folder: Path, given: Given) -> dict[str, float]:
    """Evaluate the student without training and return the metrics as `evaluation_log` does. `folder`: for temporary files."""
    quiet_libraries()
    with ExitStack() as stack:
        built = build(config, make_accelerator(config, folder), Checkpoints(folder, 1, keep_best=False), given, stack, None)
        evaluations = [event.evaluation for event in built.trainer.evaluate() if isinstance(event, Evaluated)]
        return evaluation_log(evaluations[0].to_dict())


def quiet_libraries() -> None:
    """Turn off progress bars and advice of the libraries, which would tear the display."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # an error that follows repeats what it logs about a file


def claim(run_folder: RunFolder, stack: ExitStack) -> None:
    """Make the run folder and lock it against other processes. Raises `ConfigError` for a folder that has runs in it."""
    path = run_folder.path
    if path.is_dir() and not is_run(path) and (runs := [inner.name for inner in path.iterdir() if is_run(inner)]):
        raise ConfigError(f"hydra.run.dir={path}: has {len(runs):,} runs in it; name a folder there, such as {path / 'another'}")
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
def status_on_exit(accelerator: Accelerator, run_folder: RunFolder, checkpoints: Checkpoints, say: Callable[[str], str]) -> Iterator[None]:
    """Write whatever ends the run to `status.json`, with the exit code. `say` puts it in the words of the command line or of Python."""

    def written(error: OpdError, status: Status = Status.failed) -> OpdError:
        run_folder.set_status(status, say(str(error)), error.exit_code)
        return error

    try:
        yield
    except KeyboardInterrupt:
        run_folder.set_status(Status.failed, "interrupted", INTERRUPTED)
        raise
    except Preempted as error:
        moments = checkpoints.moments()
        saved = f"the same command resumes from {checkpoints.path(*moments[-1])}" if moments else "nothing was trained yet"
        raise written(Preempted(f"{error}; {saved}"), Status.preempted) from None
    except torch.OutOfMemoryError as error:
        remedy = (
            f"{accelerator.device} has too little memory ({str(error).splitlines()[0]}): lower train.max_tokens_per_micro_batch, set "
            "train.activation_checkpointing=true, or, while sampling, lower sampling.batch_size and eval.batch_size"
        )
        raise written(ConfigError(remedy)) from error
    except Exception as error:
        if is_peer_failure(error):
            raise written(PeerError("another process of the run ended; its message is the reason")) from error
        code = error.exit_code if isinstance(error, OpdError) else INTERNAL
        run_folder.set_status(Status.failed, say(f"{type(error).__name__}: {error}"), code)
        raise


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
    display = Display(0, shown=accelerator.is_main_process)
    if given.student is None and given.teacher is None:
        memory = on_main_process(
            accelerator, lambda: estimate(config, accelerator.num_processes, accelerator.device, shards_weights(accelerator))
        )
        display.note(str(memory))
    with ExitStack() as stack:
        handler = NoteHandler(display, str if given.train_rows is None else in_python)  # before the data are read, which may leave rows out
        logging.getLogger("opd").addHandler(handler)
        stack.callback(logging.getLogger("opd").removeHandler, handler)
        choices = None if start is None else resumed_choices(start.state, config)
        built = build(config, accelerator, checkpoints, given, stack, choices)
        trainer = built.trainer
        if start is not None:
            forced = forced + check_content(start.state, trainer.saved_state, start.path, config.resume_force)
            trainer.resume(start, restart_step=bool(forced))
            if forced:
                on_main_process(accelerator, lambda: refuse_finished(run_folder, trainer))
        on_main_process(accelerator, lambda: begin_logs(run_folder, checkpoints, trainer, start, forced))
        write_composed_config(config, run_folder)
        evaluations = restore_counters(run_folder, checkpoints, trainer)
        display = handler.display = Display(trainer.max_steps, shown=accelerator.is_main_process)
        introduce(display, built, start)
        if accelerator.is_main_process:
            check_prompts(trainer.prompts, trainer.evaluator.prompts)
            for problem in learning_rate_problems(config.optim, trainer.max_steps):
                log.warning("; ".join(problem))
        for difference in forced:
            log.warning("resume_force=true: %s", difference)
        warn_of_disk(trainer, run_folder.path)
        start_tracking(config, accelerator, run_folder.path)
        stop_all_processes(accelerator)
        stacks = run_folder.stacks_file(accelerator.process_index)
        beat = stack.enter_context(watchdog(config.train.watchdog_minutes, stacks, run_folder.record_hang))
        display.watch(trainer.evaluator.progress)
        stack.callback(display.end)
        display.begin(trainer.step)
        if changes_teacher(forced) or not any(line["model"] == "teacher" for line in evaluations):
            evaluate_teacher(built, run_folder, display)
        for event in trainer.run():
            beat()
            write_event(event, built, run_folder, display)
            if any_process(accelerator, bool(on_event(event))):
                trainer.stop()
            if isinstance(event, Rewound):
                on_main_process(accelerator, partial(cut_logs, (event.step, 0), run_folder, checkpoints))
                restore_counters(run_folder, checkpoints, trainer)
        display.end()
        on_main_process(accelerator, checkpoints.wait)
        return finish(run_folder, built, display)


def evaluate_teacher(built: Built, run_folder: RunFolder, display: Display) -> None:
    """Evaluate the teacher under the student's decoding."""
    with built.teacher.ready(), built.teacher.active():
        evaluation = built.trainer.evaluator.teacher(built.teacher_sampler)
    run_folder.append(EVALUATIONS, {"model": "teacher", **evaluation.to_dict()})
    answers.store(run_folder, evaluation.answers, "teacher", evaluation.step)
    if evaluation.rewards is not None:
        display.note(f"teacher: reward {describe_rewards(evaluation.rewards)}{describe_datasets(evaluation)}")


def write_event(event: Event, built: Built, run_folder: RunFolder, display: Display) -> None:
    """Log, store, track and show what happened."""
    trainer, accelerator = built.trainer, built.trainer.accelerator
    match event:
        case StepDone():
            run_folder.append(METRICS, {"step": event.step, **event.metrics, "by_position": event.by_position})
            stored, rollouts = trainer.config.track.rollouts_per_step, event.tokens.rollouts
            if accelerator.is_main_process:
                weights = trainer.scoring.token_weights(rollouts)[0].tolist()
                run_folder.write_rollouts(event.step, rollout_records(built.tokenizer, event.tokens, stored, weights, event.alternatives))
            accelerator.log(event.metrics, step=event.step)
            shown = next((rollout for rollout in rollouts if not rollout.given), rollouts[0])
            display.show(event, sample_text(built.tokenizer, shown) if stored else "")
        case Evaluated():
            run_folder.append(EVALUATIONS, {"model": "student", **event.evaluation.to_dict()})
            answers.store(run_folder, event.evaluation.answers, "student", event.evaluation.step)
            accelerator.log(evaluation_metrics(event.evaluation.to_dict()), step=event.evaluation.step)
            display.show(event)
            if event.evaluation.step == 0:
                if event.evaluation.unjudged is not None:
                    log.warning(describe_unjudged(event.evaluation.unjudged, trainer.config.eval.reward))
                rewards, named = event.evaluation.rewards, trainer.config.eval.reward
                if rewards is not None and named is not None and trainer.evaluator.grader is not None:
                    check_rewards(rewards.each, named)
                if accelerator.is_main_process:
                    check_teacher(read_lines(run_folder.path / EVALUATIONS))
        case Rewound():
            log.warning("rewound to step %d; %d samples are left out from here on", event.step, len(event.left_out))
            display.show(event)
