"""The training loop and its step: sample, score, update; evaluate, save, report."""

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
from torch import Tensor, nn
from torch.optim import Optimizer

from opd.config.schema import Config, Engine, Truncated
from opd.data.order import nth_position, take
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.errors import NumericError, Preempted
from opd.models.policy import peak_memory, trim_heap
from opd.models.sharding import is_sharded, whole
from opd.models.together import all_reduce_means, global_sum, on_main_process, quantile, run_stoppable, stop_all_processes
from opd.objective import group_normalised
from opd.runs.outcome import is_detailed_step
from opd.samplers import Decoding, GenerateSampler, Sampler
from opd.training.account import Scored, describe, engine_gap, scored
from opd.training.batches import Batches
from opd.training.checkpoint import AHEAD, ROUND, Checkpoint, Checkpoints, restore, snapshot
from opd.training.evaluate import Evaluation, Evaluator
from opd.training.logs import Guard
from opd.training.overlap import Overlap
from opd.training.positions import ByPosition, by_position
from opd.training.round import Round, joined, share
from opd.training.schedule import lr_factor
from opd.training.update import NotFinite, Update

log = logging.getLogger(__name__)

NON_FINITE_LIMIT = 3
ALTERNATIVES = 5  # the teacher's most probable tokens that are stored at each token, in detailed steps


@dataclass(frozen=True, slots=True)
class StepDone:
    step: int
    metrics: dict[str, float]
    by_position: ByPosition
    scored: list[Scored]


@dataclass(frozen=True, slots=True)
class Evaluated:
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    step: int


@dataclass(frozen=True, slots=True)
class Rewound:
    """The run goes on after `step`, with the weights of then."""

    step: int
    left_out: list[int]


Event = StepDone | Evaluated | Saved | Rewound


@dataclass(slots=True)
class Trouble:
    """Updates that were not finite. steps: how many steps in a row, and places: their samples' in the data (see `opd.data.order`).

    left_out: places that are not trained on any more. rewound_to: the step of the checkpoint that was last gone back to.
    """

    steps: int = 0
    places: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    rewound_to: int | None = None


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Everything a run needs, built elsewhere (`opd.training.runner`). policy: the student as `Policy`, prepared by Accelerate.

    step: how many steps are done. round: what the next one works on, once it has begun. best: the best evaluation's score so far.
    ahead: the next step's rollouts, sampled in the background.
    overlaps: the teacher, on a device of its own, scores while the student samples.
    grown: bytes by which this process's peak of memory rose in each kind of work so far.
    """

    config: Config
    accelerator: Accelerator
    policy: nn.Module
    student: Any
    optimizer: Optimizer
    sampler: Sampler
    evaluator: Evaluator
    checkpoints: Checkpoints
    prompts: Sequence[Prompt]
    batches: Batches
    update: Update
    max_steps: int
    saved_state: dict[str, Any]
    step: int = 0
    evaluated: int | None = None
    best: float | None = None
    graded_tokens: int = 0
    round: Round | None = None
    trouble: Trouble = field(default_factory=Trouble)
    ahead: Future[list[Rollout]] | None = None
    background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    grown: dict[str, int] = field(default_factory=dict)
    overlaps: bool = False
    overlap: Overlap | None = field(init=False, default=None)
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        if self.overlaps:
            assert isinstance(self.sampler, GenerateSampler)
            self.overlap = Overlap(self.sampler, self.batches.teacher, self.config, self.batches.split, self.accelerator.device)
        self.guard = Guard(self.config.sampling)

    @property
    def prompts_per_step(self) -> int:
        processes: int = self.accelerator.num_processes
        return self.config.train.batch_size * processes

    def run(self) -> Iterator[Event]:
        """Steps until `max_steps`, evaluations every `eval.steps` and before and after, checkpoints every `checkpoint.every` steps.

        Saves and raises `Preempted` when a signal asks it to stop.
        """
        try:
            yield from self.loop()
        except Preempted:
            yield self.save(needed=True)
            raise

    def loop(self) -> Iterator[Event]:
        self.note_memory("loading")
        while True:
            last = self.step >= self.max_steps
            if self.evaluation_due(last):
                yield from self.evaluate()
            if last:
                return
            done = self.train_step()
            yield done
            self.guard.check(done.step, done.metrics)
            if self.trouble.steps == NON_FINITE_LIMIT:
                yield self.rewind()
            elif self.save_due():
                yield self.save()

    def note_memory(self, work: str) -> None:
        """What the peak rose by since the last call is put down to `work`."""
        rise = peak_memory(self.accelerator.device) - sum(self.grown.values())
        self.grown[work] = self.grown.get(work, 0) + rise

    def save_due(self) -> bool:
        """Not amid steps that are not finite: what is saved there is what they are gone back from."""
        return self.step == self.max_steps or (self.step % self.config.checkpoint.every == 0 and self.trouble.steps == 0)

    def settle(self) -> None:
        """Let what is sampled ahead come to its end: nothing else may sample, or change the weights that it samples with."""
        if self.ahead is not None:
            wait([self.ahead])

    def evaluation_due(self, last: bool) -> bool:
        every = self.config.eval.steps
        return self.evaluated != self.step and (self.step == 0 or last or (every > 0 and self.step % every == 0))

    def evaluate(self) -> Iterator[Event]:
        self.settle()
        self.sync_weights()
        with self.sampler_ready():
            evaluation = self.evaluator.student(self.step, self.sampler, self.student, self.batches.teacher, self.both_ready)
        self.note_memory("evaluation")
        self.evaluated = self.step
        score = evaluation.score
        if score is not None and self.step > 0 and (self.best is None or score > self.best):
            self.best = score
            if self.config.checkpoint.keep_best:
                yield self.save(best=score)
        yield Evaluated(evaluation)

    def save(self, best: float | None = None, needed: bool = False) -> Saved:
        """Commit a checkpoint of this moment, between inner steps with their rollouts, and with those that are sampled ahead.

        best, needed: as `Checkpoints.save`.
        """
        written = {ROUND: None if self.round is None else joined(gather_object([self.round.tensors()])), AHEAD: self.sampled_ahead()}
        rollouts = {name: tensors for name, tensors in written.items() if tensors is not None}
        numbers = None if self.round is None else self.numbers(self.round)
        state = {
            **self.saved_state,
            "step": self.step,
            "inner": 0 if self.round is None else self.round.inner,
            "round": numbers,
            "trouble": asdict(self.trouble),
        }
        in_turn = is_sharded(self.policy) and not self.config.checkpoint.background
        place = self.checkpoints.gathered if in_turn else None
        taken = snapshot(self.student, self.optimizer, state, rollouts, self.accelerator.is_main_process, place)
        on_main_process(self.accelerator, lambda: self.checkpoints.save(taken, best, needed))
        return Saved(self.step)

    def sampled_ahead(self) -> dict[str, Tensor] | None:
        """The next step's rollouts of all processes, awaited; None where there are none, or a process has failed to get its own."""
        if self.ahead is None:
            return None
        self.settle()
        own = None if self.ahead.exception() else Round(self.ahead.result(), self.ahead.result()).tensors()
        parts = gather_object([own])
        return None if None in parts else joined(parts)

    def numbers(self, current: Round) -> dict[str, Any]:
        """What a round is but for its tensors, metrics added up over all processes."""
        return replace(current, means=all_reduce_means(self.accelerator, current.means)).numbers()

    def go_on(self, checkpoint: Checkpoint, anew: bool = False) -> None:
        """Be where the run was when the checkpoint was taken. anew: begin the step that it is in the middle of again."""
        self.settle()
        self.ahead = None
        restore(checkpoint, self.student, self.optimizer)
        self.sampler.refresh()
        self.step = checkpoint.step
        self.trouble = Trouble(**checkpoint.state["trouble"])
        self.round = None if anew else self.own_share(checkpoint.round(), checkpoint.state["round"])
        ahead = None if anew else self.own_share(checkpoint.ahead(), Round([], []).numbers())
        if ahead is not None:
            self.ahead = Future()
            self.ahead.set_result(ahead.written)

    def own_share(self, tensors: dict[str, Tensor] | None, numbers: dict[str, Any]) -> Round | None:
        """This process's part of a round that was saved, if one was."""
        if tensors is None:
            return None
        prompts = {prompt.sample_id: prompt for prompt in self.prompts}
        return share(tensors, numbers, prompts, self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device)

    def rewind(self) -> Rewound:
        """Go back to the last checkpoint from before the steps that were not finite, and on without their samples."""
        back_to = on_main_process(self.accelerator, lambda: self.checkpoints.newest(lambda state: state["trouble"]["steps"] == 0))
        if back_to is None or back_to.step == self.trouble.rewound_to:
            where = "there is no checkpoint to go back to" if back_to is None else f"also after going back to step {back_to.step}"
            raise NumericError(
                f"{NON_FINITE_LIMIT} steps in a row were not finite (step {self.step}), {where}: lower optim.lr, set ppo.advantage_clip, "
                "or compute in model.dtype=float32; the last checkpoint is untouched"
            )
        places = self.trouble.places
        self.go_on(back_to)
        self.ahead = None  # may have samples that are left out from here on
        self.trouble.left_out = sorted({*self.trouble.left_out, *places})
        self.trouble.rewound_to = self.step
        self.evaluated = self.step
        return Rewound(self.step, self.trouble.left_out)

    def train_step(self) -> StepDone:
        """Sample, score, and take `ppo.steps` optimizer steps on all of it."""
        rate = self.set_learning_rate()
        current = self.round = self.round or self.begin()
        finite = True
        while finite and current.inner < self.config.ppo.steps:
            stop_all_processes(self.accelerator)
            finite = self.inner_step(current)
        self.round = None
        self.step += 1
        self.trouble.steps = 0 if finite else self.trouble.steps + 1
        self.trouble.places = [] if finite else self.trouble.places
        return self.done(current, rate)

    def begin(self) -> Round:
        """Sample, and let the teacher score."""
        begin = clock(self.accelerator.device)
        if self.ahead is None:
            self.sync_weights()
        with self.sampler_ready():
            written = run_stoppable(self.accelerator, self.sample)
        self.ahead = None
        self.sample_ahead()
        self.note_memory("sampling")
        sampled_at = clock(self.accelerator.device)
        current = Round(written, self.learnt(written), self.task_bonus(written))
        if self.overlap is not None:
            current.teacher_logp_N = run_stoppable(self.accelerator, partial(self.overlap.said, current.learnt))
        self.batches.score(current)
        trim_heap()
        self.note_memory("scoring")
        current.seconds |= {"sample": sampled_at - begin, "score": clock(self.accelerator.device) - sampled_at}
        return current

    def sample(self) -> list[Rollout]:
        """This process's rollouts of the step; with `sampling.lag`, as far as they are begun."""
        return self.sampled(self.step) if self.ahead is None else self.ahead.result()

    def sample_ahead(self) -> None:
        """With `sampling.lag`: let a server go on with the rollouts of the next step, from the weights of now."""
        if self.config.sampling.lag and self.step + 1 < self.max_steps:
            self.sync_weights()
            self.ahead = self.background.submit(self.sampled, self.step + 1)

    def sampled(self, step: int) -> list[Rollout]:
        return (self.overlap or self.sampler).sample(self.requests(step), self.decoding(step), "train")

    def sync_weights(self) -> None:
        """Let an engine with weights of its own have those of now, before any process asks it."""
        self.sampler.sync_weights(partial(on_main_process, self.accelerator))

    def sampler_ready(self) -> AbstractContextManager[None]:
        """Within it, which all processes enter together, the sampler waits for no other process: vLLM has weights of its own."""
        return nullcontext() if self.config.sampling.engine is Engine.vllm else whole(self.policy)

    @contextmanager
    def both_ready(self) -> Iterator[None]:
        """Within it, which all processes enter together, and within `sampler_ready` student and teacher answer."""
        with whole(self.policy) if self.config.sampling.engine is Engine.vllm else nullcontext(), self.batches.teacher_ready():
            yield

    def learnt(self, written: Sequence[Rollout]) -> list[Rollout]:
        """What is scored of each rollout: the first `ppo.loss_prefix` tokens; none where it is dropped.

        Where all are to be dropped the shortest stays, with a weight of 0 (see `token_weights`): other processes count on gradients.
        """
        dropped = {index for index, rollout in enumerate(written) if self.config.sampling.truncated is Truncated.drop and rollout.truncated}
        if len(dropped) == len(written):
            dropped.remove(min(dropped, key=lambda index: len(written[index].completion)))
        return [rollout.first(0 if index in dropped else self.config.ppo.loss_prefix) for index, rollout in enumerate(written)]

    def done(self, current: Round, rate: float) -> StepDone:
        """The finished step: what there is to report of it."""
        means, seconds = current.means, current.seconds
        gap_N = engine_gap(current)
        describe(current, gap_N, self.config.sampling.max_new_tokens)
        summed = all_reduce_means(self.accelerator, means)
        positions = by_position(summed, self.config.sampling.max_new_tokens)
        metrics = summed.means()
        took = sum(seconds.values())
        tokens = global_sum(self.accelerator, sum(len(rollout.completion) for rollout in current.learnt))
        self.graded_tokens += int(tokens)
        metrics |= {f"time/{name}": value for name, value in {**seconds, "step": took}.items()}
        metrics |= {
            f"finish/{reason.value}": global_sum(self.accelerator, sum(rollout.finish_reason is reason for rollout in current.written))
            for reason in FinishReason
        }
        metrics |= {
            "optim/lr": rate,
            "reverse_kl_p99": quantile(self.accelerator, current.seen["reverse_kl"], 0.99),
            "engine_gap_p99": quantile(self.accelerator, gap_N, 0.99),
            "tokens": tokens,
            "tokens_total": float(self.graded_tokens),
            "tokens_per_second": tokens / took,
            "epoch": self.step * self.prompts_per_step / len(self.prompts),
        }
        stored = self.config.track.rollouts_per_step
        weights, top = self.update.token_weights(current.learnt)[0].tolist(), self.alternatives(current.learnt[:stored])
        return StepDone(self.step, metrics, positions, scored(current, stored, weights, top))

    def places(self, step: int) -> list[int]:
        """Where this process's prompts of a step stand in the data."""
        size = self.config.train.batch_size
        start = step * self.prompts_per_step + self.accelerator.process_index * size
        return [nth_position(number, self.trouble.left_out) for number in range(start, start + size)]

    def requests(self, step: int) -> list[Request]:
        """This process's share of a step's prompts, `sampling.n` times each."""
        drawn = [sample for position in self.places(step) for sample in take(self.config.seed, len(self.prompts), position, 1)]
        return [Request(self.prompts[index], epoch, attempt) for epoch, index in drawn for attempt in range(self.config.sampling.n)]

    def decoding(self, step: int) -> Decoding:
        sampling = self.config.sampling
        return Decoding(sampling.temperature, sampling.max_new_tokens, sampling.top_p, sampling.top_k, sampling.batch_size)

    def task_bonus(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        """`ppo.reward_coef` times each rollout's reward, normalised within its prompt's completions, (rollouts,); None where it is off."""
        coefficient = self.config.ppo.reward_coef
        if coefficient == 0:
            return None
        rewards = torch.tensor([reward or 0.0 for reward in self.evaluator.judge(rollouts)])
        groups = torch.arange(len(rollouts)) // self.config.sampling.n
        return coefficient * group_normalised(rewards, groups).to(self.accelerator.device)

    def inner_step(self, current: Round) -> bool:
        """One optimizer step over all micro-batches. Returns whether it was finite and thus taken."""
        begin = clock(self.accelerator.device)
        problem = self.update.take(current)
        if problem is None:
            self.sampler.refresh()
        else:
            self.note_trouble(current, problem)
        self.note_memory("update")
        current.inner += 1
        current.seconds["update"] += clock(self.accelerator.device) - begin
        return problem is None

    def note_trouble(self, current: Round, problem: NotFinite) -> None:
        """Say which samples an update is left out for, and remember them: those with scores that are not finite, else all of the step."""
        own = self.places(self.step)
        named = gather_object([(own[index // self.config.sampling.n], self.sample_id(current, index)) for index in problem.suspects])
        if not named:
            starts = range(0, len(current.written), self.config.sampling.n)
            named = gather_object([(own[index // self.config.sampling.n], self.sample_id(current, index)) for index in starts])
        self.trouble.places = sorted({*self.trouble.places, *(position for position, _ in named)})
        shown = ", ".join(str(sample_id) for sample_id in sorted({sample_id for _, sample_id in named}))
        log.error("step %d: %s: the update is left out (sample ids %s)", self.step + 1, problem.what, shown)

    def sample_id(self, current: Round, index: int) -> int:
        return current.written[index].request.prompt.sample_id

    def alternatives(self, rollouts: Sequence[Rollout]) -> dict[int, tuple[Tensor, Tensor]]:
        """The teacher's `ALTERNATIVES` most probable ids at each token, and their log-probs, by rollout: (tokens, k) each.

        In the main process, in the steps of `looked_into`; else none.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        if not is_detailed_step(self.step, self.max_steps):
            return {}
        with self.batches.teacher_ready():
            for batch in self.batches.split(rollouts) if self.accelerator.is_main_process else ():
                batch = batch.to(self.accelerator.device)
                ids, logp = (
                    values.cpu() for values in self.batches.teacher.states(batch).top(ALTERNATIVES, self.config.sampling.temperature)
                )
                sequence_N = batch.sequence_N.cpu()
                for index in set(sequence_N.tolist()):
                    found[index] = (ids[sequence_N == index], logp[sequence_N == index])
        return found

    def set_learning_rate(self) -> float:
        rate = self.config.optim.lr * lr_factor(self.config.optim, self.step, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told: it answers before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
