"""How student and teacher do before any training: whether scoring is right, where they differ, and what a step takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from opd.config.schema import Config, Truncated
from opd.data.prompts import Prompt
from opd.data.rollouts import Request, Rollout
from opd.doctor.findings import Finding, fail, ok, warn
from opd.samplers import Sampler
from opd.teachers import LocalTeacher
from opd.training.build import Built
from opd.training.evaluate import Evaluator, exact_kl, interval
from opd.training.loop import Trainer
from opd.training.metrics import add_rollout_metrics

SELF_PROMPTS = 4
SELF_LIMIT = {False: 1e-4, True: 2e-2}  # nats per token between a model and itself, in float32 and in bf16
FAR = 3.0  # nats per token from which the reverse KL of single tokens is mostly noise
DECIDED = 0.02  # nats per token of entropy below which the student always writes the same
SHORT = 5.0  # seconds
CUT = 0.5  # share of completions cut off from which stopping is not learnt


@dataclass(frozen=True, slots=True)
class Step:
    """seconds: what sampling, scoring and the update took. values: the step's metrics."""

    seconds: dict[str, float]
    values: dict[str, float]
    rollouts: list[Rollout]


def trial_step(trainer: Trainer) -> Step:
    """The run's first step with one inner step, at a learning rate of 0: weights stay as they are, and the optimizer forgets.

    A short one is taken again: what only the first does would be much of it.
    """
    begin = time.perf_counter()
    step = step_that_learns_nothing(trainer)
    return step_that_learns_nothing(trainer) if time.perf_counter() - begin < SHORT else step


def step_that_learns_nothing(trainer: Trainer) -> Step:
    for group in trainer.strategy.optimizer.param_groups:
        group["lr"] = 0.0
    current = trainer.tokens = trainer.begin_step()
    trainer.inner_step(current)
    trainer.strategy.optimizer.state.clear()
    trainer.tokens = None
    add_rollout_metrics(current, trainer.config.sampling.max_new_tokens)
    return Step(dict(current.seconds), current.means.means(), current.rollouts)


def check_self(built: Built, rollouts: Sequence[Rollout], bf16: bool) -> list[Finding]:
    """With the student for its teacher, the KL of the student's own completions must be 0."""
    trainer, check = built.trainer, "teacher = student"
    prompts = list({rollout.request.prompt.sample_id: rollout for rollout in rollouts}.values())[:SELF_PROMPTS]
    evaluator = trainer.evaluator
    with evaluator.precision():
        itself = LocalTeacher(trainer.student, evaluator.vocabulary, bf16=bf16)
        total, tokens = exact_kl(
            trainer.student, itself, prompts, evaluator.vocabulary, trainer.scoring.choices["max_tokens"], trainer.scoring.pad_id
        )
    kl = total / tokens
    what = f"KL {kl:.1e} nats/token on {len(prompts)} prompts"
    if abs(kl) > SELF_LIMIT[bf16]:
        return [fail(check, what, "it must be 0: scoring goes wrong for this model here; try model.dtype=float32 and train.packing=false")]
    return [ok(check, what)]


def check_sampler(step: Step, config: Config) -> list[Finding]:
    """The sampler's log-probs against the trainer's."""
    gap = step.values["engine_gap"]
    truncated = config.sampling.top_p < 1 or config.sampling.top_k > 0
    what = f"the sampler's log-probs are {gap:.1e} nats from the trainer's" + (", top-p and top-k in it" if truncated else "")
    if gap > config.sampling.max_gap and not truncated:
        return [warn("sampler", what, "take sampling.engine=generate sampling.dtype=trainer, which round alike")]
    return [ok("sampler", what)]


def check_start(step: Step, config: Config) -> list[Finding]:
    """The first step's KL, entropy and truncation, and what they say of the run to come."""
    values = step.values
    kl, entropy, cut = (values.get(name, 0.0) for name in ("reverse_kl", "entropy", "truncated"))
    tokens = sum(len(rollout.completion) for rollout in step.rollouts)
    found = []
    what = f"reverse KL {kl:.3f} nats/token over {tokens:,} tokens of the first step, entropy {entropy:.3f}"
    if kl > FAR:
        remedy = "the reverse KL is noisy: lower sampling.temperature or sampling.max_new_tokens, or take ppo.estimator=exact"
        found.append(warn("distance to the teacher", what, remedy))
    elif entropy < DECIDED:
        remedy = "the student nearly always writes the same and sees little to correct: raise sampling.temperature"
        found.append(warn("distance to the teacher", what, remedy))
    else:
        found.append(ok("distance to the teacher", what))
    limit = config.sampling.max_new_tokens
    what = f"{cut:.0%} of the first step's completions are cut off at {limit} tokens; they have {values['length']:.0f} on average"
    if cut > CUT and config.sampling.truncated is not Truncated.keep:
        remedy = f"sampling.truncated={config.sampling.truncated.value} leaves them out: raise sampling.max_new_tokens"
        found.append((fail if cut == 1 else warn)("truncation", what, remedy))
    elif cut > CUT:
        found.append(warn("truncation", what, "stopping is hardly learnt: raise sampling.max_new_tokens, or ask for shorter answers"))
    else:
        found.append(ok("truncation", what))
    return found


def answers(evaluator: Evaluator, sampler: Sampler, prompts: Sequence[Prompt], as_teacher: bool) -> list[float | None]:
    """The rewards of one model's answers, decoded as the run evaluates."""
    requests = [Request(prompt.for_teacher() if as_teacher else prompt) for prompt in prompts]
    return evaluator.judge(sampler.sample(requests, evaluator.decoding, "evaluation"))


def check_rewards(student: Sequence[float | None], teacher: Sequence[float | None]) -> list[Finding]:
    """The rewards of both on the same prompts: whether there is a gap, and whether the student is ever right."""
    pairs = [(ours, theirs) for ours, theirs in zip(student, teacher, strict=True) if ours is not None and theirs is not None]
    if not pairs:
        return [fail("rewards before training", "no answer could be judged", "see eval.reward and the answers of the data")]
    count = len(pairs)
    ours, theirs = (sum(column) / count for column in zip(*pairs, strict=True))
    low, high = interval([their - our for our, their in pairs])
    what = f"student {ours:.1%}, teacher {theirs:.1%} of {count} prompts; the difference {theirs - ours:+.1%} [{low:+.1%}, {high:+.1%}]"
    check = "rewards before training"
    if ours == theirs == 0:
        return [
            warn(
                check, what, "neither is ever right: see eval.max_new_tokens and eval.reward, and whether the task is the teacher's at all"
            )
        ]
    if high < 0:
        return [fail(check, what, "the teacher is worse than the student: take a better teacher, or another task")]
    if theirs <= ours:
        return [warn(check, what, "the teacher is not better than the student here: look with more --prompts, or take a better one")]
    if ours == 0:
        return [warn(check, what, "the student never answers right: start with SFT, or with a better student")]
    return [ok(check, what)]
