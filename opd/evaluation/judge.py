"""`opd eval`: a model, its baseline and its teacher answer the same prompts, decoded alike, and are compared prompt by prompt.

One model is in memory at a time, but for the teacher where the KL is measured. With several processes each takes a share of the prompts.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from opd.config.schema import Config, ModelConfig
from opd.data.prompts import Prompt
from opd.data.rewards import Grader
from opd.data.rollouts import Request
from opd.evaluation import bootstrap, pair
from opd.evaluation.pair import Loaded
from opd.evaluation.target import Target
from opd.models import load as models
from opd.models.device import release_memory
from opd.models.distributed import make_accelerator, run_stoppable
from opd.runs.outcome import gap_closed
from opd.training.build import Given, load_prompts, make_evaluator, make_run_grader
from opd.training.evaluate import Evaluator, interval

STREAM = "evaluation"  # as in training, so that greedy and sampled answers are those of the run


@dataclass(frozen=True, slots=True)
class Answer:
    """One judged answer. prompt: the sample id of its prompt. truncated: cut off at eval.max_new_tokens."""

    prompt: int
    reward: float
    length: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Task:
    """A set to judge on."""

    name: str
    config: Config
    prompts: list[Prompt]
    grader: Grader | None

    def evaluator(self, accelerator: Accelerator, student: Loaded, vocabulary: int) -> Evaluator:
        """As the run's own."""
        return make_evaluator(self.config, accelerator, student.tokenizer, self.prompts, self.grader, vocabulary, student.bf16)


def judge(target: Target, tasks: dict[str, Config], folder: Path) -> dict[str, Any]:
    """The result for each task by name, the same in all processes. folder: for the accelerator, nothing is written to it."""
    config = target.config
    accelerator = make_accelerator(config, folder)
    for role, named in {"teacher": config.teacher, **models_of(target)}.items():
        models.locate(named, role)  # before the first of them takes its time to load
    with ExitStack() as stack:
        teacher = pair.load(config.teacher, "teacher", accelerator.device)
        found: dict[str, dict[str, list[Answer]]] = {name: {} for name in tasks}
        kl: dict[str, dict[str, float]] = {name: {} for name in tasks}
        sets: list[Task] = []
        for role, model in models_of(target).items():
            student = pair.load(model, "model", accelerator.device)
            vocabulary = pair.shared(student, teacher)
            sets = sets or [make_task(name, its, student, stack) for name, its in tasks.items()]
            for task in sets:
                evaluator = task.evaluator(accelerator, student, vocabulary)
                sampler = student.sampler(student.tokenizer.pad_token_id, vocabulary, config.seed)
                found[task.name][role] = answers(evaluator, sampler, task.config.eval.samples)
                distance = evaluator.kl(sampler, student.model, teacher.teacher(vocabulary))
                if distance is not None:
                    kl[task.name][role] = distance
            last = student
            del student, evaluator, sampler
            release_memory(accelerator.device)
        for task in sets:
            evaluator = task.evaluator(accelerator, last, vocabulary)
            sampler = teacher.sampler(last.tokenizer.pad_token_id, vocabulary, config.seed)
            found[task.name]["teacher"] = answers(evaluator, sampler, task.config.eval.samples, as_teacher=True)
        return {task.name: result(found[task.name], kl[task.name], task.config) for task in sets}


def models_of(target: Target) -> dict[str, ModelConfig]:
    wanted = {"model": target.config.model}
    return wanted if target.baseline is None else {**wanted, "baseline": target.baseline}


def make_task(name: str, config: Config, student: Loaded, stack: ExitStack) -> Task:
    _, prompts = load_prompts(config, student.tokenizer, Given())
    return Task(name, config, prompts, make_run_grader(config, prompts, stack))


def answers(evaluator: Evaluator, sampler: Any, samples: int, as_teacher: bool = False) -> list[Answer]:
    """`samples` judged answers to each prompt, of all processes, in the order of the prompts."""
    accelerator = evaluator.accelerator
    mine = evaluator.answered[accelerator.process_index :: accelerator.num_processes]
    requests = [Request(prompt.for_teacher() if as_teacher else prompt, 0, attempt) for prompt in mine for attempt in range(samples)]
    rollouts = run_stoppable(accelerator, lambda: sampler.sample(requests, evaluator.decoding, STREAM))
    own = [
        Answer(rollout.request.prompt.sample_id, reward, len(rollout.completion), rollout.truncated)
        for reward, rollout in zip(evaluator.judge(rollouts), rollouts, strict=True)
        if reward is not None
    ]
    gathered: list[Answer] = gather_object(own)
    return sorted(gathered, key=lambda answer: answer.prompt)


def by_prompt(answers: Sequence[Answer]) -> dict[int, list[float]]:
    rewards: dict[int, list[float]] = {}
    for answer in answers:
        rewards.setdefault(answer.prompt, []).append(answer.reward)
    return rewards


def pass_at(right: int, samples: int, k: int) -> float:
    """The chance that one of k answers, drawn without replacement from `samples` of which so many are right, is right."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def result(found: dict[str, list[Answer]], kl: dict[str, float], config: Config) -> dict[str, Any]:
    """The figures of each model, and of `model` against the others on the prompts that all answered."""
    rewards = {name: by_prompt(answers) for name, answers in found.items() if answers}
    common = sorted(set.intersection(*(set(prompts) for prompts in rewards.values()))) if rewards else []
    options = config.eval
    out: dict[str, Any] = {
        "data": config.data.path or config.data.train_path or config.data.source.value,
        "reward": options.reward,
        "prompts": len(common),
        "samples": options.samples,
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "models": {},
    }
    means = {name: torch.tensor([fmean(prompts[i]) for i in common], dtype=torch.float64) for name, prompts in rewards.items()}
    for name in found:
        own: dict[str, Any] = {"kl": kl.get(name)}
        if common:
            own |= figures(found[name], [rewards[name][i] for i in common], means[name])
        out["models"][name] = own
    if common:
        names = list(means)
        drawn = bootstrap.resampled_means(torch.stack([means[name] for name in names]), seed=config.seed)
        column = {name: drawn[:, place] for place, name in enumerate(names)}
        out["against"] = {
            name: difference(means["model"] - means[name], column["model"] - column[name]) for name in names if name != "model"
        }
        out |= share_closed(means, column)
    return out


def figures(answers: Sequence[Answer], rewards: Sequence[Sequence[float]], means: torch.Tensor) -> dict[str, Any]:
    """One model's mean reward with its interval, pass@k where rewards are 0 and 1, length and truncation."""
    if all(len(own) == 1 for own in rewards):
        low, high = interval(means.tolist())
    else:
        low, high = bootstrap.quantiles(bootstrap.resampled_means(means[None])[:, 0])
    found: dict[str, Any] = {"mean": float(means.mean()), "low": low, "high": high}
    samples = min(map(len, rewards))
    if samples > 1 and all(reward in (0.0, 1.0) for own in rewards for reward in own):
        powers = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
        found["pass"] = {str(k): fmean(pass_at(int(sum(own)), len(own), k) for own in rewards) for k in sorted({*powers, samples})}
    found["length"] = fmean(answer.length for answer in answers)
    found["truncated"] = fmean(answer.truncated for answer in answers)
    return found


def difference(values: torch.Tensor, drawn: torch.Tensor) -> dict[str, float]:
    low, high = bootstrap.quantiles(drawn)
    return {"mean": float(values.mean()), "low": low, "high": high}


def share_closed(means: dict[str, torch.Tensor], column: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The share of the distance between baseline and teacher that is gone; null where the teacher is not better."""
    before, now, teacher = (float(means[name].mean()) if name in means else None for name in ("baseline", "model", "teacher"))
    share = gap_closed(before, now, teacher)
    if share is None:
        return {"gap_closed": None, "gap_closed_interval": None}
    bounds = bootstrap.gap_closed(torch.stack([column["model"], column["baseline"], column["teacher"]], 1))
    return {"gap_closed": share, "gap_closed_interval": None if bounds is None else list(bounds)}


def place_of(run: Path) -> Path:
    """A file beside the run's own that does not exist yet: eval.json, eval-2.json, …"""
    number = 1
    while (file := run / ("eval.json" if number == 1 else f"eval-{number}.json")).exists():
        number += 1
    return file


def told(target: Target) -> dict[str, Any]:
    """What was judged, as JSON."""
    return {
        "target": target.name,
        "model": target.config.model.path,
        "baseline": None if target.baseline is None else target.baseline.path,
        "teacher": target.config.teacher.path,
        "seed": target.config.seed,
        "overrides": list(target.overrides),
    }
