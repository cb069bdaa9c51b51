"""One step of on-policy distillation: score the student's tokens with the teacher, then update the student.

For every trained token, with log-probs in nats at `ppo.temperature`, which is the sampling temperature by default:

    advantage    A = teacher_logp - old_logp, clipped to +-advantage_clip                     (no gradient)
    ratio        r = exp(logp - old_logp)
    surrogate    s = -min(r A, clip(r, 1 - clip_eps, 1 + clip_eps) A)                         (PPO, arXiv 1707.06347)
    importance   w = min(exp(old_logp - behaviour_logp), importance_cap)                      (no gradient)
    loss         sum of w s over all tokens of all processes / their number

`behaviour_logp` is of the distribution that the token was drawn from, `old_logp` the trainer's before the update, `logp` its current one.
The estimators `exact` and `topk` replace w s by a divergence between whole next-token distributions. With `teacher.alignment=spans` all
tokens of a span (opd/data/spans.py) have the advantage A = sum of teacher_logp - sum of old_logp over the span, and others have A = 0.

Shapes: `N` rows of the token table, `R` rollouts.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd.config.schema import Config, Estimator, OptimConfig, Reduction, Schedule, Truncated
from opd.data.rollouts import Rollout
from opd.data.spans import Aligner
from opd.errors import EngineError, InsufficientMemory, OpdError, Preempted
from opd.models.device import release_memory
from opd.models.distributed import Strategy, any_process, global_sum, share_failure
from opd.models.policy import padding_limit
from opd.objective import Clips, Sampled, chunked_loss, discounted, exact, sampled, topk
from opd.objective.divergences import named_divergence
from opd.objective.head import Head, TokenLoss, TokenStats
from opd.teachers import Teacher
from opd.training.tokens import Slice, Tokens

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Why an update was skipped. `suspects`: this process's rollouts, by index, with scores that are not finite."""

    reason: str
    suspects: list[int]


@dataclass(slots=True, kw_only=True)
class Step:
    """Scoring and updating of one step's token table.

    Args:
        config: The run's.
        strategy: Student, optimizer, and how processes share them.
        teacher: Scores tokens.
        pad_id: Id of padding.
        packed: Whether sequences are packed into one row.
        choices: Decisions of the run that checkpoints keep, with `max_tokens` of a micro-batch, halved when memory runs out.
        aligner: For a teacher with another tokenizer.
    """

    config: Config
    strategy: Strategy
    teacher: Teacher
    pad_id: int
    packed: bool
    choices: dict[str, Any]
    aligner: Aligner | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.strategy.accelerator.device
        return device

    # Score.

    def align(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts with their alignments, where the teacher has another tokenizer."""
        if self.aligner is None:
            return rollouts
        aligned = []
        for rollout in rollouts:
            prompt = len(rollout.request.prompt.seen_by_teacher)
            alignment = self.aligner.align(rollout.completion, rollout.truncated, prompt, rollout.mask)
            aligned.append(replace(rollout, alignment=alignment))
        return aligned

    def score(self, tokens: Tokens) -> None:
        """Cut micro-batches and let the teacher score them. Collective."""
        with self.teacher.ready():
            self.fit_memory(tokens, lambda: self.score_slices(tokens))

    def score_slices(self, tokens: Tokens) -> None:
        """Fill the column `teacher_logp`, or keep the teacher's hidden states per micro-batch, as the objective needs. No collectives."""
        ppo, temperature = self.config.ppo, self.config.temperature
        tokens.split(self.choices["max_tokens"], self.pad_id, self.packed, padding_limit(self.device))
        is_sampled = ppo.estimator is Estimator.sampled
        needs_scores = is_sampled and "teacher_logp" not in tokens.columns  # scores of an earlier try stay
        scores = []
        for part in tokens.slices:
            inputs, ids_N = part.batch.teacher_inputs, part.batch.ids_N
            if not is_sampled or ppo.baseline:
                part.teacher = self.teacher.states(inputs)
                if needs_scores:
                    scores.append(part.teacher.token_logp(ids_N, temperature))
            elif needs_scores:
                scores.append(self.span_logp(part) if part.batch.spans else self.teacher.logp(inputs, ids_N, temperature))
        if scores:
            tokens.fill("teacher_logp", scores)

    def span_logp(self, part: Slice) -> Tensor:
        """Return the teacher's log-prob of each span, in nats, at the span's last token, 0 elsewhere; (N,)."""
        batch, spans = part.batch, part.batch.spans
        assert spans is not None
        sum_N = torch.zeros(len(batch.ids_N), dtype=torch.float64, device=self.device)
        if len(spans.ids_M):
            logp_M = self.teacher.logp(batch.teacher_inputs, spans.ids_M, self.config.temperature)
            sum_N.index_add_(0, spans.row_M, logp_M.double())
        return sum_N.float()

    def fit_memory(self, tokens: Tokens, work: Callable[[], T], retry: Callable[[], None] = lambda: None) -> T:
        """Return the result of `work`; while any process runs out of memory, all halve their micro-batches and try again.

        Micro-batch boundaries do not affect gradients. Raises in all processes what a served teacher raises in one.

        Args:
            work: Works on the table's micro-batches without collectives.
            retry: Called before another try; may use collectives.
        """
        while True:
            results: list[T] = []
            complaint = ""
            failure: OpdError | None = None
            try:
                results.append(work())
            except torch.OutOfMemoryError as error:
                complaint = str(error).splitlines()[0]
            except (EngineError, Preempted) as error:  # a served teacher's, perhaps in this process only
                failure = error
            if not any_process(self.strategy.accelerator, not results):
                return results[0]
            share_failure(self.strategy.accelerator, failure)
            tokens.slices = []
            retry()
            release_memory(self.device)
            longest = max(rollout.length for rollout in tokens.rollouts)
            if not any_process(self.strategy.accelerator, self.choices["max_tokens"] > longest):
                raise torch.OutOfMemoryError(complaint or "another process of the run ran out of memory")
            self.choices["max_tokens"] //= 2
            reason = complaint and f" ({complaint})"
            log.warning("out of memory%s: micro-batches of %d tokens from here on", reason, self.choices["max_tokens"])

    # Update.

    def update(self, tokens: Tokens) -> NotFinite | None:
        """Take one optimizer step over the table. Collective.

        Returns:
            None, or why no step was taken; weights and optimizer are then unchanged.
        """
        weight_R, own = self.token_weights(tokens.rollouts)
        total = global_sum(self.strategy.accelerator, own)
        compute = self.sharded_gradients if self.strategy.is_sharded else self.local_gradients
        loss_sum, stats = compute(tokens, weight_R[tokens.rollout_N], total or 1.0)
        tokens.means.add("loss", loss_sum, own)
        for name in ("ratio", "clipped"):
            if stats and name in stats[0]:
                tokens.means.add_tensors(name, [part[name] for part in stats])
        if "logp" not in tokens.columns:
            for name in stats[0] if stats else ():
                tokens.fill(name, [part[name] for part in stats])
        elif "clipped" in tokens.columns:
            tokens.columns["clipped"] = torch.maximum(tokens.columns["clipped"], torch.cat([part["clipped"] for part in stats]))
        return self.apply(tokens, loss_sum, is_empty=total == 0)

    def token_weights(self, rollouts: list[Rollout]) -> tuple[Tensor, float]:
        """Return the loss weight of each rollout's tokens (R,), 0 for truncated ones that are left out, and the sum over all tokens."""
        left_out = [self.config.sampling.truncated is not Truncated.keep and rollout.truncated for rollout in rollouts]
        length_R = torch.tensor([len(rollout.trained) for rollout in rollouts], dtype=torch.float32, device=self.device)
        per_sequence = self.config.ppo.reduction is Reduction.sequence
        weight_R = 1.0 / length_R.clamp_min(1.0) if per_sequence else torch.ones_like(length_R)
        weight_R[torch.tensor(left_out, device=weight_R.device)] = 0.0
        return weight_R, float(weight_R.count_nonzero()) if per_sequence else float((weight_R * length_R).sum())

    def local_gradients(self, tokens: Tokens, weight_N: Tensor, total: float) -> tuple[float, list[TokenStats]]:
        """Compute gradients with all weights in each process; where one runs out of memory, all try again with smaller micro-batches."""

        def work() -> tuple[float, list[TokenStats]]:
            if not tokens.slices:
                self.score_slices(tokens)
            return self.gradients(tokens, weight_N, total)

        with self.teacher.ready():
            return self.fit_memory(tokens, work, self.strategy.optimizer.zero_grad)

    def sharded_gradients(self, tokens: Tokens, weight_N: Tensor, total: float) -> tuple[float, list[TokenStats]]:
        """Compute gradients layer by layer, in as many passes as the process with the most micro-batches makes."""
        if not tokens.slices:
            self.score(tokens)
        passes = self.strategy.passes(len(tokens.slices))
        try:
            result = self.gradients(tokens, weight_N, total)
            for _ in range(len(tokens.slices), passes):
                self.strategy.empty_pass()
        except torch.OutOfMemoryError as error:
            raise InsufficientMemory(
                f"{self.device} has too little memory for the update ({str(error).splitlines()[0]}) while all processes compute a layer "
                f"together: lower train.max_tokens_per_micro_batch (now {self.choices['max_tokens']}); the same command then resumes from "
                "the last checkpoint"
            ) from error
        return result

    def gradients(self, tokens: Tokens, weight_N: Tensor, total: float) -> tuple[float, list[TokenStats]]:
        """Add the gradient of every micro-batch; return this process's loss sum, and the statistics of its tokens by micro-batch."""
        loss_sum, stats = torch.zeros((), dtype=torch.float64, device=self.device), []
        for part in tokens.slices:
            token_loss = self.token_loss(tokens, part)

            ends = part.batch.spans.ends if part.batch.spans else None

            def head_loss(
                hidden_NH: Tensor,
                head: Head,
                token_loss: TokenLoss = token_loss,
                rows: slice = part.rows,
                ends: Sequence[int] | None = ends,
            ) -> Any:
                return chunked_loss(hidden_NH, head, token_loss, weight_N=weight_N[rows], ends=ends)

            loss, part_stats = self.strategy.policy(part.batch.inputs, head_loss)
            (loss / total).backward()
            loss_sum += loss.detach()  # read once at the end: until then the device is never waited for
            stats.append(part_stats)
        return float(loss_sum), stats

    def token_loss(self, tokens: Tokens, part: Slice) -> TokenLoss:
        """Return the configured objective of a micro-batch's tokens."""
        ppo, temperature, rows, ids_N = self.config.ppo, self.config.temperature, part.rows, part.batch.ids_N
        if ppo.estimator is not Estimator.sampled:
            assert part.teacher is not None
            divergence = named_divergence(ppo.divergence.value, ppo.beta)
            if ppo.estimator is Estimator.topk:
                return topk(ids_N, part.teacher, temperature, divergence, ppo.k)
            return exact(ids_N, part.teacher, temperature, divergence)
        teacher_logp_N, behaviour_logp_N = tokens.columns["teacher_logp"][rows], tokens.columns["behaviour_logp"][rows]
        advantage_N = None
        if ppo.discount > 0:
            # Sums over later tokens are needed before the first pass: the sampler's log-probs stand in for old_logp, which they equal.
            advantage_N = discounted(teacher_logp_N - behaviour_logp_N, tokens.rollout_N[rows], ppo.discount)
        facts = Sampled(
            target_N=ids_N,
            teacher_logp_N=teacher_logp_N,
            behaviour_logp_N=behaviour_logp_N,
            old_logp_N=tokens.columns["logp"][rows] if tokens.inner else None,  # at the first inner step this pass computes it
            advantage_N=advantage_N,
            span_N=tokens.columns["span"][rows] if part.batch.spans else None,
            bonus_N=None if tokens.bonus_R is None else tokens.bonus_R[tokens.rollout_N[rows]],
            baseline=part.teacher,
        )
        return sampled(facts, temperature, Clips(ppo.clip_eps, ppo.clip_eps, ppo.advantage_clip, ppo.importance_cap), overwrite=True)

    def apply(self, tokens: Tokens, loss_sum: float, is_empty: bool) -> NotFinite | None:
        """Sum gradients over processes, clip and step; skip the step where anything is not finite in any process, or nothing is trained."""
        suspects = self.not_finite(tokens)
        accelerator, optimizer = self.strategy.accelerator, self.strategy.optimizer
        is_sound = not any_process(accelerator, not math.isfinite(loss_sum) or bool(suspects))
        norm = self.strategy.clip_gradients(self.config.optim.max_grad_norm)
        if any_process(accelerator, not math.isfinite(norm)):
            norm = math.nan
        is_taken = is_sound and not is_empty and math.isfinite(norm)
        if is_taken:
            self.strategy.step()
            tokens.means.add("optim/grad_norm", norm, 1.0)
        optimizer.zero_grad()
        tokens.means.add("optim/skipped", 0.0 if is_taken else 1.0, 1.0)
        return None if is_taken or (is_sound and is_empty) else NotFinite(f"loss {loss_sum}, gradient norm {norm}", suspects)

    def not_finite(self, tokens: Tokens) -> list[int]:
        """Return this process's rollouts with a score, of teacher or student, that is not finite."""
        bad_N = torch.stack([~tokens.columns[name].isfinite() for name in ("logp", "teacher_logp")]).any(0)
        return sorted(set(tokens.rollout_N[bad_N].tolist()))


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """Return the factor on `optim.lr` at a step (0-based) of `total`: linear warm-up, then the schedule, which ends at 0."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    match config.schedule:
        case Schedule.linear:
            return 1.0 - progress
        case Schedule.cosine:
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case Schedule.constant:
            return 1.0
