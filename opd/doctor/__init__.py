"""Looks at a run before it begins. Each check is a function that returns findings; here is their order, and what each has to work on."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import PreTrainedTokenizerBase

from opd.config.schema import Config
from opd.data.prompts import Prompt, to_messages
from opd.data.sources import Rows, load_rows
from opd.doctor import first, machine, rows, tokens
from opd.doctor.findings import Finding, Report, Status, ok
from opd.doctor.footprint import footprint, shape_of
from opd.models import load as models
from opd.models.device import free_memory
from opd.models.distributed import make_accelerator
from opd.training.build import Built, Given, build, load_prompts, make_run_grader
from opd.training.checkpoint import Checkpoints

__all__ = ["Finding", "Report", "Status", "examine"]

PROMPTS = 32


@dataclass(frozen=True, slots=True)
class Material:
    """What the checks work on once it could be loaded."""

    tokenizer: PreTrainedTokenizerBase
    rows: tuple[Rows, Rows]
    prompts: tuple[list[Prompt], list[Prompt]]


def examine(config: Config, prompts: int = PROMPTS) -> Report:
    """All findings on the run that `config` describes. prompts: how many student and teacher answer; 0: none.

    Nothing is trained, nothing is written but a temporary folder that goes again.
    """
    report = Report()
    report.look("config", lambda: [ok("config", f"composes; the run would be runs/{config.name}")])
    report.look("tracker", lambda: machine.check_packages(config))
    material = prepare(config, report)
    if material is None:
        return report
    with ExitStack() as stack:
        if not report.look("reward", lambda: look_at_rewards(config, material, stack)):
            return report
    if report.look("memory", lambda: look_at_memory(config, material, report)) and report.ready:
        look_at_models(config, material, prompts, report)
    return report


def prepare(config: Config, report: Report) -> Material | None:
    """Tokenizers and data; None where they cannot be had or do not fit together."""
    with report.told("tokenizer of the student") as mistakes:
        raw = tokens.load_raw(config.model, "model")
        student = models.load_tokenizer(config.model, "model")
    with report.told("tokenizer of the teacher") as others:
        raw_teacher = tokens.load_raw(config.teacher, "teacher")
        teacher = models.load_tokenizer(config.teacher, "teacher")
    if mistakes or others:
        return None
    same = report.look("tokenizers", lambda: tokens.check_maps(student, teacher))
    report.add(*tokens.check_pad(raw, "student"), *tokens.check_pad(raw_teacher, "teacher"))
    sampling = f"temperature {config.sampling.temperature:g}, top_p {config.sampling.top_p:g}, top_k {config.sampling.top_k}"
    for role, stored in (("student", config.model), ("teacher", config.teacher)):
        report.look(role, lambda role=role, stored=stored: tokens.check_generation_config(stored, role, sampling))  # type: ignore[misc]
    with report.told("data") as mistakes:
        loaded = load_rows(config.data)
        report.add(*rows.check_columns(*loaded, config))
        found, report.rendered = tokens.check_templates(student, teacher, to_messages(loaded[0][0], 0, config.data), config)
        report.add(*found)
        encoded = load_prompts(config, student, Given(train_rows=loaded[0], eval_rows=loaded[1]))
    if mistakes or not same:
        return None
    material = Material(student, loaded, encoded)
    look_at_data(config, material, report)
    return material


def look_at_data(config: Config, material: Material, report: Report) -> None:
    for which, source, encoded in zip(("training", "evaluation"), material.rows, material.prompts, strict=True):
        report.add(*rows.check_lengths(encoded, len(source), which, config))
    report.add(*rows.check_apart(*material.prompts), *rows.check_answers(material.prompts[1], config))


def look_at_rewards(config: Config, material: Material, stack: ExitStack) -> list[Finding]:
    grader = make_run_grader(config, material.prompts[1], stack)
    return rows.check_reward(material.prompts[1], grader, config)


def look_at_memory(config: Config, material: Material, report: Report) -> list[Finding]:
    device = models.find_device(config.device)
    student, stored = shape_of(config.model, "model")
    teacher, _ = shape_of(config.teacher, "teacher")
    free = free_memory(device)
    held = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    trained, evaluated = material.prompts
    needed = footprint(config, student, teacher, stored, [*trained, *evaluated], len(evaluated), device, held, free)
    report.figures["memory"] = {**needed.to_dict(), "free": free + held}
    return machine.check_memory(needed, free, device)


def look_at_models(config: Config, material: Material, prompts: int, report: Report) -> None:
    """What only the loaded models tell."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, report.told("models"):
        accelerator = make_accelerator(config, Path(folder))
        checkpoints = Checkpoints(Path(folder), 1, keep_best=False)
        given = Given(tokenizer=material.tokenizer, prompts=material.prompts)
        built = build(config, accelerator, checkpoints, given, stack, None)
        report.add(*end_checks(config, built, material.tokenizer))
        step = first.trial_step(built.trainer)
        bf16 = models.computes_in_bf16(config.model.dtype, accelerator.device)
        report.figures["step"] = {"seconds": step.seconds, "steps": built.trainer.max_steps, **step.values}
        report.add(*first.check_self(built, step.rollouts, bf16), *first.check_sampler(step, config), *first.check_start(step, config))
        report.add(*machine.check_time(step.seconds, config, built.trainer.max_steps))
        judged = list(built.trainer.evaluator.answered)[:prompts]
        if judged:
            evaluator = built.trainer.evaluator
            ours = first.answers(evaluator, built.trainer.sampler, judged, as_teacher=False)
            with built.teacher.active():
                theirs = first.answers(evaluator, built.teacher_sampler, judged, as_teacher=True)
            report.figures["rewards"] = {"student": ours, "teacher": theirs}
            report.add(*first.check_rewards(ours, theirs))


def end_checks(config: Config, built: Built, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    teacher = models.load_tokenizer(config.teacher, "teacher")
    student_eos = built.eos
    theirs = models.eos_ids(built.teacher.model, teacher) if not config.shares_base else student_eos
    kwargs = config.data.chat_template_kwargs
    return [
        *tokens.check_eos(tokenizer, teacher, student_eos, theirs),
        *tokens.check_turn_end(tokenizer, student_eos, "student", kwargs),
        *tokens.check_turn_end(teacher, theirs, "teacher", kwargs),
    ]
