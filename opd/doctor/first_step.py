"""Checks of the loaded models before any training: a trial step, and the rewards of student and teacher."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.options import Truncated
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rollouts import Request, Rollout
from opd.data.spans import Unscored
from opd.doctor.findings import Finding, fail, ok, warn
from opd.models.load import decode
from opd.models.overlap import Overlap
from opd.objective.overlap import MASS, OVERLAP_K, SHARE
from opd.runs.intervals import are_shares, paired_interval
from opd.runs.text import format_amount, format_reward
from opd.samplers import Sampler
from opd.teachers import LocalTeacher
from opd.training.evaluator import Evaluator, exact_kl
from opd.training.loop import Trainer
from opd.training.masked import ROLES, check_masses, name_masked
from opd.training.metrics import add_rollout_metrics
from opd.training.spans import PREFIX, span_problems
from opd.training.speed import Speed
from opd.training.tokens import Tokens

SELF_PROMPTS = 4
MAX_SELF_KL = {False: 1e-4, True: 2e-2}  # nats per token between a model and itself, in float32 and in bf16
MAX_KL = 3.0  # nats per token; above it the reverse KL of single tokens is mostly noise
MIN_ENTROPY = 0.02  # nats per token; below it the student's samples are nearly all the same
MAX_TRUNCATED = 0.5  # share of completions; above it the student hardly learns to stop
MAX_ODD = 0.5  # share of completions with a spelling that the student's tokenizer does not make
NEAR_ZERO = 0.05  # mean reward; up to it few completions are worth more than others
SHORT_STEP = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Step:
    """A step's token table, metrics, and seconds of sampling, scoring and updating."""

    seconds: dict[str, float]
    metrics: dict[str, float]
    tokens: Tokens

    @property
    def rollouts(self) -> list[Rollout]:
        return self.tokens.rollouts


def trial_step(trainer: Trainer) -> Step:
    """Run one step with one inner step at a learning rate of 0, and reset the optimizer's state; weights stay as they are.

    A step below `SHORT_STEP` is repeated, because what only the first step does would be much of it.
    """
    optimizer = trainer.strategy.optimizer
    for _ in range(2):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        tokens = trainer.begin_step()
        trainer.inner_step(tokens)
        optimizer.state.clear()
        if time.perf_counter() - start >= SHORT_STEP:
            break
    add_rollout_metrics(tokens, trainer.config.sampling.max_new_tokens)
    return Step(dict(tokens.seconds), tokens.means.means() | trainer.speed.metrics(tokens), tokens)


def check_self(evaluator: Evaluator, student: PreTrainedModel, rollouts: Sequence[Rollout], bf16: bool) -> list[Finding]:
    """Check that the KL of some of the student's completions is 0 with the student as its own teacher."""
    check = "teacher = student"
    by_prompt = {rollout.request.prompt.sample_id: rollout for rollout in rollouts}
    chosen = [
        # Without the teacher's own view and tokens.
        replace(rollout, alignment=None, request=Request(replace(rollout.request.prompt, teacher_ids=None)))
        for rollout in list(by_prompt.values())[:SELF_PROMPTS]
    ]
    with evaluator.precision():
        teacher = LocalTeacher(student, evaluator.vocabulary, bf16=bf16, masked=evaluator.masked)
        pad_id, max_tokens = evaluator.tokenizer.pad_token_id, evaluator.choices["max_tokens"]
        total, tokens = exact_kl(student, teacher, chosen, evaluator.vocabulary, max_tokens, pad_id, evaluator.masked)
    kl = total / tokens
    what = f"KL {kl:.1e} nats/token on {len(chosen)} prompts"
    if abs(kl) > MAX_SELF_KL[bf16]:
        return [fail(check, what, "it must be 0, so scores of this model are wrong here: try model.dtype=float32 train.packing=false")]
    return [ok(check, what)]


def check_sampler(step: Step, config: Config) -> list[Finding]:
    """Compare the sampler's log-probs with the trainer's."""
    gap = step.metrics["engine_gap"]
    comparable = config.draws_from_scored
    why = "" if comparable else ", as expected with top-p, top-k or ppo.temperature"
    what = f"the sampler's log-probs are {gap:.1e} nats from the trainer's" + why
    if gap > config.sampling.max_gap and comparable:
        return [warn("sampler", what, "set sampling.engine=generate sampling.dtype=trainer, which compute as the trainer does")]
    return [ok("sampler", what)]


def check_masked(step: Step, overlap: Overlap | None, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Check how much probability student and teacher give to the tokens that only one of them has."""
    if overlap is None:
        return []
    check = "masked tokens"
    if (problem := check_masses(step.metrics, step.tokens, overlap)) is not None:
        return [fail(check, *problem)]
    parts = []
    for role in ROLES:
        names = name_masked(role, step.tokens, overlap)
        parts.append(f"{role} {step.metrics[f'masked/{role}']:.3%} of its probability" + (f" ({names})" if names else ""))
    what = f"on tokens that only one model has: {', '.join(parts)}"
    texts = [decode(tokenizer, rollout.completion) for rollout in step.rollouts]
    if spelled := sum(any(token in text for token in overlap.teacher.values()) for text in texts):
        remedy = "the teacher reads such text as one token elsewhere: leave these rows out, if there are more than a few"
        return [warn(check, f"{what}; {spelled} of {len(texts)} completions spell one of the teacher's in several tokens", remedy)]
    return [ok(check, what)]


def check_start(step: Step, config: Config) -> list[Finding]:
    """Check the KL, entropy and truncation of the first step."""
    kl, entropy, truncated = (step.metrics.get(name, 0.0) for name in ("reverse_kl", "entropy", "truncated"))
    tokens = sum(len(rollout.completion) for rollout in step.rollouts)
    limit, handling = config.sampling.max_new_tokens, config.sampling.truncated

    check = "distance to the teacher"
    what = f"reverse KL {kl:.3f} nats/token over {tokens:,} tokens of the first step, entropy {entropy:.3f}"
    if MASS in step.metrics:
        what += f", top-{OVERLAP_K} overlap {step.metrics[MASS]:.0%} of the teacher's probability ({step.metrics[SHARE]:.0%} of its ids)"
    if kl > MAX_KL:
        remedy = "the reverse KL is noisy: lower sampling.temperature or sampling.max_new_tokens, or set ppo.estimator=exact"
        distance = warn(check, what, remedy)
    elif entropy < MIN_ENTROPY:
        distance = warn(check, what, "the student's samples hardly vary and there is little to correct: raise sampling.temperature")
    else:
        distance = ok(check, what)

    check = "truncation"
    what = f"{truncated:.0%} of the first step's completions reach the limit of {limit} tokens; the mean is {step.metrics['length']:.0f}"
    if truncated <= MAX_TRUNCATED:
        return [distance, ok(check, what)]
    if handling is Truncated.keep:
        return [distance, warn(check, what, "the student hardly learns to stop: raise sampling.max_new_tokens, or ask for shorter answers")]
    make = fail if truncated == 1 else warn
    return [distance, make(check, what, f"sampling.truncated={handling.value} does not train on them: raise sampling.max_new_tokens")]


def check_spans(step: Step) -> list[Finding]:
    """Check how much of the first step a teacher with another tokenizer scores."""
    shares = {name.removeprefix(PREFIX): value for name, value in step.metrics.items() if name.startswith(PREFIX)}
    if not shares:
        return []
    check, count = "spans", sum(len(rollout.completion) for rollout in step.rollouts)
    if problems := span_problems(step.metrics):
        remedy = "the tokenizers, or the prompts as the two templates render them, fit too badly: take another teacher or student"
        return [fail(check, "; ".join(problems), remedy)]
    left_out = ", ".join(f"{reason.value} {shares[reason.value]:.1%}" for reason in Unscored)
    what = (
        f"{count:,} tokens of the first step: {shares.get('one_to_one', 0.0):.1%} of the scored ones are spans of one token in both, "
        f"{shares.get('tokens', 0.0):.2f} tokens a span; not scored: {left_out}"
    )
    odd = shares["not_canonical_completions"]
    if odd > MAX_ODD:
        remedy = "such spellings are not trained on: lower sampling.temperature, and check the tokenizer if it was converted"
        return [warn(check, f"{what}; {odd:.0%} of the completions have spellings that the student's own tokenizer does not make", remedy)]
    return [ok(check, what)]


def evaluation_seconds(evaluator: Evaluator, speed: Speed, step: Step) -> dict[str, float]:
    """Estimate from the trial step what the `student`'s answers, the `teacher`'s and the `kl` of an evaluation take, in seconds."""
    sampled = sum(len(rollout.completion) for rollout in step.rollouts)
    length = sampled / len(step.rollouts)  # as long as those of the step
    a_token = {name: step.seconds[name] / sampled for name in ("sample", "score")}
    answers = len(evaluator.answered) * min(length, evaluator.decoding.max_new_tokens) * a_token["sample"]
    kl = len(evaluator.kl_prompts) * min(length, evaluator.kl_decoding.max_new_tokens) * sum(a_token.values())
    return {"student": answers, "teacher": answers * max(speed.teacher, speed.student) / speed.student, "kl": kl}


def answer_rewards(evaluator: Evaluator, sampler: Sampler, prompts: Sequence[Prompt], as_teacher: bool) -> list[float | None]:
    """Return the rewards of one model's completions, decoded as in the run's evaluations."""
    requests = [Request(prompt.for_teacher() if as_teacher else prompt) for prompt in prompts]
    what = f"evaluating the {'teacher' if as_teacher else 'student'}"
    return evaluator.judge(evaluator.sample(sampler, requests, evaluator.decoding, "evaluation", what))


def check_rewards(
    student: Sequence[float | None], teacher: Sequence[float | None], commands: str = "", takes_given: bool = False
) -> list[Finding]:
    """Compare student and teacher on the same prompts: is there a gap to close, and is the student ever right?

    Args:
        commands: Those of a warm start, for a student that is hardly ever right.
        takes_given: Whether the run has one already.
    """
    check = "rewards before training"
    pairs = [(ours, theirs) for ours, theirs in zip(student, teacher, strict=True) if ours is not None and theirs is not None]
    if not pairs:
        return [fail(check, "no completion could be judged", "check eval.reward, data.answer and data.answer_after")]
    count = len(pairs)
    ours, theirs = (sum(column) / count for column in zip(*pairs, strict=True))
    shares = are_shares(reward for pair in pairs for reward in pair)
    low, high = paired_interval([[theirs - ours for ours, theirs in pairs]], shares)
    difference = format_reward(theirs - ours, (low, high), sign="+", shares=shares)
    what = f"student {format_amount(ours, shares)}, teacher {format_amount(theirs, shares)} of {count} prompts; the difference {difference}"
    if ours == theirs == 0 and shares:
        remedy = "neither is ever right: check eval.max_new_tokens and eval.reward, and whether the teacher can do this task"
        return [warn(check, what, remedy)]
    if high < 0:
        return [fail(check, what, "the teacher is worse than the student: take a better teacher, or another task")]
    if theirs <= ours:
        return [warn(check, what, "the teacher is not better than the student here: try more --prompts, or take a better teacher")]
    if ours > NEAR_ZERO or not shares:
        return [ok(check, what)]
    if takes_given:
        return [ok(check, f"{what}; the run takes given completions (train.given_share)")]
    remedy = f"the student is hardly ever right and learns little from its own completions: start on the teacher's: {commands}"
    return [warn(check, what, remedy)]
