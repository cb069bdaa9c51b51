"""Check a run before it starts: `opd doctor`. Each check is a function that returns findings; this module runs them in order."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil
from transformers import PreTrainedTokenizerBase

from opd.config.schema import Config, TokenAlignment
from opd.data.prompts import Prompt, to_messages
from opd.data.sources import load_rows
from opd.doctor import first_step, machine, rows, tokens
from opd.doctor.findings import Finding, Report, Status, ok
from opd.models import load as models
from opd.models.device import free_memory
from opd.models.distributed import make_accelerator
from opd.models.memory import estimate
from opd.training.build import Built, Given, build, describe_alignment, load_prompts, make_run_grader
from opd.training.checkpoint import Checkpoints

__all__ = ["Finding", "Report", "Status", "examine"]

Prompts = tuple[list[Prompt], list[Prompt]]  # to train and to evaluate on


def examine(config: Config, prompts: int = 32) -> Report:
    """Check the run that `config` describes, without training and without leaving files behind.

    Args:
        config: the run's.
        prompts: how many evaluation prompts student and teacher answer; 0 for none.
    """
    report = Report()
    report.add(ok("config", f"composes; the run would be runs/{config.name}"))
    report.run("tracker", lambda: machine.check_packages(config))
    loaded = check_inputs(config, report)
    if loaded is None:
        return report
    tokenizer, data = loaded
    with ExitStack() as stack:
        if not report.run("reward", lambda: rows.check_reward(data[1], make_run_grader(config, data[1], stack), config)):
            return report
    if report.run("memory", lambda: check_memory(config, data, report)) and report.ready:
        with report.catch("models"):
            check_models(config, tokenizer, data, prompts, report)
    return report


def check_inputs(config: Config, report: Report) -> tuple[PreTrainedTokenizerBase, Prompts] | None:
    """Check tokenizers, chat templates and data.

    Returns:
        The student's tokenizer and the prompts; None if something cannot be loaded or token ids differ.
    """
    with report.catch("tokenizer of the student") as student_errors:
        raw_student = tokens.load_raw(config.model, "model")
        student = models.load_tokenizer(config.model, "model")
    with report.catch("tokenizer of the teacher") as teacher_errors:
        raw_teacher = tokens.load_raw(config.teacher, "teacher")
        teacher = models.load_tokenizer(config.teacher, "teacher")
    if student_errors or teacher_errors:
        return None
    spans = config.teacher.alignment is TokenAlignment.spans
    check_tokenizers = tokens.check_texts_of_tokens if spans else tokens.check_maps
    comparable = report.run("tokenizers", lambda: check_tokenizers(student, teacher))
    report.add(*tokens.check_pad(raw_student, "student"), *tokens.check_pad(raw_teacher, "teacher"))
    sampling = f"temperature {config.sampling.temperature:g}, top_p {config.sampling.top_p:g}, top_k {config.sampling.top_k}"
    report.run("student", lambda: tokens.check_generation_config(config.model, "student", sampling))
    report.run("teacher", lambda: tokens.check_generation_config(config.teacher, "teacher", sampling))
    with report.catch("data") as data_errors:
        train_rows, eval_rows = load_rows(config.data)
        report.add(*rows.check_columns(train_rows, eval_rows, config))
        findings, report.rendered = tokens.check_templates(student, teacher, to_messages(train_rows[0], 0, config.data), config)
        report.add(*findings)
        train, evaluation = load_prompts(config, student, Given(train_rows=train_rows, eval_rows=eval_rows), teacher)
    if data_errors or not comparable:
        return None
    report.add(*rows.check_lengths(train, len(train_rows), "training", config))
    report.add(*rows.check_lengths(evaluation, len(eval_rows), "evaluation", config))
    report.add(*rows.check_held_out(train, evaluation), *rows.check_answers(evaluation, config))
    return student, (train, evaluation)


def check_memory(config: Config, data: Prompts, report: Report) -> list[Finding]:
    device = models.find_device(config.device)
    free = free_memory(device)
    in_use = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    memory = estimate(config, 1, device, prompts=data, in_use=in_use)
    report.figures["memory"] = {**memory.to_dict(), "free": free + in_use}
    return machine.check_memory(memory, free, device)


def check_models(config: Config, tokenizer: PreTrainedTokenizerBase, data: Prompts, prompts: int, report: Report) -> None:
    """Load student and teacher, run a trial step, and let both answer `prompts` evaluation prompts."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        accelerator = make_accelerator(config, Path(folder))
        checkpoints = Checkpoints(Path(folder), 1, keep_best=False)
        built = build(config, accelerator, checkpoints, Given(tokenizer=tokenizer, prompts=data), stack, None)
        trainer, evaluator = built.trainer, built.trainer.evaluator
        report.add(*check_ends(config, built, tokenizer), *tokens.check_texts(tokenizer, built.eos, [*data[1], *data[0]]))

        step = first_step.trial_step(trainer)
        report.figures["step"] = {"seconds": step.seconds, "steps": trainer.max_steps, **step.metrics}
        bf16 = models.computes_in_bf16(config.model.dtype, accelerator.device)
        report.add(*first_step.check_self(evaluator, trainer.student, step.rollouts, bf16))
        report.add(*first_step.check_sampler(step, config), *first_step.check_start(step, config), *first_step.check_spans(step))
        report.add(*machine.check_time(step.seconds, step.metrics["perf/mfu"], config, trainer.max_steps))

        answered = evaluator.answered[:prompts]
        if answered:
            student = first_step.answer_rewards(evaluator, trainer.sampler, answered, as_teacher=False)
            with built.teacher.active():
                teacher = first_step.answer_rewards(evaluator.as_teacher(), built.teacher_sampler, answered, as_teacher=True)
            report.figures["rewards"] = {"student": student, "teacher": teacher}
            report.add(*first_step.check_rewards(student, teacher))


def check_ends(config: Config, built: Built, student: PreTrainedTokenizerBase) -> list[Finding]:
    if (aligner := built.trainer.scoring.aligner) is not None:
        return [ok("end of sequence", describe_alignment(aligner))]
    teacher = models.load_tokenizer(config.teacher, "teacher")
    kwargs, teacher_eos = config.data.chat_template_kwargs, built.teacher_eos
    return [
        *tokens.check_eos(student, teacher, built.eos, teacher_eos),
        *tokens.check_turn_end(student, built.eos, "student", kwargs),
        *tokens.check_turn_end(teacher, teacher_eos, "teacher", kwargs),
    ]
