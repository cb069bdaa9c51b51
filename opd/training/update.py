"""An inner step: gradients of all micro-batches, scaled by one global token count, added up over processes, clipped and applied.

All processes leave out an update together where anything of it is not finite in any of them.

Shapes: `N` kept completion tokens of a micro-batch.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from opd.config.schema import Config, Reduction, Truncated
from opd.data.rollouts import Rollout
from opd.errors import InsufficientMemory
from opd.models.fsdp2 import add_up, start_again
from opd.models.sharding import ZeroOptimizer, backward, full, idle, is_sharded, strategy, whole
from opd.models.together import all_reduce_gradients, any_process, global_sum, most
from opd.objective import chunked_loss
from opd.objective.head import Head, TokenLoss, TokenStats
from opd.training.batches import Batches
from opd.training.learning import token_loss
from opd.training.round import Round


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Why an update was left out. suspects: this process's rollouts, by place, with scores that are no finite numbers."""

    what: str
    suspects: list[int]


@dataclass(slots=True, kw_only=True)
class Update:
    """policy: the student as `Policy`, and its optimizer, both prepared by Accelerate.

    layerwise: all processes compute gradients together, gathering and sharing out amid their passes (see `opd.models.sharding`).
    """

    config: Config
    accelerator: Accelerator
    policy: nn.Module
    optimizer: Optimizer
    batches: Batches
    layerwise: bool = False

    def take(self, current: Round) -> NotFinite | None:
        """One optimizer step over all micro-batches; or, with the reason, none: weights and optimizer are as they were."""
        weights, own = self.token_weights(current.learnt)
        total = global_sum(self.accelerator, own)
        compute = self.layer_by_layer if self.layerwise else self.by_itself
        loss_sum, seen = compute(current, weights, total or 1.0)
        current.means.add("loss", loss_sum, own)
        for stats in seen:
            current.means.add_tensors({name: stats[name] for name in ("ratio", "clipped") if name in stats})
        if not current.seen:
            current.seen = {name: current.in_order([stats[name] for stats in seen]) for name in seen[0]}
        elif "clipped" in current.seen:
            now_N = current.in_order([stats["clipped"] for stats in seen])
            current.seen["clipped"] = torch.maximum(current.seen["clipped"], now_N)
        return self.apply(loss_sum, current, empty=total == 0)

    def by_itself(self, current: Round, weights: Tensor, total: float) -> tuple[float, list[TokenStats]]:
        """As `gradients`, with all weights in each process: where one lacks memory, all make do with less."""
        with ExitStack() as held:
            held.enter_context(whole(self.policy))
            if not current.parts:
                held.enter_context(self.batches.teacher_ready())

            def again() -> None:
                self.optimizer.zero_grad()
                start_again(self.policy)
                held.enter_context(self.batches.teacher_ready())

            def work() -> tuple[float, list[TokenStats]]:
                with self.accelerator.no_sync(self.policy):  # sharded gradients are added up once every process has its own
                    return self.gradients(current, weights, total)

            found = self.batches.fitting(current, work, again)
            add_up(self.policy)
        return found

    def layer_by_layer(self, current: Round, weights: Tensor, total: float) -> tuple[float, list[TokenStats]]:
        """As `gradients`, which all processes compute together, in equally many passes.

        Raises `MemoryShort` in a process that lacks memory: the others wait for it in the middle of a pass, until it has ended.
        """
        if not current.parts:
            self.batches.score(current)
        passes = most(self.accelerator, len(current.parts))
        try:
            found = self.gradients(current, weights, total, passes)
            for number in range(len(current.parts), passes):
                idle(self.policy, last=number == passes - 1)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemory(
                f"{self.accelerator.device} has too little memory for the update ({str(error).splitlines()[0]}), amid layers that all "
                f"processes compute together: lower train.max_tokens_per_micro_batch (now {self.batches.max_tokens}){self.way_out()}; the "
                "same command then goes on from the last checkpoint"
            ) from error
        return found

    def way_out(self) -> str:
        return ", or set fsdp_reshard_after_forward: false in the Accelerate config" if strategy(self.policy) == "FSDP2" else ""

    def gradients(self, current: Round, weights: Tensor, total: float, passes: int = 0) -> tuple[float, list[TokenStats]]:
        """This process's gradients, its loss, and its tokens' statistics by micro-batch.

        weights: those of `token_weights`; total: what their sums add up to over processes. passes: those that all processes make together.
        """
        if not current.parts:
            current.parts = self.batches.scored(current)
        seen: list[TokenStats] = []
        loss_sum = 0.0
        for number, (batch, scores) in enumerate(current.parts, start=1):
            # At the first inner step it is what is being computed.
            old_N = current.seen["logp"][current.places(batch)] if current.inner else None
            objective = token_loss(self.config, batch, scores, old_N)
            weight_N = weights[batch.sequence_N]

            def head_loss(hidden_NH: Tensor, head: Head, objective: TokenLoss = objective, weight_N: Tensor = weight_N) -> Any:
                return chunked_loss(hidden_NH, head, objective, weight_N=weight_N)

            loss, stats = self.policy(batch.inputs, head_loss)
            backward(self.policy, loss / total, last=number == passes)
            loss_sum += float(loss.detach())
            seen.append(stats)
        return loss_sum, seen

    def token_weights(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, float]:
        """Each rollout's weight for each of its tokens (rollouts,), 0 for what is not learnt from; and the sum over all its tokens."""
        left_out = [self.config.sampling.truncated is not Truncated.keep and rollout.truncated for rollout in rollouts]
        lengths = torch.tensor([len(rollout.completion) for rollout in rollouts], dtype=torch.float32, device=self.accelerator.device)
        by_sequence = self.config.ppo.reduction is Reduction.sequence
        weights = 1.0 / lengths.clamp_min(1.0) if by_sequence else torch.ones_like(lengths)
        weights[torch.tensor(left_out, device=weights.device)] = 0.0
        return weights, float(weights.count_nonzero()) if by_sequence else float((weights * lengths).sum())

    def apply(self, loss_sum: float, current: Round, empty: bool) -> NotFinite | None:
        """Add up gradients, clip and step; or, if anything is not finite in any process, leave weights and optimizer as they are.

        empty: there was nothing to learn from, in any process, and nothing is done either.
        """
        suspects = self.not_finite(current)
        sound = not any_process(self.accelerator, not math.isfinite(loss_sum) or bool(suspects))
        norm = self.step(sound and not empty)
        finite = sound and (empty or math.isfinite(norm))
        if finite and not empty:
            current.means.add("optim/grad_norm", norm, 1.0)
        current.means.add("optim/skipped", 0.0 if finite and not empty else 1.0, 1.0)
        return None if finite else NotFinite(f"loss {loss_sum}, gradient norm {norm}", suspects)

    def step(self, wanted: bool) -> float:
        """Add up gradients, clip them, and step if that is wanted and they are finite in all processes. They are gone in either case.

        Returns their norm before they were clipped: no finite number, in all processes, where one of them has others.
        """
        if isinstance(self.optimizer, ZeroOptimizer):
            if not wanted:
                self.optimizer.spoil()
            self.optimizer.step()
            return self.optimizer.norm
        if self.accelerator.num_processes > 1 and not is_sharded(self.policy):
            all_reduce_gradients([parameter for parameter in self.policy.parameters() if parameter.requires_grad])
        norm = float(full(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.optim.max_grad_norm)))
        if any_process(self.accelerator, not math.isfinite(norm)):
            norm = math.nan
        elif wanted:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def not_finite(self, current: Round) -> list[int]:
        """This process's rollouts with a score, of the teacher or the student, that is no finite number."""
        values = [current.seen[name] for name in ("logp", "teacher_logp")]
        values += [] if current.teacher_logp_N is None else [current.teacher_logp_N]
        bad_N = torch.stack([~value.isfinite() for value in values]).any(0).cpu()
        return sorted(set(current.sequence_N()[bad_N].tolist()))
