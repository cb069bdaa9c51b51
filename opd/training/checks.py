"""Checks of a run: of prompts, rewards, teacher and learning rate before training, then of each step before it is saved.

Some warn, some end the run. `Trouble` counts updates that were not finite.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from opd.config.options import GuardAction, OptimConfig, SamplingDtype, naming_teacher
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rollouts import Rollout
from opd.errors import ConfigError, NumericError
from opd.models.distributed import on_main_process
from opd.runs.intervals import are_shares
from opd.runs.outcome import compared_evaluations, rewards_are_shares
from opd.runs.text import format_amount
from opd.samplers import GenerateSampler, Sampler
from opd.teachers import Scored
from opd.training.masked import check_masses
from opd.training.spans import scored_logps, span_problems
from opd.training.step import NotFinite, Step, lr_factor
from opd.training.tokens import Tokens

log = logging.getLogger(__name__)

SAME_MODEL = 1e-3  # nats per token between the teacher and a student that is the same model
GUARD_STEPS = 10  # consecutive steps at or above a limit
GUARD_LIMITS = {"truncated": 0.95, "repetition": 0.5}  # of these metrics
GUARD_REMEDIES = {
    "truncated": "raise sampling.max_new_tokens, lower optim.lr, or leave them out of the loss with sampling.truncated=mask",
    "repetition": "lower optim.lr, set ppo.advantage_clip, or lower sampling.max_new_tokens",
}
HELD_OUT = "held out"
MAX_REPEATED = 0.05  # share of the training prompts
HIGH_LR = 1e-2  # also for adapters and for the smallest models
NON_FINITE_LIMIT = 3  # steps in a row
COMPARED = "compared teachers"  # the choice that lists the served ones whose scores of a batch were checked


class Guard:
    """Watch the completions for collapse. Each problem is reported once, and again only after it has gone away."""

    def __init__(self, config: Config) -> None:
        self.config = config.sampling
        self.comparable = config.draws_from_scored and config.sampling.lag == 0
        self.steps_above = dict.fromkeys(GUARD_LIMITS, 0)
        self.gap_reported = False

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn of problems in a step's metrics, or raise `NumericError` with `sampling.guard=stop`."""
        self.check_gap(step, metrics.get("engine_gap", 0.0))  # a step of given completions has none
        for name, limit in GUARD_LIMITS.items() if self.config.guard is not GuardAction.none else ():
            self.steps_above[name] = self.steps_above[name] + 1 if metrics.get(name, 0.0) >= limit else 0
            if self.steps_above[name] != GUARD_STEPS:
                continue
            problem = f"step {step}: {name}={metrics[name]:.2f}, at least {limit:g} for {GUARD_STEPS} steps: {GUARD_REMEDIES[name]}"
            if self.config.guard is GuardAction.stop:
                raise NumericError(f"{problem}; the last checkpoint is intact, and sampling.guard=warn continues from it")
            log.warning(problem)

    def check_gap(self, step: int, gap: float) -> None:
        # With top-p, top-k, another temperature or lag=1 the sampler's distribution is not the trainer's, and a gap is expected.
        if self.comparable and gap > self.config.max_gap and not self.gap_reported:
            log.warning(
                f"step {step}: the sampler's log-probs differ from the trainer's by {gap:.3f} nats on average, more than "
                f"sampling.max_gap={self.config.max_gap:g}: it computes in bf16, or its weights are not the student's. Importance weights "
                "correct for it up to ppo.importance_cap; sampling.engine=generate sampling.dtype=trainer has no gap"
            )
        self.gap_reported = gap > self.config.max_gap


def check_copy(config: Config, sampler: Sampler, choices: dict[str, Any], step: int, gap: float) -> None:
    """With sampling.dtype=auto, stop sampling with a bf16 copy whose log-probs are too far from the trainer's."""
    sampling = config.sampling
    is_far = config.draws_from_scored and gap > sampling.max_gap  # not where it is NaN
    if is_far and sampling.dtype is SamplingDtype.auto and isinstance(sampler, GenerateSampler) and sampler.copy is not None:
        sampler.drop_copy()
        choices["bf16_copy"] = False
        log.warning(
            f"step {step}: the bf16 copy's log-probs are {gap:.3f} nats from the trainer's (sampling.max_gap={sampling.max_gap:g}): "
            "sampling with the trainer's weights from here on"
        )


def check_first_step(scoring: Step, metrics: Mapping[str, float], tokens: Tokens) -> None:
    """Warn where there is nothing to learn, or little of it scored.

    Raises:
        ConfigError: Student or teacher wants to write what the other one lacks.
    """
    check_distance(scoring.config, tokens)
    if metrics.get("optim/grad_norm") == 0:
        log.warning("the gradient of step 1 is 0: it trains nothing; raise sampling.temperature, or take another model as teacher")
    if scoring.overlap is not None and (problem := check_masses(metrics, tokens, scoring.overlap)):
        raise ConfigError("; ".join(problem))
    for line in span_problems(metrics):
        log.warning("teacher.alignment=spans: %s", line)


def learning_rate_problems(config: OptimConfig, steps: int) -> list[tuple[str, str]]:
    """Return what keeps a run of so many steps from learning by its learning rate, each with the remedy."""
    found = []
    if config.warmup_steps >= steps:
        reached = 100 * lr_factor(config, steps - 1, steps)
        what = f"optim.warmup_steps={config.warmup_steps}: the learning rate reaches only {reached:.2g} % of optim.lr in {steps} steps"
        found.append((what, "set optim.warmup_steps=0"))
    if config.lr is not None and config.lr >= HIGH_LR:
        found.append((f"optim.lr={config.lr:g}: so high a rate destroys most models", "set optim.lr=null for one that suits the model"))
    return found


def prompt_problems(train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> list[tuple[str, str, str]]:
    """Return prompts without text, evaluation prompts that are trained on, and many repeated training prompts: name, what, and remedy."""
    found = []
    for which, prompts in (("training", train), ("evaluation", evaluation)):
        if empty := sum(not prompt.text.strip() for prompt in prompts):
            used = {"training": "trained on", "evaluation": "evaluated"}[which]
            what = f"{empty:,} of {len(prompts):,} {which} prompts have no text and are {used} all the same"
            found.append(("empty prompts", what, "remove these rows from the file, or check data.prompt"))
    train, evaluation = ([prompt for prompt in prompts if prompt.text.strip()] for prompts in (train, evaluation))
    count = Counter(prompt.ids for prompt in train)
    if shared := sum(prompt.ids in count for prompt in evaluation):
        what = f"{shared:,} of {len(evaluation):,} evaluation prompts are trained on too"
        found.append((HELD_OUT, what, "the evaluation would reward memorisation: remove them from the training data"))
    repeated = len(train) - len(count)
    if repeated > MAX_REPEATED * len(train):
        what = f"{repeated:,} of {len(train):,} training prompts repeat others"
        found.append(("repeated prompts", what, "leave the repeated rows out, unless they should count as often"))
    return found


def check_prompts(train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> None:
    """Warn of `prompt_problems`."""
    for _, what, remedy in prompt_problems(train, evaluation):
        log.warning("%s: %s", what, remedy)


def check_rewards(rewards: Iterable[float | None], name: str) -> None:
    """Warn of rewards that are no shares of a right answer. `name`: of the configured reward."""
    if outside := [reward for reward in rewards if not are_shares([reward])]:
        range_of = f"{outside[0]:g} for example: no reward is then shown in percent, and intervals are wide"
        log.warning("eval.reward=%s gives values outside 0 to 1, %s; let it return 1 for a right answer", name, range_of)


def check_teacher(evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Warn where the teacher has nothing to teach by its reward. `evaluations`: the run's so far, those before training."""
    found = compared_evaluations(evaluations)
    before, teacher = (((found[who] or {}).get("rewards") or {}).get("mean") for who in ("before", "teacher"))
    if before is None or teacher is None:
        return
    check, shares = "check eval.max_new_tokens, eval.reward and data.answer with opd doctor", rewards_are_shares(evaluations)
    if teacher == 0 and shares:
        log.warning("the teacher's reward is 0: it is never right; %s", check)
    elif teacher < before:
        theirs, ours = (format_amount(mean, shares) for mean in (teacher, before))
        log.warning("the teacher's reward, %s, is below the student's, %s; %s", theirs, ours, check)


def check_distance(config: Config, tokens: Tokens) -> None:
    """Warn where a teacher's scores are the student's: there is nothing to learn."""
    columns = tokens.columns
    if "logp" not in columns:
        return
    labels = [rollout.request.prompt.teacher for rollout in tokens.rollouts]
    for label, part in config.parts_by_teacher.items():
        if part.teaches_itself and not part.teacher.has_own_view:  # it moves away by the rewards of the task
            continue
        is_own_R = torch.tensor([own == label for own in labels], device=tokens.device)
        gap_N = (columns["teacher_logp"] - columns["logp"]).abs()[is_own_R[tokens.rollout_N]]
        if "span" in columns:
            gap_N = columns["reverse_kl"][columns["span"] >= 0].abs()
        if len(gap_N) == 0 or float(gap_N.mean()) >= SAME_MODEL:
            continue
        name = f"teachers.{label}" if label else "teacher.url" if part.teacher.url else "teacher.path"
        problem = "the two agree, so there is nothing to learn; unless both were certain, they are the same model"
        if part.teaches_itself:
            name, problem = naming_teacher(label)(part.weights_option), "its own prompt changes none of its scores"
        log.warning("%s: its log-probs are the student's up to %.1e nats: %s", name, float(gap_N.mean()), problem)


def check_scores(scoring: Step, served: Collection[str], tokens: Tokens) -> None:
    """Let each served teacher check its scores of the first batch that it scored, once a run. Collective.

    Args:
        served: The labels of these teachers.

    Raises:
        EngineError: The scores are wrong.
    """
    if not served:
        return
    compared = scoring.choices.setdefault(COMPARED, [])
    due = {rollout.request.prompt.teacher for rollout in tokens.rollouts if rollout.trained}.intersection(served).difference(compared)

    def check() -> None:
        scored = []
        for index, rollout in enumerate(tokens.rollouts):
            if rollout.trained and rollout.request.prompt.teacher in due:
                scored.append(Scored(rollout, *scored_logps(tokens.of_rollout(index))))
        if scored := [one for one in scored if one.logp]:  # of spans a rollout may have none that is scored
            scoring.teacher.check_scores(scored)

    on_main_process(scoring.strategy.accelerator, check)
    compared += sorted(due)


@dataclass(slots=True)
class Trouble:
    """Updates that were not finite.

    Args:
        steps: How many steps in a row.
        places: Positions of their samples in the data (see `opd.data.order`).
        left_out: Positions that are not trained on any more.
        rewound_to: The step of the last rewind.
    """

    steps: int = 0
    places: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    rewound_to: int | None = None

    def note(self, step: int, problem: NotFinite, rollouts: Sequence[Rollout], positions: Sequence[int], n: int) -> None:
        """Log and remember the samples of a skipped update: those with scores that are not finite, else all of the step. Collective.

        Args:
            positions: Of the samples, which have `n` rollouts each.
        """

        def samples(indices: Sequence[int]) -> list[tuple[int, int]]:
            return [(positions[index // n], rollouts[index].request.prompt.sample_id) for index in indices]

        named = gather_object(samples(problem.suspects)) or gather_object(samples(range(0, len(rollouts), n)))
        self.places = sorted({*self.places, *(position for position, _ in named)})
        ids = ", ".join(str(sample_id) for sample_id in sorted({sample_id for _, sample_id in named}))
        log.error("step %d: %s: the update is skipped (sample ids %s)", step, problem.reason, ids)
