"""The training loop: evaluate, step, save, and rewind when numbers go wrong. Builds nothing, prints nothing: `run` yields events.

`Trainer.train_step` is a whole step; `opd.training.step` has its formulas.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from opd.config.options import Control, Engine, SamplingDtype, TeacherWeights, Truncated, naming_teacher
from opd.config.schema import Config
from opd.data.given import given_rollout, takes_given
from opd.data.order import Order, nth_position, prompt_order
from opd.data.prompts import Prompt
from opd.data.rollouts import Request, Rollout, micro_batches
from opd.errors import ConfigError, EngineError, NumericError, Preempted, TeacherError
from opd.models.device import peak_memory
from opd.models.distributed import Strategy, on_main_process, run_stoppable, stop_all_processes
from opd.models.policy import padding_limit
from opd.objective import group_normalised
from opd.runs.outcome import is_detailed_step
from opd.samplers import Decoding, GenerateSampler, Sampler
from opd.teachers import MovingAverage, Scored
from opd.training.checkpoint import (
    AHEAD,
    AVERAGE,
    TOKENS,
    Checkpoint,
    Checkpoints,
    Snapshot,
    model_tensors,
    restore,
    snapshot,
    trained_tensors,
)
from opd.training.control import SHUFFLED, shuffled_scores
from opd.training.evaluate import Evaluation, Evaluator
from opd.training.logs import Guard
from opd.training.masked import check_masses
from opd.training.metrics import Alternatives, ByPosition, step_metrics
from opd.training.spans import scored_logps, span_problems
from opd.training.speed import Speed
from opd.training.step import NotFinite, Step, lr_factor
from opd.training.tokens import Tokens, concatenate, load_tokens

log = logging.getLogger(__name__)

NON_FINITE_LIMIT = 3  # steps in a row
SAME_MODEL = 1e-3  # nats per token between the teacher and a student that is the same model
COMPARED = "compared teachers"  # the choice that lists the served ones whose scores of a batch were checked
ALTERNATIVES = 5  # most probable tokens of the teacher that are stored at each token, in detailed steps


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step with its metrics.

    Args:
        weights: Loss weight of each rollout's tokens.
        alternatives: The teacher's most probable tokens for the rollouts that are stored, in some steps.
    """

    step: int
    metrics: dict[str, float]
    by_position: ByPosition
    tokens: Tokens
    weights: list[float]
    alternatives: Alternatives


@dataclass(frozen=True, slots=True)
class Evaluated:
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    step: int


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run continues after `step`, with the weights of that time, and without the samples at the positions `left_out`."""

    step: int
    left_out: list[int]


Event = StepDone | Evaluated | Saved | Rewound


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


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Everything a run needs, made by `opd.training.build`, and where the run stands.

    Args:
        student: The student as a transformers model; `strategy.policy` is the module that is trained.
        saved_state: What identifies the run, stored with every checkpoint.
        step: Steps done.
        tokens: The table of the step that has begun.
        best: The best evaluation's score so far.
        ahead: The next step's rollouts, sampled in the background.
        average: The teacher's weights, where they follow the student's.
        grown: Bytes by which this process's peak memory rose in each kind of work so far.
        canaries: Steps between two checks of each served teacher, by its label.
    """

    config: Config
    strategy: Strategy
    student: Any
    sampler: Sampler
    evaluator: Evaluator
    checkpoints: Checkpoints
    prompts: Sequence[Prompt]
    scoring: Step
    speed: Speed
    max_steps: int
    saved_state: dict[str, Any]
    step: int = 0
    evaluated: int | None = None
    best: float | None = None
    trained_tokens: int = 0
    tokens: Tokens | None = None
    trouble: Trouble = field(default_factory=Trouble)
    ahead: Future[list[Rollout]] | None = None
    average: MovingAverage | None = None
    background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    grown: dict[str, int] = field(default_factory=dict)
    guard: Guard = field(init=False)
    order: Order = field(init=False)
    canaries: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = prompt_order(self.config, self.prompts)
        self.guard = Guard(self.config)
        teachers = {label: part.teacher for label, part in self.config.parts_by_teacher.items()}
        self.canaries = {label: teacher.canary_every for label, teacher in teachers.items() if teacher.url is not None}

    @property
    def accelerator(self) -> Accelerator:
        return self.strategy.accelerator

    @property
    def device(self) -> torch.device:
        return self.scoring.device

    @property
    def prompts_per_step(self) -> int:
        processes: int = self.accelerator.num_processes
        return self.config.train.batch_size * processes

    # The loop.

    def run(self) -> Iterator[Event]:
        """Train until `max_steps`, evaluate every `eval.steps` and before and after, save every `checkpoint.every` steps.

        Saves and raises `Preempted` when a signal asks it to stop, or `TeacherError` when a served teacher stays away.
        """
        try:
            yield from self.loop()
        except (Preempted, TeacherError):
            yield self.save(needed=True)
            raise

    def loop(self) -> Iterator[Event]:
        self.note_memory("loading")
        while True:
            is_last = self.step >= self.max_steps
            if self.evaluation_due(is_last):
                yield from self.evaluate()
            if is_last:
                return
            done = self.train_step()
            yield done
            self.guard.check(done.step, done.metrics)
            self.check_copy(done.metrics.get("engine_gap", 0.0))
            if self.step == 1:
                self.check_distance(done.tokens)
                self.check_masked(done)
                for problem in span_problems(done.metrics):
                    log.warning("teacher.alignment=spans: %s", problem)
            self.check_scores(done.tokens)
            if self.trouble.steps == NON_FINITE_LIMIT:
                yield self.rewind()
            elif self.save_due():
                yield self.save()
            elif self.canary_due():
                on_main_process(self.accelerator, self.scoring.teacher.check)

    def evaluation_due(self, is_last: bool) -> bool:
        every = self.config.eval.steps
        return self.evaluated != self.step and (self.step == 0 or is_last or (every > 0 and self.step % every == 0))

    def save_due(self) -> bool:
        """Don't save while steps are non-finite: `rewind` needs a checkpoint from before them."""
        return self.step == self.max_steps or (self.step % self.config.checkpoint.every == 0 and self.trouble.steps == 0)

    def canary_due(self) -> bool:
        return any(every > 0 and self.step % every == 0 for every in self.canaries.values())

    def evaluate(self) -> Iterator[Event]:
        self.wait_for_ahead()
        self.sync_weights()
        with self.sampler_ready():
            evaluation = self.evaluator.student(self.step, self.sampler, self.student, self.scoring.teacher, self.scoring_ready)
        self.note_memory("evaluation")
        self.evaluated = self.step
        score = evaluation.score
        if score is not None and self.step > 0 and (self.best is None or score > self.best):
            self.best = score
            if self.config.checkpoint.keep_best:
                yield self.save(best=score)
        yield Evaluated(evaluation)

    def note_memory(self, work: str) -> None:
        """Attribute the rise of the memory peak since the last call to `work`."""
        rise = peak_memory(self.device) - sum(self.grown.values())
        self.grown[work] = self.grown.get(work, 0) + rise

    def check_copy(self, gap: float) -> None:
        """With sampling.dtype=auto, stop sampling with a bf16 copy whose log-probs are too far from the trainer's."""
        sampling, sampler = self.config.sampling, self.sampler
        comparable = self.config.draws_from_scored
        if sampling.dtype is not SamplingDtype.auto or not comparable or not gap > sampling.max_gap:  # also where it is not finite
            return
        if isinstance(sampler, GenerateSampler) and sampler.copy is not None:
            sampler.drop_copy()
            self.scoring.choices["bf16_copy"] = False
            log.warning(
                "step %d: the bf16 copy's log-probs are %.3f nats from the trainer's (sampling.max_gap=%g): sampling with the trainer's "
                "weights from here on",
                self.step,
                gap,
                sampling.max_gap,
            )

    def check_distance(self, tokens: Tokens) -> None:
        """Warn where a teacher's scores are the student's: there is nothing to learn."""
        columns = tokens.columns
        if "logp" not in columns:
            return
        labels = [rollout.request.prompt.teacher for rollout in tokens.rollouts]
        for label, part in self.config.parts_by_teacher.items():
            if part.teaches_itself and not part.teacher.has_own_view:  # it moves away by the rewards of the task
                continue
            is_own_R = torch.tensor([own == label for own in labels], device=self.device)
            gap_N = (columns["teacher_logp"] - columns["logp"]).abs()[is_own_R[tokens.rollout_N]]
            if "span" in columns:
                gap_N = columns["reverse_kl"][columns["span"] >= 0].abs()
            if len(gap_N) == 0 or float(gap_N.mean()) >= SAME_MODEL:
                continue
            name = f"teachers.{label}" if label else "teacher.url" if part.teacher.url else "teacher.path"
            problem = "this teacher is the student"
            if part.teaches_itself:
                name, problem = naming_teacher(label)(part.weights_option), "what it reads besides changes nothing"
            log.warning("%s: its log-probs are the student's up to %.1e nats: %s", name, float(gap_N.mean()), problem)

    def check_masked(self, done: StepDone) -> None:
        """Raise `ConfigError`, before anything is saved, where student or teacher wants to write what the other one lacks."""
        overlap = self.scoring.overlap
        if overlap is not None and (problem := check_masses(done.metrics, done.tokens, overlap)):
            raise ConfigError("; ".join(problem))

    def check_scores(self, tokens: Tokens) -> None:
        """Let each served teacher check its scores of the first batch that it scored, once a run. Collective.

        Raises `EngineError` before that batch's step is saved.
        """
        if not self.canaries or self.trouble.steps > 0:
            return
        compared = self.scoring.choices.setdefault(COMPARED, [])
        due = {rollout.request.prompt.teacher for rollout in tokens.rollouts if rollout.trained} & self.canaries.keys() - {*compared}

        def check() -> None:
            scored = []
            for index, rollout in enumerate(tokens.rollouts):
                if rollout.trained and rollout.request.prompt.teacher in due:
                    scored.append(Scored(rollout, *scored_logps(tokens.of_rollout(index))))
            if scored := [one for one in scored if one.logp]:  # of spans a rollout may have none that is scored
                self.scoring.teacher.check_scores(scored)

        on_main_process(self.accelerator, check)
        compared += sorted(due)

    # A step.

    def train_step(self) -> StepDone:
        """Sample, score, and take `ppo.steps` optimizer steps on all tokens."""
        rate = self.config.optim.lr * lr_factor(self.config.optim, self.step, self.max_steps)
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = rate
        tokens = self.tokens = self.tokens or self.begin_step()
        is_finite = True
        while is_finite and tokens.inner < self.config.ppo.steps:
            stop_all_processes(self.accelerator)
            is_finite = self.inner_step(tokens)
        self.tokens = None
        self.step += 1
        self.trouble.steps = 0 if is_finite else self.trouble.steps + 1
        self.trouble.places = [] if is_finite else self.trouble.places
        done = self.finish_step(tokens, rate)  # which asks the teacher of this step
        if self.average is not None:
            self.average.update(trained_tensors(self.student, self.strategy.masters))
        return done

    def begin_step(self) -> Tokens:
        """Sample, and let the teacher score."""
        begin = clock(self.device)
        if self.ahead is None:
            self.sync_weights()
        with self.sampler_ready():
            rollouts, done = run_stoppable(self.accelerator, lambda: (self.sample(), clock(self.device)))
        self.ahead = None
        self.sample_ahead()
        self.note_memory("sampling")
        sampled = clock(self.device)
        tokens = Tokens(self.scoring.align(self.with_masks(rollouts)), self.device, bonus_R=self.task_bonus(rollouts))
        tokens.is_detailed = is_detailed_step(self.step + 1, self.max_steps) and self.has_teacher_states()
        try:
            self.scoring.score(tokens)
        except (EngineError, Preempted):
            self.wait_for_ahead()
            self.ahead = Future()  # saved, and scored after a resume
            self.ahead.set_result(rollouts)
            raise
        if self.config.control is Control.shuffled:
            tokens.columns[SHUFFLED] = shuffled_scores(tokens, self.accelerator, self.config.seed, self.step)
        self.note_memory("scoring")
        tokens.seconds |= {"sample": done - begin, "wait": sampled - done, "score": clock(self.device) - sampled}
        return tokens

    def has_teacher_states(self) -> bool:
        """Return whether all teachers' whole distributions can be computed: not by a server, nor after the head that scored is gone."""
        weights = {part.teacher_weights for part in self.config.parts_by_teacher.values()}
        return not (
            self.config.is_served or self.scoring.spans is not None or (self.strategy.is_sharded and TeacherWeights.current in weights)
        )

    def inner_step(self, tokens: Tokens) -> bool:
        """Take one optimizer step. Returns whether its numbers were finite."""
        begin = clock(self.device)
        problem = self.scoring.update(tokens)
        if problem is None:
            self.sampler.refresh()
        else:
            self.note_trouble(tokens, problem)
        self.note_memory("update")
        tokens.inner += 1
        tokens.seconds["update"] += clock(self.device) - begin
        return problem is None

    def finish_step(self, tokens: Tokens, rate: float) -> StepDone:
        for name, share in self.speed.metrics(tokens).items():
            tokens.means.add(name, share, 1.0)
        limit, datasets = self.config.sampling.max_new_tokens, sorted(self.config.data.mix)
        metrics, by_position = step_metrics(tokens, self.accelerator, limit, datasets)
        self.trained_tokens += int(metrics["tokens"])
        metrics |= {
            "optim/lr": rate,
            "tokens_total": float(self.trained_tokens),
            "memory/peak_bytes": float(self.accelerator.gather(torch.tensor([peak_memory(self.device)], device=self.device)).max()),
            "epoch": self.step * self.prompts_per_step / len(self.prompts),
        }
        weights = self.scoring.token_weights(tokens.rollouts)[0].tolist()
        return StepDone(self.step, metrics, by_position, tokens, weights, self.alternatives(tokens.rollouts))

    def sample(self) -> list[Rollout]:
        """Return this process's rollouts of the step; with `sampling.lag`, those that were sampled ahead."""
        return self.sample_step(self.step) if self.ahead is None else self.ahead.result()

    def sample_ahead(self) -> None:
        """With `sampling.lag`, let a server sample the next step from the current weights meanwhile."""
        if self.config.sampling.lag and self.step + 1 < self.max_steps:
            self.sync_weights()
            self.ahead = self.background.submit(self.sample_step, self.step + 1)

    def sample_step(self, step: int) -> list[Rollout]:
        sampling, requests = self.config.sampling, self.requests(step)
        decoding = Decoding(sampling.temperature, sampling.max_new_tokens, sampling.top_p, sampling.top_k, sampling.batch_size)

        def expect(done: Sequence[Rollout]) -> None:
            self.scoring.teacher.expect(self.scoring.align(self.with_masks(done)))

        given = {row: given_rollout(requests[row], sampling.max_new_tokens) for row in self.given_rows(step, requests)}
        if not given:
            return self.sampler.sample(requests, decoding, "train", expect)
        expect(list(given.values()))
        others = [request for row, request in enumerate(requests) if row not in given]
        sampled = iter(self.sampler.sample(others, decoding, "train", expect) if others else ())
        return [given[row] if row in given else next(sampled) for row in range(len(requests))]

    def wait_for_ahead(self) -> None:
        """Wait for the background: nothing else may sample, or change the weights that it samples with."""
        if self.ahead is not None:
            wait([self.ahead])

    def sync_weights(self) -> None:
        """Give the current weights to an engine with weights of its own, before any process asks it."""
        self.sampler.sync_weights(partial(on_main_process, self.accelerator))

    def sampler_ready(self) -> AbstractContextManager[None]:
        """Let the sampler work without collectives for the block. vLLM has weights of its own."""
        return nullcontext() if self.config.sampling.engine is Engine.vllm else self.strategy.gathered_weights()

    @contextmanager
    def scoring_ready(self) -> Iterator[None]:
        """Within `sampler_ready`, let student and teacher answer without collectives for the block."""
        is_vllm = self.config.sampling.engine is Engine.vllm
        with self.strategy.gathered_weights() if is_vllm else nullcontext(), self.scoring.teacher.ready():
            yield

    def with_masks(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Mask the tokens that are not scored: those after `ppo.loss_prefix`, and all of a dropped rollout.

        Where all would be dropped, the shortest stays, with a weight of 0: other processes wait for this one's gradients.
        """
        drops = self.config.sampling.truncated is Truncated.drop
        dropped = {index for index, rollout in enumerate(rollouts) if drops and rollout.truncated}
        if len(dropped) == len(rollouts):
            dropped.remove(min(dropped, key=lambda index: len(rollouts[index].completion)))
        prefix = self.config.ppo.loss_prefix
        masked = []
        for index, rollout in enumerate(rollouts):
            length = len(rollout.completion)
            count = 0 if index in dropped else length if prefix is None else min(prefix, length)
            mask = rollout.mask or (True,) * length
            masked.append(rollout if count == length else replace(rollout, mask=mask[:count] + (False,) * (length - count)))
        return masked

    def task_bonus(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        """Return `ppo.reward_coef` times each rollout's reward, normalised among its prompt's completions (R,); None where it is off.

        Given completions get 0 and are not compared with.
        """
        coefficient = self.config.ppo.reward_coef
        if coefficient == 0:
            return None
        sampled = torch.tensor([row for row, rollout in enumerate(rollouts) if not rollout.given], dtype=torch.long)
        rewards = torch.tensor([reward or 0.0 for reward in self.evaluator.judge([rollouts[row] for row in sampled.tolist()])])
        bonus_R = torch.zeros(len(rollouts))
        bonus_R[sampled] = coefficient * group_normalised(rewards, sampled // self.config.sampling.n)
        return bonus_R.to(self.device)

    def alternatives(self, rollouts: Sequence[Rollout]) -> Alternatives:
        """Return the teacher's most probable ids and log-probs (tokens, k) at each token of the stored rollouts.

        In the main process, in the steps of `is_detailed_step`, where the teacher is here, has the student's tokens, and has the weights
        that scored; else nothing.
        """
        if not is_detailed_step(self.step, self.max_steps) or self.config.is_served or self.scoring.spans is not None:
            return {}
        if any(part.teacher_weights is TeacherWeights.current for part in self.config.parts_by_teacher.values()):
            return {}
        stored = rollouts[: self.config.track.rollouts_per_step] if self.accelerator.is_main_process else []
        alternatives = {}
        with self.scoring.teacher.ready():
            max_padding = padding_limit(self.device)
            for batch in micro_batches(stored, self.scoring.choices["max_tokens"], self.scoring.pad_id, self.scoring.packed, max_padding):
                states = self.scoring.teacher.states(batch.teacher_inputs)
                ids, logp = (values.cpu() for values in states.top(ALTERNATIVES, self.config.temperature))
                lengths = [len(stored[index].trained) for index in batch.rollouts]
                for index, own_ids, own_logp in zip(batch.rollouts, ids.split(lengths), logp.split(lengths), strict=True):
                    alternatives[index] = (own_ids, own_logp)
        return alternatives

    # Data.

    def places(self, step: int) -> list[int]:
        """Return the positions of this process's prompts of a step in the endless sequence of samples."""
        size = self.config.train.batch_size
        start = step * self.prompts_per_step + self.accelerator.process_index * size
        return [nth_position(number, self.trouble.left_out) for number in range(start, start + size)]

    def requests(self, step: int) -> list[Request]:
        """Return this process's share of a step's prompts, `sampling.n` times each."""
        drawn = [self.order.at(position) for position in self.places(step)]
        return [Request(self.prompts[index], epoch, attempt) for epoch, index in drawn for attempt in range(self.config.sampling.n)]

    def given_rows(self, step: int, requests: Sequence[Request]) -> list[int]:
        """Return which of this process's requests of a step take a given completion: a function of the seed and their place in the run.

        Each dataset counts its own rows, so that the share holds in each, in whatever order they take turns.
        """
        share, n, seed = self.config.train.given_share_at(step), self.config.sampling.n, self.config.seed
        numbers = [n * self.order.turn(position) + attempt for position in self.places(step) for attempt in range(n)]
        rows = enumerate(zip(requests, numbers, strict=True))
        return [row for row, (request, number) in rows if request.prompt.given and takes_given(seed, number, share)]

    # Checkpoints and trouble.

    def save(self, best: float | None = None, needed: bool = False) -> Saved:
        """Commit a checkpoint of this moment; between inner steps with the token table, and with rollouts that were sampled ahead.

        Args:
            best, needed: As in `Checkpoints.save`.

        Raises:
            EngineError: A served teacher is another one by now: the last steps are not worth saving. Not where it is `needed`.
        """
        if not needed:
            on_main_process(self.accelerator, self.scoring.teacher.check)
        tables, numbers = {AHEAD: self.sampled_ahead(), AVERAGE: None if self.average is None else self.average.averages}, None
        if self.tokens is not None:
            means = self.tokens.means.over_processes(self.accelerator)
            numbers = {**self.tokens.numbers(), "sums": means.sums, "counts": means.counts}
            tables[TOKENS] = concatenate(gather_object([self.tokens.to_tensors()]))
        state = {
            **self.saved_state,
            "step": self.step,
            "inner": 0 if self.tokens is None else self.tokens.inner,
            "tokens": numbers,
            "trouble": asdict(self.trouble),
        }
        files = {name: table for name, table in tables.items() if table is not None}
        weights = model_tensors(self.student, self.strategy.masters)
        taken: Snapshot = snapshot(weights, self.strategy.optimizer, state, files, self.accelerator.is_main_process)
        on_main_process(self.accelerator, lambda: self.checkpoints.save(taken, best, needed))
        return Saved(self.step)

    def sampled_ahead(self) -> dict[str, Tensor] | None:
        """Return the next step's rollouts of all processes, awaited; None where there are none, or a process failed to sample its own."""
        if self.ahead is None:
            return None
        self.wait_for_ahead()
        own = None if self.ahead.exception() else Tokens(self.ahead.result(), torch.device("cpu")).to_tensors()
        parts = gather_object([own])
        return None if None in parts else concatenate(parts)

    def resume(self, checkpoint: Checkpoint, restart_step: bool = False) -> None:
        """Restore the moment of the checkpoint. `restart_step`: begin the step that it is in the middle of again."""
        self.wait_for_ahead()
        self.ahead = None
        restore(checkpoint, model_tensors(self.student, self.strategy.masters), self.strategy.optimizer)
        self.strategy.update_module()
        if self.average is not None:  # another run's checkpoint, accepted with resume_force, may have none
            self.average.restore(checkpoint.tensors(AVERAGE) or trained_tensors(self.student, self.strategy.masters))
        self.sampler.refresh()
        self.step = checkpoint.step
        self.trouble = Trouble(**checkpoint.state["trouble"])
        self.tokens = None
        if restart_step:
            return
        stored = checkpoint.tensors(TOKENS)
        if stored is not None:
            self.tokens = self.own_share(stored, checkpoint.state["tokens"], self.device)
        stored = checkpoint.tensors(AHEAD)
        if stored is not None:
            cpu = torch.device("cpu")
            self.ahead = Future()
            self.ahead.set_result(self.own_share(stored, Tokens([], cpu).numbers(), cpu).rollouts)

    def own_share(self, stored: dict[str, Tensor], numbers: dict[str, Any], device: torch.device) -> Tokens:
        prompts = {prompt.sample_id: prompt for prompt in self.prompts}
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        return load_tokens(stored, numbers, prompts, rank, processes, device, self.scoring.align)

    def rewind(self) -> Rewound:
        """Return to the last checkpoint from before the non-finite steps, and leave their samples out."""
        target = on_main_process(self.accelerator, lambda: self.checkpoints.newest(lambda state: state["trouble"]["steps"] == 0))
        if target is None or target.step == self.trouble.rewound_to:
            where = "there is no checkpoint to rewind to" if target is None else f"also after rewinding to step {target.step}"
            raise NumericError(
                f"{NON_FINITE_LIMIT} steps in a row were not finite (step {self.step}), {where}: lower optim.lr, set ppo.advantage_clip, "
                "or set model.dtype=float32; the last checkpoint is untouched"
            )
        places = self.trouble.places
        self.resume(target, restart_step=True)  # rollouts in the checkpoint may be of samples that are left out from here on
        self.trouble.left_out = sorted({*self.trouble.left_out, *places})
        self.trouble.rewound_to = self.step
        self.evaluated = self.step
        return Rewound(self.step, self.trouble.left_out)

    def note_trouble(self, tokens: Tokens, problem: NotFinite) -> None:
        """Log and remember the samples of a skipped update: those with scores that are not finite, else all of the step."""
        places, n = self.places(self.step), self.config.sampling.n

        def samples(indices: Sequence[int]) -> list[tuple[int, int]]:
            return [(places[index // n], tokens.rollouts[index].request.prompt.sample_id) for index in indices]

        named = gather_object(samples(problem.suspects)) or gather_object(samples(range(0, len(tokens.rollouts), n)))
        self.trouble.places = sorted({*self.trouble.places, *(position for position, _ in named)})
        ids = ", ".join(str(sample_id) for sample_id in sorted({sample_id for _, sample_id in named}))
        log.error("step %d: %s: the update is skipped (sample ids %s)", self.step + 1, problem.reason, ids)


def clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
