"""The runner: checks what can be checked, finds where to begin, runs the loop and writes what happens to the run folder."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from opd.build import Built, Given, build, check_tracker, make_accelerator
from opd.checkpoint import Checkpoint, Checkpoints, read, restore, verify
from opd.config.schema import Config, Tracker
from opd.config.store import to_dict
from opd.data.rollouts import Rollout
from opd.display import Display, NoteHandler, describe_rewards
from opd.errors import INTERNAL, INTERRUPTED, ConfigError, OpdError, OutputError
from opd.evaluate import Evaluation
from opd.export import export
from opd.models import decode
from opd.run_folder import FINAL, RunFolder, Status
from opd.summary import summarise
from opd.trainer import Evaluated, Scored, StepDone, Trainer

log = logging.getLogger(__name__)
T = TypeVar("T")

# What may differ between a run and its continuation: it changes nothing that is learnt.
MAY_CHANGE = ("name", "resume", "device", "eval", "checkpoint", "track")


def run(config: Config, folder: Path) -> float | None:
    """Train as configured and return what a sweep maximises: the last reward, or −KL where nothing is judged."""
    summary = train(config, folder)
    reward, kl = summary["reward_after"], summary["eval_kl_after"]
    return reward if reward is not None else None if kl is None else -kl


def train(config: Config, folder: Path, given: Given | None = None) -> dict[str, Any]:
    """Distil into `folder` and return the summary that is written there. Raises `OpdError` for all that is not a defect."""
    quiet_libraries()
    check_tracker(config.track.tool)
    accelerator = make_accelerator(config, folder)
    run_folder = RunFolder(folder, writes=accelerator.is_main_process)
    run_folder.prepare()
    accelerator.wait_for_everyone()
    checkpoints = Checkpoints(run_folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_best)
    start = on_main(accelerator, lambda: find_start(config, run_folder, checkpoints))
    if start is not None and run_folder.status() is Status.done:
        summary = run_folder.summary()
        display = Display(summary["steps"], shown=accelerator.is_main_process)
        display.note(f"{folder} holds this run, finished; nothing to do (a new one: name=…)")
        display.summarise(summary, places(folder))
        return summary
    run_folder.set_status(Status.running)
    try:
        summary = distil(config, accelerator, run_folder, checkpoints, start, given or Given())
    except KeyboardInterrupt:
        run_folder.set_status(Status.failed, "interrupted", INTERRUPTED)
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, OpdError) else INTERNAL
        run_folder.set_status(Status.failed, f"{type(error).__name__}: {error}", code)
        raise
    run_folder.set_status(Status.done, exit_code=0)
    return summary


def distil(
    config: Config, accelerator: Accelerator, run_folder: RunFolder, checkpoints: Checkpoints, start: Checkpoint | None, given: Given
) -> dict[str, Any]:
    """Build, run the loop, write what happens, export."""
    with ExitStack() as stack:
        built = build(config, accelerator, checkpoints, given, stack, None if start is None else start.state["choices"])
        trainer = built.trainer
        if start is not None:
            restore(start, trainer.student, trainer.optimizer)
            trainer.step = start.step
        if accelerator.is_main_process:
            run_folder.rewind(trainer.step)
        accelerator.wait_for_everyone()
        catch_up(trainer, run_folder, checkpoints)
        display = Display(trainer.max_steps, shown=accelerator.is_main_process)
        handler = NoteHandler(display)
        logging.getLogger("opd").addHandler(handler)
        stack.callback(logging.getLogger("opd").removeHandler, handler)
        introduce(display, config, built, start)
        start_tracking(config, accelerator)
        teacher_evaluation = evaluate_teacher(built, run_folder)
        if teacher_evaluation is not None and teacher_evaluation.rewards is not None:
            display.note(f"teacher: reward {describe_rewards(teacher_evaluation.rewards)}")
        stack.callback(display.end)
        display.begin(trainer.step)
        for event in trainer.run():
            match event:
                case StepDone(step, metrics, scored):
                    run_folder.add_metrics({"step": step, **metrics})
                    run_folder.write_rollouts(step, (record(built.tokenizer, item) for item in scored))
                    accelerator.log(metrics, step=step)
                    display.show(event, sample_text(built.tokenizer, scored))
                case Evaluated(evaluation):
                    run_folder.add_evaluation({"model": "student", **evaluation.to_dict()})
                    accelerator.log(tracked(evaluation), step=evaluation.step)
                    display.show(event)
        display.end()
        accelerator.wait_for_everyone()
        summary = summarise(config, run_folder, accelerator)
        if accelerator.is_main_process:
            student = trainer.student if built.adapters is None else built.adapters.merge_and_unload()
            export(run_folder.path / FINAL, student, built.tokenizer, built.eos, config, summary)
        run_folder.write_summary(summary)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        display.summarise(summary, places(run_folder.path))
        return summary


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries would tear the display."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def on_main(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """What `find` returns in the main process, in all of them; or the `OpdError` that it raises there."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find()]
        except OpdError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], OpdError):
        raise found[0]
    result: T = found[0]
    return result


def find_start(config: Config, run_folder: RunFolder, checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint to go on from, by `resume`. Raises `ConfigError` when it belongs to another method or must not be continued."""
    if config.resume == "never":
        if checkpoints.steps():
            raise ConfigError(f"resume=never: {run_folder.path} holds a run already; take another name=…, or resume=auto to go on")
        return None
    if config.resume == "auto":
        start = checkpoints.newest()
    else:
        problem = verify(Path(config.resume))
        if problem is not None:
            raise OutputError(f"resume={config.resume}: not a usable checkpoint: {problem}")
        start = read(Path(config.resume))
    if start is not None:
        changed = differences(start.state["config"], to_dict(config))
        if changed:
            raise ConfigError(
                f"{run_folder.path} holds another run: {'; '.join(changed)}. Take another name=…, or the same options to go on"
            )
    return start


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Options, with old and new value, in which two configs differ and which alter what is learnt."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if key or name not in MAY_CHANGE]
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)]
    return [] if old == new else [f"{key} was {old}, is {new}"]


def catch_up(trainer: Trainer, run_folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Let the trainer know what the run did before."""
    trainer.graded_tokens = int(sum(line["tokens"] for line in run_folder.metrics()))
    if any(line["model"] == "student" and line["step"] == trainer.step for line in run_folder.evaluations()):
        trainer.evaluated = trainer.step
    best = checkpoints.best()
    trainer.best = None if best is None else best["score"]


def evaluate_teacher(built: Built, run_folder: RunFolder) -> Evaluation | None:
    """The teacher under the student's decoding, once a run."""
    if any(line["model"] == "teacher" for line in run_folder.evaluations()):
        return None
    with built.teacher.active():
        rewards, example = built.trainer.evaluator.rewards(built.teacher_sampler, as_teacher=True)
    evaluation = Evaluation(0, rewards, None, example)
    run_folder.add_evaluation({"model": "teacher", **evaluation.to_dict()})
    return evaluation


def introduce(display: Display, config: Config, built: Built, start: Checkpoint | None) -> None:
    """Say what is about to happen."""
    trainer, processes = built.trainer, built.trainer.accelerator.num_processes
    size, n = config.train.batch_size, config.sampling.n
    parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    display.note(
        f"{config.model.path} ({parameters / 1e6:,.1f} M parameters) learns from {config.teacher.path} on {trainer.accelerator.device}"
    )
    display.note(
        f"each step: {size} prompts × {processes} {'processes' if processes > 1 else 'process'} × {n} completions = "
        f"{size * processes * n} rollouts; "
        f"{trainer.max_steps} steps over {len(trainer.prompts):,} prompts"
    )
    for line in built.differences:
        display.note(f"warning: {line}")
    if start is not None:
        display.note(f"going on after step {start.step} from {start.path}")


def start_tracking(config: Config, accelerator: Accelerator) -> None:
    if config.track.tool is not Tracker.none:
        accelerator.init_trackers(config.track.project, config=flatten(to_dict(config)))


def flatten(config: Any, key: str = "") -> dict[str, Any]:
    """Nested options under dotted names, values that every tracker takes."""
    if isinstance(config, dict):
        return {name: value for part in config for name, value in flatten(config[part], f"{key}.{part}" if key else str(part)).items()}
    return {key: config if isinstance(config, int | float | str | bool) else str(config)}


def tracked(evaluation: Evaluation) -> dict[str, float]:
    values = {} if evaluation.rewards is None else {"eval/reward": evaluation.rewards.mean, "eval/length": evaluation.rewards.length}
    return values if evaluation.kl is None else {**values, "eval/kl": evaluation.kl}


def record(tokenizer: PreTrainedTokenizerBase, scored: Scored) -> dict[str, Any]:
    """A rollout as it is stored: texts, ids, and the log-probs of each completion token."""
    rollout = scored.rollout
    return {
        "sample_id": rollout.request.prompt.sample_id,
        "epoch": rollout.request.epoch,
        "attempt": rollout.request.attempt,
        "prompt": decode(tokenizer, rollout.request.prompt.ids),
        "completion": decode(tokenizer, rollout.completion),
        "tokens": [decode(tokenizer, [token]) for token in rollout.completion],
        "ids": list(rollout.completion),
        "finish_reason": rollout.finish_reason.value,
        "behaviour_logp": rounded(rollout.behaviour_logp),
        "student_logp": rounded(scored.logp),
        "teacher_logp": rounded(scored.teacher_logp),
    }


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def sample_text(tokenizer: PreTrainedTokenizerBase, scored: list[Scored]) -> str:
    """One completion for the display, on one line."""
    if not scored:
        return ""
    rollout: Rollout = scored[0].rollout
    text = f"{rollout.request.prompt.text} → {decode(tokenizer, rollout.completion, skip_special_tokens=True)}"
    return " ".join(text.split())


def places(folder: Path) -> dict[str, str]:
    """Where a finished run left what a person looks for."""
    return {"model": str(folder / FINAL), "metrics": str(folder / "metrics.jsonl"), "samples": str(folder / "rollouts")}
