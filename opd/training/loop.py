"""The training loop: evaluate, step, save, and rewind when numbers go wrong. Builds nothing, prints nothing: `run` yields events.

`Trainer.train_step` is a whole step; `opd.training.step` has its formulas.
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from opd.config.options import Best, Control, Engine
from opd.config.schema import Config
from opd.data.order import Order, nth_position, prompt_order
from opd.data.prompts import Prompt
from opd.data.rollouts import Rollout
from opd.errors import EngineError, NumericError, Preempted, SamplerError, TeacherError
from opd.models.device import peak_memory
from opd.models.distributed import Strategy, on_main_process, run_stoppable, stop_all_processes
from opd.runs.outcome import is_detailed_step
from opd.samplers import Decoding, Sampler
from opd.teachers import MovingAverage
from opd.training.batches import Batch, make_batch, task_bonus, with_masks
from opd.training.checkpoint import AHEAD, AVERAGE, TOKENS, Checkpoint, Checkpoints
from opd.training.checks import NON_FINITE_LIMIT, Guard, Trouble, check_copy, check_first_step, check_scores
from opd.training.control import SHUFFLED, shuffled_scores
from opd.training.cores import Cores, watch_cores
from opd.training.evaluator import Evaluator
from opd.training.events import Evaluated, Event, Rewound, Saved, StepDone
from opd.training.metrics import has_teacher_states, max_peak_memory, step_metrics, teacher_alternatives
from opd.training.speed import Speed
from opd.training.step import Step, lr_factor
from opd.training.tensors import model_tensors, restore, snapshot, trained_tensors
from opd.training.tokens import Tokens, gather_table, load_tokens

CPU = torch.device("cpu")


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Everything a run needs, made by `opd.training.build`, and where the run stands.

    Args:
        student: The student as a transformers model; `strategy.policy` is the module that is trained.
        saved_state: What identifies the run, stored with every checkpoint.
        step: Steps done.
        saved, evaluated: The step of the last checkpoint and of the last evaluation.
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
    saved: int | None = None
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
    cores: Cores = field(init=False)
    order: Order = field(init=False)
    canaries: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = prompt_order(self.config, self.prompts)
        self.guard = Guard(self.config)
        self.cores = watch_cores(self.config, self.device, self.accelerator.num_processes)
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

        Saves and raises `Preempted` when a signal asks it to stop, `TeacherError` when a served teacher stays away, or `SamplerError` when
        the sampling engine fails.
        """
        try:
            yield from self.loop()
        except (Preempted, TeacherError, SamplerError):
            yield self.save(needed=True)
            raise

    def loop(self) -> Iterator[Event]:
        self.note_memory("loading")
        while True:
            if self.evaluation_due():
                yield from self.evaluate()
            if self.step >= self.max_steps:
                if self.saved != self.step:  # a callback ended it at its evaluation
                    yield self.save()
                return
            done = self.train_step()
            yield done
            self.guard.check(done.step, done.metrics)
            check_copy(self.config, self.sampler, self.scoring.choices, done.step, done.metrics.get("engine_gap", 0.0))
            if done.step == 1:
                check_first_step(self.scoring, done.metrics, done.tokens)
            if self.trouble.steps == 0:
                check_scores(self.scoring, self.canaries, done.tokens)
            if self.trouble.steps == NON_FINITE_LIMIT:
                yield self.rewind()
            elif self.save_due():
                yield self.save()
            elif any(every > 0 and self.step % every == 0 for every in self.canaries.values()):
                on_main_process(self.accelerator, self.scoring.teacher.check)

    def stop(self) -> None:
        """End training after the current step, with the last evaluation. All processes call it."""
        self.max_steps = max(1, self.step)  # a summary needs a step

    def evaluation_due(self) -> bool:
        every, is_last = self.config.eval.steps, self.step >= self.max_steps
        return self.evaluated != self.step and (self.step == 0 or is_last or (every > 0 and self.step % every == 0))

    def save_due(self) -> bool:
        """Don't save while steps are non-finite: `rewind` needs a checkpoint from before them."""
        return self.step == self.max_steps or (self.step % self.config.checkpoint.every == 0 and self.trouble.steps == 0)

    def evaluate(self) -> Iterator[Event]:
        self.wait_for_ahead()
        self.sync_weights()
        with self.sampler_ready():
            evaluation = self.evaluator.student(self.step, self.sampler, self.student, self.scoring.teacher, self.scoring_ready)
        self.note_memory("evaluation")
        self.evaluated = self.step
        score = evaluation.score
        if score is not None and math.isfinite(score) and self.step > 0 and (self.best is None or score > self.best):
            self.best = score
            if self.config.checkpoint.best is not Best.drop:
                yield self.save(best=score)
        yield Evaluated(evaluation)

    def note_memory(self, work: str) -> None:
        """Attribute the rise of the memory peak since the last call to `work`."""
        rise = peak_memory(self.device) - sum(self.grown.values())
        self.grown[work] = self.grown.get(work, 0) + rise

    # A step.

    def train_step(self) -> StepDone:
        """Sample, score, and take `ppo.steps` optimizer steps on all tokens."""
        highest = self.config.optim.lr
        assert highest is not None  # `build` chose one
        rate = highest * lr_factor(self.config.optim, self.step, self.max_steps)
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = rate
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = self.tokens = self.tokens or self.begin_step()
        is_finite = True
        while is_finite and tokens.inner < self.config.ppo.steps:
            stop_all_processes(self.accelerator)
            is_finite = self.inner_step(tokens)
        self.tokens = None
        self.step += 1
        self.cores.note(self.step, time.process_time() - cpu, time.perf_counter() - wall)
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
        bonus_R = task_bonus(self.config, self.evaluator, rollouts, self.device)
        tokens = Tokens(with_masks(self.config, rollouts), self.device, bonus_R=bonus_R)
        tokens.is_detailed = is_detailed_step(self.step + 1, self.max_steps) and has_teacher_states(self.scoring)
        try:
            self.scoring.score(tokens)
        except (EngineError, Preempted):
            self.keep_ahead(rollouts)  # saved, and scored after a resume
            raise
        if self.config.control is Control.shuffled:
            tokens.columns[SHUFFLED] = shuffled_scores(tokens, self.accelerator, self.config.seed, self.step)
        self.note_memory("scoring")
        tokens.seconds |= {"sample": done - begin, "wait": sampled - done, "score": clock(self.device) - sampled}
        return tokens

    def inner_step(self, tokens: Tokens) -> bool:
        """Take one optimizer step. Returns whether its numbers were finite."""
        begin = clock(self.device)
        problem = self.scoring.update(tokens)
        if problem is None:
            self.sampler.refresh()
        else:
            self.trouble.note(self.step + 1, problem, tokens.rollouts, self.positions(self.step), self.config.sampling.n)
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
        metrics |= self.cores.metrics() | {
            "optim/lr": rate,
            "tokens_total": float(self.trained_tokens),
            "memory/peak_bytes": max_peak_memory(self.accelerator),
            "epoch": self.step * self.prompts_per_step / len(self.prompts),
        }
        stored = self.config.track.rollouts_per_step if self.accelerator.is_main_process else 0
        is_detailed = is_detailed_step(self.step, self.max_steps)
        alternatives = teacher_alternatives(self.scoring, tokens.rollouts[:stored]) if is_detailed else {}
        return StepDone(self.step, metrics, by_position, tokens, alternatives)

    # Sampling.

    def positions(self, step: int) -> list[int]:
        """Return where this process's prompts of a step are in the endless sequence of samples."""
        size = self.config.train.batch_size
        start = step * self.prompts_per_step + self.accelerator.process_index * size
        return [nth_position(number, self.trouble.left_out) for number in range(start, start + size)]

    def batch(self, step: int) -> Batch:
        return make_batch(self.config, self.prompts, self.order, self.positions(step), step)

    def sample(self) -> list[Rollout]:
        """Return this process's rollouts of the step; with `sampling.lag`, those that were sampled ahead."""
        return self.sample_step(self.step) if self.ahead is None else self.ahead.result()

    def sample_ahead(self) -> None:
        """With `sampling.lag`, let a server sample the next step from the current weights meanwhile."""
        if self.config.sampling.lag and self.step + 1 < self.max_steps:
            self.sync_weights()
            self.ahead = self.background.submit(self.sample_step, self.step + 1)

    def sample_step(self, step: int) -> list[Rollout]:
        requests, given = self.batch(step)
        decoding = Decoding.of(self.config.sampling)

        def expect(done: Sequence[Rollout]) -> list[Rollout]:
            aligned = self.scoring.align(done)
            self.scoring.teacher.expect(with_masks(self.config, aligned))
            return aligned

        if not given:
            return self.sampler.sample(requests, decoding, "train", expect)
        given = dict(zip(given, expect(list(given.values())), strict=True))
        others = [request for row, request in enumerate(requests) if row not in given]
        sampled = iter(self.sampler.sample(others, decoding, "train", expect) if others else ())
        return [given[row] if row in given else next(sampled) for row in range(len(requests))]

    def wait_for_ahead(self) -> None:
        """Wait for the background: nothing else may sample, or change the weights that it samples with."""
        if self.ahead is not None:
            wait([self.ahead])

    def keep_ahead(self, rollouts: list[Rollout]) -> None:
        """Make these the next ones that `sample` returns."""
        self.wait_for_ahead()
        self.ahead = Future()
        self.ahead.set_result(rollouts)

    def sync_weights(self) -> None:
        """Give the current weights to an engine with weights of its own, before any process asks it."""
        try:
            self.sampler.sync_weights(partial(on_main_process, self.accelerator))
        except EngineError as error:
            raise SamplerError(str(error)) from error

    def sampler_ready(self) -> AbstractContextManager[None]:
        """Let the sampler work without collectives for the block. vLLM has weights of its own."""
        return nullcontext() if self.config.sampling.engine is Engine.vllm else self.strategy.gathered_weights()

    @contextmanager
    def scoring_ready(self) -> Iterator[None]:
        """Within `sampler_ready`, let student and teacher answer without collectives for the block."""
        is_vllm = self.config.sampling.engine is Engine.vllm
        with self.strategy.gathered_weights() if is_vllm else nullcontext(), self.scoring.teacher.ready():
            yield

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
            tables[TOKENS] = gather_table(self.tokens)
        inner = 0 if self.tokens is None else self.tokens.inner
        state = {**self.saved_state, "step": self.step, "inner": inner, "tokens": numbers, "trouble": asdict(self.trouble)}
        weights = model_tensors(self.student, self.strategy.masters)
        taken = snapshot(weights, self.strategy.optimizer, state, tables, self.accelerator.is_main_process)
        on_main_process(self.accelerator, lambda: self.checkpoints.save(taken, best, needed))
        self.saved = self.step
        return Saved(self.step)

    def sampled_ahead(self) -> dict[str, Tensor] | None:
        """Return the next step's rollouts of all processes, awaited; None where there are none, or a process failed to sample its own."""
        if self.ahead is None:
            return None
        self.wait_for_ahead()
        return gather_table(None if self.ahead.exception() else Tokens(self.ahead.result(), CPU))

    def resume(self, checkpoint: Checkpoint, restart_step: bool = False) -> None:
        """Restore the moment of the checkpoint. `restart_step`: begin the step that it is in the middle of again."""
        self.wait_for_ahead()
        self.ahead = None
        restore(checkpoint, model_tensors(self.student, self.strategy.masters), self.strategy.optimizer)
        self.strategy.update_module()
        if self.average is not None:  # another run's checkpoint, accepted with resume_force, may have none
            self.average.restore(checkpoint.tensors(AVERAGE) or trained_tensors(self.student, self.strategy.masters))
        self.sampler.refresh()
        self.step = self.saved = checkpoint.step
        self.trouble = Trouble(**checkpoint.state["trouble"])
        self.tokens = None
        if restart_step:
            return
        prompts = {prompt.sample_id: prompt for prompt in self.prompts}
        share = self.accelerator.process_index, self.accelerator.num_processes
        if (stored := checkpoint.tensors(TOKENS)) is not None:
            self.tokens = load_tokens(stored, checkpoint.state["tokens"], prompts, *share, self.device, self.scoring.align)
        if (stored := checkpoint.tensors(AHEAD)) is not None:
            self.keep_ahead(load_tokens(stored, Tokens([], CPU).numbers(), prompts, *share, CPU, self.scoring.align).rollouts)

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


def clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
