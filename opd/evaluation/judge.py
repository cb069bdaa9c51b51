"""`opd eval`: a model, its baseline and its teacher answer the same prompts, decoded alike, and are compared prompt by prompt.

One model is in memory at a time, next to all teachers. With several processes each answers its share of the prompts.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from opd.config import compose
from opd.config.files import absolute_paths
from opd.config.options import naming_teacher
from opd.config.schema import Config
from opd.evaluation.sample_score import load, load_teacher, share_ids
from opd.evaluation.target import Target
from opd.models import load as models
from opd.models.accelerator import make_accelerator
from opd.models.device import release_memory
from opd.models.distributed import run_stoppable
from opd.runs.answers import Answer, lines_of
from opd.runs.folder import RUN, read_json
from opd.runs.intervals import are_shares, interval, paired_interval
from opd.runs.outcome import gap_closed
from opd.runs.progress import Progress
from opd.runs.reader import flatten, open_run
from opd.samplers import Sampler, of_teachers
from opd.teachers import LocalTeacher, as_one
from opd.training.evaluation import Distances, kl_interval, mean_kl
from opd.training.evaluator import Evaluator, make_evaluator
from opd.training.identity import digest_inputs
from opd.training.inputs import Given, load_prompts, make_run_grader

DRAWS = 10_000
MAX_INDICES = 2**22  # in memory at a time
LOW, HIGH = 0.025, 0.975


def changed_inputs(target: Target) -> list[str]:
    """Return what a run read and has other content by now: its numbers and those of this evaluation do not belong together."""
    if target.run is None:
        return []
    run, stored = open_run(target.run), read_json(target.run / RUN) or {}
    options = absolute_paths(run.config, run.started_in)
    now = digest_inputs(compose.to_unchecked_config(compose.restore_config(options)), Given())
    values = flatten(options)
    typed = {override.lstrip("+~").replace("=", ".").partition(".")[0] for override in target.overrides}
    return [
        f"{name}={values.get(name)}: has other content than when the run was trained"
        for name, files in stored.get("files", {}).items()
        if now.get(name) not in (None, files) and name.partition(".")[0] not in typed
    ]


def judge(
    target: Target, named: Mapping[str, str | None], folder: Path, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a target's model, its baseline and its teacher.

    Args:
        target: what to evaluate.
        named: the models' paths by role, as `locate_models` returns them.
        folder: for the accelerator, which writes nothing to it.
        progress: shows how far it is.

    Returns:
        The content of eval.json, the same on all ranks, and the lines of the file with the answers.
    """
    config, samples = target.config, target.config.eval.samples
    accelerator = make_accelerator(config, folder)
    progress = progress if progress is not None and accelerator.is_main_process else Progress()
    candidates = {"model": config.model} if target.baseline is None else {"model": config.model, "baseline": target.baseline}
    parts = config.parts_by_teacher
    answers: dict[str, list[Answer]] = {}
    lines: list[dict[str, Any]] = []
    distances: dict[str, Distances] = {}
    with ExitStack() as stack:
        teachers = {}
        for label, part in parts.items():
            with naming_teacher(label), progress.of("loading the teacher"):
                teachers[label] = load_teacher(part, accelerator.device, target.average if label == "" else None)
        for role, model in candidates.items():
            with progress.of(f"loading the {role}"):
                student = load(model, "model", accelerator.device, config.sampling.dtype)
            shared = [share_ids(config, student, teacher) for teacher in teachers.values()]
            ids, pad_id = min(shared, key=lambda ids: ids.vocabulary), student.tokenizer.pad_token_id
            if role == "model":
                theirs = teachers[""].tokenizer if ids.of_teacher is not None else None
                _, prompts = load_prompts(config, student.tokenizer, Given(), theirs)
                if theirs is None:
                    models.check_known(prompts, student.tokenizer, ids.vocabulary, ids.overlap)
                grader = make_run_grader(config, prompts, stack)
            evaluator = make_evaluator(config, accelerator, student.tokenizer, prompts, grader, ids, teacher_tokenizer=theirs)
            evaluator = replace(evaluator, progress=progress)
            evaluator.check_positions(student.model, "model")
            for label, teacher in teachers.items():
                evaluator.check_positions(teacher.model, "teacher", label)
            sampler = run_stoppable(accelerator, partial(student.sampler, pad_id, ids, config.seed))
            answers[role] = _answer(evaluator, sampler, samples, role, lines)
            scorers = {label: LocalTeacher(teacher.model, ids.vocabulary, masked=ids.masked) for label, teacher in teachers.items()}
            distances[role] = evaluator.distances(sampler, student.model, as_one(scorers))
            del student, sampler
            release_memory(accelerator.device)
        samplers: dict[str, Sampler] = {}
        for label, teacher in teachers.items():
            samplers[label] = run_stoppable(accelerator, partial(teacher.sampler, pad_id, ids, config.seed))
        answers["teacher"] = _answer(evaluator, of_teachers(samplers), samples, "teacher", lines)
    result = {
        "target": target.name,
        **named,
        "seed": config.seed,
        "overrides": list(target.overrides),
        "tasks": compare_by_dataset(answers, distances, config),
    }
    return result, lines


def compare_by_dataset(answers: Mapping[str, list[Answer]], distances: Mapping[str, Distances], config: Config) -> dict[str, Any]:
    """Return what `compare_answers` returns for all prompts, as `evaluation`, and with `data.mix` for those of each dataset."""
    kl = {role: mean_kl(found) for role, found in distances.items()}
    tasks = {"evaluation": compare_answers(answers, kl, config)}
    for role, found in distances.items():
        if (low_high := kl_interval(found)) is not None:
            tasks["evaluation"]["models"][role]["kl_interval"] = list(low_high)
    for label, part in config.parts.items() if config.data.mix else ():
        own = {role: [answer for answer in given if answer.dataset == label] for role, given in answers.items()}
        kl = {role: mean_kl({name: means for name, means in found.items() if name == label}) for role, found in distances.items()}
        tasks[f"data.mix.{label}"] = compare_answers(own, kl, part)
    return tasks


def _answer(evaluator: Evaluator, sampler: Sampler, samples: int, role: str, lines: list[dict[str, Any]]) -> list[Answer]:
    """Return `samples` rewarded answers to each prompt, gathered from all ranks, in the order of the prompts.

    Args:
        lines: the answers are added to them, as they are stored.
    """
    judged = sorted(evaluator.answer(sampler, role == "teacher", samples, role).rows, key=lambda answer: answer.sample_id)
    lines += lines_of(judged, model=role)
    return [answer for answer in judged if answer.reward is not None]


def compare_answers(answers: Mapping[str, list[Answer]], kl: Mapping[str, float | None], config: Config) -> dict[str, Any]:
    """Return the statistics of each model, and of `model` against the others on the prompts of which all have a judged answer.

    Args:
        answers: the judged ones by model: `model`, `baseline` (unless left out) and `teacher`.
        kl: the exact KL to the teacher, by model, where it was measured.
        config: of the evaluation.
    """
    rewards: dict[str, dict[int, list[float]]] = {name: {} for name in answers}  # also of a model none of whose answers was judged
    for name, given in answers.items():
        for answer in given:
            assert answer.reward is not None
            rewards[name].setdefault(answer.sample_id, []).append(answer.reward)
    common = sorted(set.intersection(*(set(by_prompt) for by_prompt in rewards.values())))
    means = {name: torch.tensor([fmean(by_prompt[i]) for i in common], dtype=torch.float64) for name, by_prompt in rewards.items()}
    result: dict[str, Any] = {
        "data": config.data.evaluated,
        "reward": config.eval.reward,
        "prompts": len(common),
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
        "max_new_tokens": config.eval.max_new_tokens,
        "models": {name: {"kl": kl.get(name)} for name in answers},
    }
    if common:
        shared = set(common)
        for name, statistics in result["models"].items():
            compared = [answer for answer in answers[name] if answer.sample_id in shared]
            statistics |= _statistics(compared, [rewards[name][i] for i in common], means[name])
        draws = dict(zip(means, resampled_means(torch.stack(list(means.values())), seed=config.seed).unbind(1), strict=True))
        result |= _comparison(means, draws)
    return result


def _statistics(answers: Sequence[Answer], rewards: Sequence[Sequence[float]], means: Tensor) -> dict[str, Any]:
    """Return one model's mean reward with its interval, pass@k where rewards are 0 and 1, length and truncation."""
    if all(len(of_prompt) == 1 for of_prompt in rewards):
        low, high = interval(means.tolist())
    else:
        low, high = quantile_interval(resampled_means(means[None])[:, 0])
    statistics: dict[str, Any] = {"mean": float(means.mean()), "low": low, "high": high}
    samples = min(map(len, rewards))
    if samples > 1 and all(reward in (0.0, 1.0) for of_prompt in rewards for reward in of_prompt):
        ks = sorted({*(2**power for power in range(samples.bit_length())), samples})
        statistics["pass"] = {str(k): fmean(pass_at(int(sum(each)), len(each), k) for each in rewards) for k in ks}
    statistics["length"] = fmean(answer.length for answer in answers)
    statistics["truncated"] = fmean(answer.truncated for answer in answers)
    return statistics


def pass_at(right: int, samples: int, k: int) -> float:
    """Return the probability that one of k answers is right, drawn without replacement from `samples` of which `right` are right."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _comparison(means: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the differences of `model` to the others and the share of the gap it closed.

    Args:
        means: by model, the mean reward of each prompt.
        draws: by model, the mean over all prompts in each draw of the bootstrap.
    """
    against = {}
    shares = are_shares(value for each in means.values() for value in each.tolist())
    for name in means:
        if name != "model":
            low, high = paired_interval([(means["model"] - means[name]).tolist()], shares)
            against[name] = {"mean": float((means["model"] - means[name]).mean()), "low": low, "high": high}
    share, bounds = None, None
    if "baseline" in means and "teacher" in means:
        share = gap_closed(*(float(means[name].mean()) for name in ("baseline", "model", "teacher")))
        if share is not None:
            bounds = gap_closed_interval(draws["model"], draws["baseline"], draws["teacher"])
    return {
        "reward_is_share": shares,
        "against": against,
        "gap_closed": share,
        "gap_closed_interval": None if bounds is None else list(bounds),
    }


def unused_result_file(run: Path) -> Path:
    """Return the first of eval.json, eval-2.json, ... in the run folder that does not exist."""
    file, number = run / "eval.json", 1
    while file.exists():
        number += 1
        file = run / f"eval-{number}.json"
    return file


# 95% intervals by the bootstrap, in float64: prompts are resampled with replacement, the same ones for all models (paired).


def resampled_means(values: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Return the means (draws, models) over resampled prompts of `values` (models, prompts)."""
    values = values.double().cpu()
    count = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    size = max(1, MAX_INDICES // count)
    parts = []
    for start in range(0, draws, size):
        index = torch.randint(count, (min(size, draws - start), count), generator=generator)
        parts.append(torch.stack([row[index].mean(1) for row in values], 1))
    return torch.cat(parts)


def quantile_interval(draws: Tensor) -> tuple[float, float]:
    """Return the 95% interval of `draws` (draws,)."""
    low, high = torch.quantile(draws, torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist()
    return low, high


def gap_closed_interval(after: Tensor, before: Tensor, teacher: Tensor) -> tuple[float, float] | None:
    """Return the 95% interval of (after - before) / (teacher - before), each (draws,).

    None where the teacher is not better than `before` in at least 97.5% of the draws: the share has no meaning there.
    """
    better = teacher > before
    if float(better.double().mean()) < HIGH:
        return None
    return quantile_interval(((after - before) / (teacher - before))[better])
