"""One step of on-policy distillation: score the student's tokens with the teacher, then update the student.

For every trained token, with log-probs in nats at `ppo.temperature`, which is the sampling temperature by default:

    advantage    A = teacher_logp - old_logp, clipped to +-advantage_clip                     (no gradient)
    ratio        r = exp(logp - old_logp)
    surrogate    s = -min(r A, clip(r, 1 - clip_eps, 1 + clip_eps) A)                         (PPO, arXiv 1707.06347)
    importance   w = min(exp(old_logp - behaviour_logp), importance_cap)                      (no gradient)
    loss         sum of w s over all tokens of all processes / their number                   (datasets may have a `loss_weight`)

`control` replaces the advantage by one without the teacher (`opd.training.control`).

`behaviour_logp` is of the distribution that the token was drawn from, `old_logp` the trainer's before the update, `logp` its current one.
The estimators `exact` and `topk` replace w s by a divergence between whole next-token distributions. With `teacher.alignment=spans` all
tokens of a span (opd/data/spans.py) have the advantage A = sum of teacher_logp - sum of old_logp over the span, and tokens that are not
scored the mean of A over the others.

With `teacher.contrast` the same teacher scores the tokens in a second view too, and the student's term leaves the advantage:

    advantage    A = teacher_logp - contrast_logp, clipped to +-advantage_clip                (arXiv 2606.11709, 2607.02234)

It is the difference of the advantages in the two views, so that what both have in common cancels, such as the style of a teacher that
reads a hint, right or wrong. In expectation the gradient is that of KL(student‖q) with q proportional to old * teacher / contrast. As q
moves with the student, training does not end at a distribution: where the views differ the student grows ever more certain.

`ppo.reference_coef` adds that times KL(student‖the student's start): over whole distributions, or for `sampled` as
reference_coef (reference_logp - old_logp) in the advantage, after its clip.

Tokens of given completions (`train.given_share`) have the loss -logp instead of w s. With `exact` and `topk` they have the divergence of
all others (GKD, arXiv 2306.13649), but the forward KL in place of the reverse KL: it is the expectation of -logp over the teacher's texts,
and has a gradient where the student gives the teacher's token no probability.

Shapes: `N` rows of the token table, `R` rollouts.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd.config.options import Control, Divergence, Estimator, OptimConfig, Reduction, Schedule, Truncated
from opd.config.schema import Config
from opd.data.rollouts import MicroBatch, Rollout
from opd.errors import EngineError, InsufficientMemory, OpdError, Preempted
from opd.models.device import release_memory
from opd.models.distributed import Strategy, any_process, global_sum, share_failure
from opd.models.overlap import Overlap
from opd.models.policy import padding_limit
from opd.objective import Clips, Sampled, ScoredSpans, TeacherStates, anchored, chunked_loss, discounted, exact, masked_stats, sampled, topk
from opd.objective.divergences import named_divergence
from opd.objective.head import Head, TokenLoss, TokenStats
from opd.objective.overlap import OVERLAP, OVERLAP_K
from opd.teachers import LocalTeacher, Teacher
from opd.training.control import SHUFFLED, constant_advantage
from opd.training.spans import Spans, mean_advantage
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
        overlap: What the vocabularies share, where each has tokens of its own.
        spans: For a teacher with another tokenizer.
        reference: The student's start, where `ppo.reference_coef` asks for it; the same object as a teacher that has its weights.
        loss_weights: Factor on the loss of a dataset's tokens, by label; 1 for others.
    """

    config: Config
    strategy: Strategy
    teacher: Teacher
    pad_id: int
    packed: bool
    choices: dict[str, Any]
    overlap: Overlap | None = None
    spans: Spans | None = None
    reference: LocalTeacher | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.strategy.accelerator.device
        return device

    # Score.

    def align(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return the rollouts with their alignments, where the teacher has another tokenizer."""
        return [*(rollouts if self.spans is None else map(self.spans.align, rollouts))]

    def score(self, tokens: Tokens) -> None:
        """Cut micro-batches and let the teacher score them. Collective."""
        with self.scorers_ready():
            self.fit_memory(tokens, lambda: self.score_slices(tokens))

    @contextmanager
    def scorers_ready(self) -> Iterator[None]:
        """Make teacher and reference answer without collectives for the block. All processes enter."""
        other = None if self.reference is self.teacher else self.reference
        with self.teacher.ready(), nullcontext() if other is None else other.ready():
            yield

    def score_slices(self, tokens: Tokens) -> None:
        """Fill the columns of log-probs, or keep hidden states per micro-batch, as the objective needs.

        No collectives.
        """
        ppo = self.config.ppo
        tokens.split(self.choices["max_tokens"], self.pad_id, self.packed, padding_limit(self.device))
        is_sampled = ppo.estimator is Estimator.sampled
        needs_scores = is_sampled and "teacher_logp" not in tokens.columns  # scores of an earlier try stay
        needs_reference = self.reference is not None and "reference_logp" not in tokens.columns
        scores, reference = [], []
        for part in tokens.slices:
            if self.reference is not None and not is_sampled:
                part.reference = self.reference.states(part.batch.inputs)
            elif self.reference is not None and needs_reference:
                reference.append(self.reference.logp(part.batch.inputs, part.batch.ids_N, self.config.temperature))
            if not is_sampled or ppo.baseline or (tokens.is_detailed and tokens.inner == 0):
                inputs = part.batch.teacher_inputs
                part.teacher = self.teacher.top(inputs) if ppo.estimator is Estimator.topk else self.teacher.states(inputs)
            if needs_scores:
                scores.append(self.teacher_scores(part))
        for name in scores[0] if scores else ():
            tokens.fill(name, [score[name] for score in scores])
        if reference:
            tokens.fill("reference_logp", reference)
        if self.config.teacher.contrast is not None and "contrast_logp" not in tokens.columns:
            tokens.fill("contrast_logp", [self.contrast_logp(part.batch) for part in tokens.slices])

    def contrast_logp(self, batch: MicroBatch) -> Tensor:
        assert batch.contrast_inputs is not None
        return self.teacher.logp(batch.contrast_inputs, batch.ids_N, self.config.temperature)

    def teacher_scores(self, part: Slice) -> TokenStats:
        """Return the teacher's columns of a micro-batch."""
        inputs, ids_N, temperature = part.batch.teacher_inputs, part.batch.ids_N, self.config.temperature
        if isinstance(part.teacher, TeacherStates):
            return part.teacher.columns(ids_N, temperature)
        if self.spans is not None:
            return self.spans.columns(self.teacher, part.batch, temperature)
        if self.overlap is None:
            return {"teacher_logp": self.teacher.logp(inputs, ids_N, temperature)}
        return self.teacher.columns(inputs, ids_N, temperature)

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
        if self.spans is not None:
            tokens.unscored = mean_advantage(tokens, self.config.ppo.advantage_clip, self.strategy.accelerator)
        weight_R, own = self.token_weights(tokens.rollouts)
        total = global_sum(self.strategy.accelerator, own)
        compute = self.sharded_gradients if self.strategy.is_sharded else self.local_gradients
        loss_sum, stats = compute(tokens, weight_R[tokens.rollout_N], total or 1.0)
        tokens.means.add("loss", loss_sum, own)
        for name in ("ratio", "clipped"):
            if stats and name in stats[0]:
                values = [part[name] for part in stats]
                tokens.means.add_tensors(name, values if tokens.given_N is None else [torch.cat(values)[~tokens.given_N]])
        if "logp" not in tokens.columns:
            # Of several teachers a server may send too few ids for the overlap: all micro-batches and processes have the same columns.
            left_out = OVERLAP if self.config.is_served and self.config.ppo.k < OVERLAP_K else ()
            for name in [name for name in stats[0] if name not in left_out] if stats else ():
                tokens.fill(name, [part[name] for part in stats])
        elif "clipped" in tokens.columns:
            tokens.columns["clipped"] = torch.maximum(tokens.columns["clipped"], torch.cat([part["clipped"] for part in stats]))
        return self.apply(tokens, loss_sum, is_empty=total == 0)

    def token_weights(self, rollouts: list[Rollout]) -> tuple[Tensor, float]:
        """Return the loss weight of each rollout's tokens (R,), 0 for truncated ones that are left out, and the sum over all tokens.

        Each has the factor `loss_weight` of its dataset, and the loss is divided by the sum: factors are relative to each other.
        """
        left_out = [self.config.sampling.truncated is not Truncated.keep and rollout.truncated for rollout in rollouts]
        length_R = torch.tensor([len(rollout.trained) for rollout in rollouts], dtype=torch.float32, device=self.device)
        per_sequence = self.config.ppo.reduction is Reduction.sequence
        factors = [self.loss_weights.get(rollout.request.prompt.dataset, 1.0) for rollout in rollouts]
        factor_R = torch.tensor(factors, dtype=torch.float32, device=self.device)
        factor_R[torch.tensor(left_out, device=factor_R.device)] = 0.0
        weight_R = factor_R / length_R.clamp_min(1.0) if per_sequence else factor_R
        return weight_R, float(factor_R.sum()) if per_sequence else float((weight_R * length_R).sum())

    def local_gradients(self, tokens: Tokens, weight_N: Tensor, total: float) -> tuple[float, list[TokenStats]]:
        """Compute gradients with all weights in each process; where one runs out of memory, all try again with smaller micro-batches."""

        def work() -> tuple[float, list[TokenStats]]:
            if not tokens.slices:
                self.score_slices(tokens)
            return self.gradients(tokens, weight_N, total)

        with self.scorers_ready():
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

            def head_loss(hidden_NH: Tensor, head: Head, token_loss: TokenLoss = token_loss, part: Slice = part) -> Any:
                ends = part.batch.spans.ends if part.batch.spans else None
                loss, stats = chunked_loss(hidden_NH, head, token_loss, weight_N=weight_N[part.rows], ends=ends)
                return loss, stats | self.masked_columns(hidden_NH, head, part, stats) if self.overlap and not tokens.inner else stats

            loss, part_stats = self.strategy.policy(part.batch.inputs, head_loss)
            (loss / total).backward()
            loss_sum += loss.detach()  # read once at the end: until then the device is never waited for
            stats.append(part_stats)
        return float(loss_sum), stats

    def masked_columns(self, hidden_NH: Tensor, head: Head, part: Slice, stats: TokenStats) -> TokenStats:
        """Return the masked probability of the student, and of a teacher whose log-probs the loss has computed."""
        ids_N, temperature = part.batch.ids_N, self.config.temperature
        columns = masked_stats("student", hidden_NH, head, ids_N, stats["logp"], temperature)
        states = part.teacher
        if self.config.ppo.estimator is not Estimator.sampled and isinstance(states, TeacherStates):
            columns |= masked_stats("teacher", states.hidden_NH, states.head, ids_N, stats["teacher_logp"], temperature)
        return columns

    def token_loss(self, tokens: Tokens, part: Slice) -> TokenLoss:
        """Return the configured objective of a micro-batch's tokens."""
        ppo, temperature, rows, ids_N = self.config.ppo, self.config.temperature, part.rows, part.batch.ids_N
        given_N = None if tokens.given_N is None else tokens.given_N[rows]
        if ppo.estimator is not Estimator.sampled:
            assert part.teacher is not None
            divergence = named_divergence(ppo.divergence.value, ppo.beta)
            forward_N = given_N if ppo.divergence is Divergence.reverse_kl else None
            facts = ids_N, part.teacher, temperature, divergence
            loss = topk(*facts, ppo.k, forward_N) if ppo.estimator is Estimator.topk else exact(*facts, forward_N)
            return loss if part.reference is None else anchored(loss, part.reference, temperature, ppo.reference_coef, given_N)
        teacher_logp_N, behaviour_logp_N = tokens.columns["teacher_logp"][rows], tokens.columns["behaviour_logp"][rows]
        control, contrast_logp = self.config.control, tokens.columns.get("contrast_logp")
        score_N = tokens.columns[SHUFFLED][rows] if control is Control.shuffled else teacher_logp_N
        advantage_N = None
        if control is Control.constant:
            advantage_N = constant_advantage(behaviour_logp_N)
        elif contrast_logp is not None:
            advantage_N = score_N if control is Control.shuffled else teacher_logp_N - contrast_logp[rows]
        if ppo.discount > 0:
            # Sums over later tokens are needed before the first pass: the sampler's log-probs stand in for old_logp, which they equal.
            own_N = score_N - behaviour_logp_N if advantage_N is None else advantage_N
            advantage_N = discounted(own_N, tokens.rollout_N[rows], ppo.discount)
        inputs = Sampled(
            target_N=ids_N,
            teacher_logp_N=teacher_logp_N,
            behaviour_logp_N=behaviour_logp_N,
            old_logp_N=tokens.columns["logp"][rows] if tokens.inner else None,  # at the first inner step this pass computes it
            advantage_N=advantage_N,
            score_N=score_N,
            spans=self.scored_spans(tokens, part),
            bonus_N=None if tokens.bonus_R is None else tokens.bonus_R[tokens.rollout_N[rows]],
            teacher=part.teacher if isinstance(part.teacher, TeacherStates) and (ppo.baseline or tokens.inner == 0) else None,
            baseline=ppo.baseline,
            reference_logp_N=tokens.columns["reference_logp"][rows] if self.reference is not None else None,
            reference_coef=ppo.reference_coef,
            given_N=given_N,
        )
        return sampled(inputs, temperature, Clips(ppo.clip_eps, ppo.clip_eps, ppo.advantage_clip, ppo.importance_cap), overwrite=True)

    def scored_spans(self, tokens: Tokens, part: Slice) -> ScoredSpans | None:
        """Return the spans of a micro-batch; None for a teacher with the student's tokenizer."""
        if self.spans is None or part.batch.spans is None:
            return None
        span_N, longer, lookahead_N = tokens.columns["span"][part.rows], self.spans.longer, None
        if longer is not None:
            lookahead_N = tokens.columns["lookahead"][part.rows] if tokens.inner else torch.zeros(len(span_N), device=self.device)
        return ScoredSpans(span_N, tokens.unscored, part.batch.spans.previous_N, lookahead_N, None if tokens.inner else longer)

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
        scores = [tokens.columns[name] for name in ("logp", "teacher_logp", "contrast_logp", "reference_logp") if name in tokens.columns]
        bad_N = torch.stack([~score_N.isfinite() for score_N in scores]).any(0)
        return sorted(set(tokens.rollout_N[bad_N].tolist()))


def default_rate(parameters: int, adapters: bool) -> float:
    """Return the learning rate of AdamW that suits a model of this size.

    In inverse proportion to the root of the size, and ten times as high for adapters, as Tinker's cookbook has it (`hyperparam_utils`; LoRA
    Without Regret, 2025): 5e-5 for 135 M parameters, and at most 3e-4. In scripts/bench/README.md the rates that close most of the gap in a
    few steps are 1e-4 for SmolLM2-135M and 3e-4 for the bundled student; longer runs bear less.
    """
    return min(3e-4, 5e-5 * math.sqrt(135e6 / parameters)) * (10 if adapters else 1)


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """Return the factor on `optim.lr` at a step (0-based) of `total`: linear warm-up, then `constant` stays at 1, others fall to 0."""
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
