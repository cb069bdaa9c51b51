"""Check a run before it starts: `opd doctor`. Each check is a function that returns findings; this module runs them in order."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from opd.config.options import Device, Dtype, naming_dataset, naming_teacher
from opd.config.schema import Config
from opd.data.prompts import Encoder, Prompt, first_of_each
from opd.data.rows import DataRow
from opd.data.sources import load_rows
from opd.doctor import first_step, machine, rows, tokens, views
from opd.doctor.findings import Finding, Report, Status, ok, warn
from opd.doctor.plan import Planner, PlanRequest, train_command, with_options
from opd.doctor.plan_time import Timing, fit_time
from opd.doctor.warm_start import warm_start_commands
from opd.models import load as models
from opd.models.accelerator import make_accelerator
from opd.models.device import free_memory
from opd.models.memory import Memory, estimate
from opd.training.build import build
from opd.training.checkpoint import Checkpoints
from opd.training.checks import check_scores, learning_rate_problems
from opd.training.disk import disk_of, free_disk
from opd.training.evaluation import count_evaluations
from opd.training.inputs import Given, Loaded, encode_dataset, join_datasets, make_run_grader
from opd.training.spans import describe

__all__ = ["Finding", "PlanRequest", "Report", "Status", "examine"]

Prompts = tuple[list[Prompt], list[Prompt]]  # to train and to evaluate on


def examine(config: Config, prompts: int = 32, request: PlanRequest | None = None, report: Report | None = None) -> Report:
    """Check the run that `config` describes, without training and without leaving files behind.

    Args:
        config: the run's.
        prompts: how many evaluation prompts student and teacher answer; 0 for none.
        request: for a plan of the run, which is checked in its place.
        report: to add the findings to, for one that shows them at once.
    """
    report = report or Report()
    named = f"the run would be runs/{config.name}" if report.members == 1 else f"the first of {report.members} members is checked"
    report.add(ok("config", f"composes; {named}"))
    report.run("tracker", lambda: machine.check_packages(config))
    with report.progress.of("checking the tokenizers and the data"):
        loaded = check_inputs(config, report)
    if loaded is None:
        return report
    tokenizer, data = loaded
    with report.progress.of("grading the reference answers"), ExitStack() as stack:
        if not report.run("reward", lambda: rows.check_reward(data[1], make_run_grader(config, data[1], stack), config)):
            return report
    if request is not None:
        check_plan(config, request, tokenizer, data, prompts, report)
    elif report.run("memory", lambda: check_memory(config, data, report)) and report.ready:
        with report.catch("models"):
            check_models(config, tokenizer, data, prompts, report)
    return report


def check_inputs(config: Config, report: Report) -> tuple[PreTrainedTokenizerBase, Prompts] | None:
    """Check tokenizers, chat templates and data, those of each dataset with its teacher.

    Returns:
        The student's tokenizer and the prompts; None if something cannot be loaded or token ids differ.
    """
    checked, reports = {}, {}
    for label, part in config.parts.items():
        reports[label] = Report()
        checked[label] = check_dataset(part, reports[label], label)
    add_labelled(report, reports, config)
    loaded = {label: found for label, found in checked.items() if found is not None}
    if len(loaded) < len(checked):
        return None
    with report.catch("data") as errors:
        prompts = join_datasets(config, {label: dataset for label, (_, dataset) in loaded.items()})
        report.add(*rows.check_answers(prompts[1], config))
    return None if errors else (next(iter(loaded.values()))[0], prompts)


def add_labelled(report: Report, reports: Mapping[str, Report], config: Config) -> None:
    """Add the findings on each dataset: with its label unless all datasets have the same one."""
    shared = [finding for finding in next(iter(reports.values())).findings if all(finding in own.findings for own in reports.values())]
    report.add(*shared)
    for label, own in reports.items():
        rename, rename_teacher = naming_dataset(label), naming_teacher(config.teacher_of(label))
        for finding in own.findings:
            if finding not in shared:
                what, remedy = (rename(rename_teacher(text)) for text in (finding.what, finding.remedy))
                report.add(Finding(f"{label}: {finding.check}", finding.status, what, remedy))
        report.rendered |= {f"{label}: {role}" if label else role: text for role, text in own.rendered.items()}


def check_dataset(config: Config, report: Report, label: str) -> tuple[PreTrainedTokenizerBase, Loaded] | None:
    """Do what `check_inputs` does, for a run with one dataset. `label`: the dataset's, for messages."""
    with report.catch("tokenizer of the student") as student_errors:
        raw_student = tokens.load_raw(config.model, "model")
        student = models.load_tokenizer(config.model, "model")
    with report.catch("tokenizer of the teacher") as teacher_errors:
        raw_teacher = tokens.load_raw(config.teacher_files, "teacher")
        teacher = models.load_tokenizer(config.teacher_files, "teacher")
    if student_errors or teacher_errors:
        return None
    own = teacher if config.teacher.has_own_tokens else None
    comparable = report.run("tokenizers", lambda: (tokens.check_maps if own is None else tokens.check_texts_of_tokens)(student, teacher))
    report.add(*tokens.check_pad(raw_student, "student"), *tokens.check_pad(raw_teacher, "teacher"))
    sampling = f"temperature {config.sampling.temperature:g}, top_p {config.sampling.top_p:g}, top_k {config.sampling.top_k}"
    report.run("student", lambda: tokens.check_generation_config(config.model, "student", sampling))
    report.run("teacher", lambda: tokens.check_generation_config(config.teacher_files, "teacher", sampling))
    with report.catch("data") as data_errors:
        train_rows, eval_rows = load_rows(config.data)
        report.add(*rows.check_columns(train_rows, eval_rows, config))
        first = DataRow(train_rows[0], 0, config.data)
        findings, report.rendered = tokens.check_templates(student, teacher, first.messages(), config)
        report.add(*findings)
        findings, texts = views.check_views(Encoder(own or student, config.data, config.teacher).views(first))
        report.add(*findings)
        report.rendered |= texts
        train, evaluation = encode_dataset(config, student, (train_rows, eval_rows), label, own)
    if data_errors or not comparable:
        return None
    report.add(*rows.check_lengths(train, len(train_rows), "training", config))
    report.add(*rows.check_lengths(evaluation, len(eval_rows), "evaluation", config))
    report.add(*rows.check_prompts(train, evaluation))
    return student, Loaded((train_rows, eval_rows), (train, evaluation))


def check_memory(config: Config, data: Prompts, report: Report) -> list[Finding]:
    device = models.find_device(config.device)
    free = free_memory(device)
    memory = estimate(config, 1, device, prompts=data, in_use=lambda: psutil.Process().memory_info().rss if device.type == "cpu" else 0)
    report.figures["memory"] = {**memory.to_dict(), "free": free + memory.resident["the process"]}
    return machine.check_memory(memory, free, device)


def check_plan(
    config: Config, request: PlanRequest, tokenizer: PreTrainedTokenizerBase, data: Prompts, prompts: int, report: Report
) -> None:
    """Choose options for a machine, check the run with them if the machine is this one, and add the plan to the report's figures."""
    with report.catch("plan") as problems:
        planner = make_planner(config, request, data)
        planned = planner.fit(config)
    if problems:
        return
    if request.memory is None and report.run("memory", lambda: check_memory(planned, data, report)) and report.ready:
        with report.catch("models"):
            check_models(planned, tokenizer, data, prompts, report)
    with report.catch("plan"):
        planned = fit_time(planner, planned, measured_timing(planned, report), request.minutes)
        report.figures["plan"] = planner.to_dict(train_command(request.words, config, planned))


def make_planner(config: Config, request: PlanRequest, data: Prompts) -> Planner:
    if request.memory is None:
        device = models.find_device(config.device)
        free, host = free_memory(device), free_memory(torch.device("cpu"))
    else:
        device = torch.device("cpu" if config.device is Device.cpu else "cuda")
        free, host = request.memory, None

    def memory_of(candidate: Config) -> Memory:
        if request.memory is not None and device.type == "cuda":  # such a card computes in bf16, whatever this machine does
            named = {"model.dtype": candidate.model.dtype, "teacher.dtype": candidate.teacher.dtype}
            candidate = with_options(candidate, {option: Dtype.bfloat16 for option, dtype in named.items() if dtype is Dtype.auto})
        return estimate(candidate, 1, device, prompts=data, free=free)

    return Planner(request.typed, device.type, free, memory_of, host)


def measured_timing(config: Config, report: Report) -> Timing | None:
    """Return what the trial step of the report took; None where none ran to its end."""
    step = report.figures.get("step")
    if step is None:
        return None
    per_step = machine.step_seconds(step["seconds"], config)
    return Timing(per_step, step.get("truncated", 0.0), step["steps"], **report.figures.get("evaluation_seconds", {}))


def check_models(config: Config, tokenizer: PreTrainedTokenizerBase, data: Prompts, prompts: int, report: Report) -> None:
    """Load student and teacher, run a trial step, and let both answer `prompts` evaluation prompts."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        accelerator = make_accelerator(config, Path(folder))
        checkpoints = Checkpoints(Path(folder), 1, keep_best=False)
        # The student is judged by its own completions, and nothing is sampled ahead while the parts of the step are timed.
        samples = replace(config, train=replace(config.train, given_share=0.0), sampling=replace(config.sampling, lag=0))
        with report.progress.of("loading the models"):
            built = build(samples, accelerator, checkpoints, Given(tokenizer=tokenizer, prompts=data), stack, None)
        trainer, evaluator = built.trainer, replace(built.trainer.evaluator, progress=report.progress)
        if (spans := trainer.scoring.spans) is not None:
            report.add(ok("end of sequence", describe(spans)))
        for label, part in config.parts_by_teacher.items() if spans is None else ():
            report.add(*check_ends(part, tokenizer, built.eos, built.teacher_eos[label]))
        report.add(*tokens.check_texts(tokenizer, built.eos, [*data[1], *data[0]]))

        with report.progress.of("running a trial step"):
            step = first_step.trial_step(trainer)
        check_scores(trainer.scoring, trainer.canaries, step.tokens)
        rate = sum(len(rollout.trained) for rollout in step.rollouts) / sum(step.seconds.values())
        report.figures["step"] = {"seconds": step.seconds, "steps": trainer.max_steps, "tokens_per_second": rate, **step.metrics}
        bf16 = models.computes_in_bf16(config.model.dtype, accelerator.device)
        report.add(*first_step.check_self(evaluator, trainer.student, step.rollouts, bf16))
        report.add(*(warn("learning rate", *problem) for problem in learning_rate_problems(config.optim, trainer.max_steps)))
        report.add(*first_step.check_sampler(step, config), *first_step.check_start(step, config))
        report.add(*first_step.check_masked(step, trainer.scoring.overlap, tokenizer), *first_step.check_spans(step))
        disk, free = disk_of(trainer), free_disk(Path("runs"))
        report.figures["disk"] = {"needed": disk.total(report.members), "free": free}
        report.add(*machine.check_disk(disk, free, report.members))

        seconds = first_step.evaluation_seconds(evaluator, trainer.speed, step)  # estimates, where nothing is answered
        answered = first_of_each(evaluator.answered, prompts)
        if answered:
            scale = len(evaluator.answered) / len(answered)
            started = time.perf_counter()
            student = first_step.answer_rewards(evaluator, trainer.sampler, answered, as_teacher=False)
            between = time.perf_counter()
            with built.teacher.active():
                teacher = first_step.answer_rewards(evaluator.as_teacher(), built.teacher_sampler, answered, as_teacher=True)
            seconds |= {"student": scale * (between - started), "teacher": scale * (time.perf_counter() - between)}
            report.figures["rewards"] = {"student": student, "teacher": teacher}
            report.add(*first_step.check_rewards(student, teacher, warm_start_commands(config), config.train.takes_given))
        report.figures["evaluation_seconds"] = {"student": seconds["student"] + seconds["kl"], "teacher": seconds["teacher"]}
        add_time(config, report, step.seconds)


def add_time(config: Config, report: Report, seconds: Mapping[str, float]) -> None:
    """Extrapolate from the trial step, whose `seconds` have parts, and the evaluations to the run."""
    timing, step = measured_timing(config, report), report.figures["step"]
    assert timing is not None
    training, evaluations = timing.steps * timing.step, timing.of_evaluations(config, timing.steps)
    report.figures["time"] = {"training": training, "evaluations": evaluations, "members": report.members}
    counted = f"{timing.steps:,} steps, {count_evaluations(config.eval, timing.steps)} evaluations of the student"
    counted += ", 1 of the teacher" if timing.teacher else ""
    parts = ", ".join(f"{name} {value:.2g} s" for name, value in seconds.items() if value)
    speed = f"{step['tokens_per_second']:,.0f} trained tokens/s, {step['perf/mfu']:.1%} MFU"
    step_text = f"{timing.step:.2g} s a step ({parts}; {speed})"
    report.add(*machine.check_time(training, evaluations, counted, step_text, report.members))


def check_ends(config: Config, student: PreTrainedTokenizerBase, eos: Sequence[int], teacher_eos: Sequence[int]) -> list[Finding]:
    teacher = models.load_tokenizer(config.teacher_files, "teacher")
    kwargs = config.data.chat_template_kwargs
    return [
        *tokens.check_eos(student, teacher, eos, teacher_eos),
        *tokens.check_turn_end(student, eos, "student", kwargs),
        *tokens.check_turn_end(teacher, teacher_eos, "teacher", kwargs),
    ]
