"""What a step works on: its rollouts, what is known of their tokens, and how many of its inner steps are done.

Kept between inner steps, so that a run can stop there and go on with the same numbers. Tokens stand in the order of the rollouts and not
in that of micro-batches, which may be cut another way.

Shapes: `N` tokens that are learnt from, of all rollouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, MicroBatch, Request, Rollout
from opd.objective.head import TokenStats
from opd.objective.means import Means
from opd.training.learning import Scores

FINISH = tuple(FinishReason)
SEEN = "seen."  # before the names of the first pass's statistics


@dataclass(slots=True)
class Round:
    """written: the rollouts as sampled. learnt: the part of each that is learnt from.

    bonus: for each rollout, or None. teacher_logp_N: None before the teacher has scored, or where the objective takes whole
    distributions. seen: statistics (N,) of the first pass, which are those before any update; empty before it. means: the metrics so far.
    inner: inner steps done. seconds: spent so far. parts: the micro-batches with what the teacher said of them, made anew on going on.
    """

    written: list[Rollout]
    learnt: list[Rollout]
    bonus: Tensor | None = None
    teacher_logp_N: Tensor | None = None
    seen: TokenStats = field(default_factory=dict)
    means: Means = field(default_factory=Means)
    inner: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("sample", "score", "update"), 0.0))
    parts: list[tuple[MicroBatch, Scores]] = field(default_factory=list)

    def places(self, batch: MicroBatch) -> Tensor:
        """Where the tokens of a micro-batch stand among the N, (tokens of the micro-batch,)."""
        lengths = torch.tensor([len(rollout.completion) for rollout in self.learnt], device=batch.sequence_N.device)
        start_N = (lengths.cumsum(0) - lengths)[batch.sequence_N]
        index = torch.arange(len(batch.sequence_N), device=start_N.device)
        first_N = torch.cat((index.new_ones(1, dtype=torch.bool), batch.sequence_N[1:] != batch.sequence_N[:-1]))
        begin_N = torch.where(first_N, index, 0).cummax(0).values  # tokens of a sequence stand side by side
        return start_N + index - begin_N

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of the tokens of each micro-batch, as one (N,) in the order of the rollouts."""
        place_N = torch.cat([self.places(batch) for batch, _ in self.parts])
        values_N = torch.cat(list(parts))
        return torch.empty_like(values_N).index_copy_(0, place_N, values_N)

    def sequence_N(self) -> Tensor:
        """The rollout of each token."""
        return torch.tensor([index for index, rollout in enumerate(self.learnt) for _ in rollout.completion], dtype=torch.long)

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is not a number of its own, in tensors that are put end to end over processes."""
        requests = [rollout.request for rollout in self.written]
        found = {
            "sample_id": torch.tensor([request.prompt.sample_id for request in requests]),
            "epoch": torch.tensor([request.epoch for request in requests]),
            "attempt": torch.tensor([request.attempt for request in requests]),
            "finish": torch.tensor([FINISH.index(rollout.finish_reason) for rollout in self.written]),
            "written": torch.tensor([len(rollout.completion) for rollout in self.written]),
            "learnt": torch.tensor([len(rollout.completion) for rollout in self.learnt]),
            "ids": torch.tensor([token for rollout in self.written for token in rollout.completion]),
            "behaviour_logp": torch.cat([rollout.behaviour_logp for rollout in self.written]),
        }
        optional = {"bonus": self.bonus, "teacher_logp": self.teacher_logp_N, **{SEEN + name: self.seen[name] for name in self.seen}}
        return found | {name: values.detach().cpu() for name, values in optional.items() if values is not None}

    def numbers(self) -> dict[str, Any]:
        """What `tensors` leaves out, as JSON."""
        return {"inner": self.inner, "sums": self.means.sums, "counts": self.means.counts, "seconds": self.seconds}


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all processes end to end."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def share(
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    prompts: Mapping[int, Prompt],
    rank: int,
    processes: int,
    device: torch.device,
) -> Round:
    """One process's part of a saved round, however many processes there were then. prompts: by sample id."""
    total = len(tensors["written"])
    assert total % processes == 0
    mine = slice(rank * total // processes, (rank + 1) * total // processes)
    written_ends, learnt_ends = tensors["written"].cumsum(0).tolist(), tensors["learnt"].cumsum(0).tolist()

    def tokens(ends: list[int]) -> slice:
        return slice(ends[mine.start - 1] if mine.start else 0, ends[mine.stop - 1])

    lengths = tensors["written"][mine].tolist()
    ids, logp = (tensors[name][tokens(written_ends)].split(lengths) for name in ("ids", "behaviour_logp"))
    who = zip(*(tensors[name][mine].tolist() for name in ("sample_id", "epoch", "attempt", "finish", "learnt")), strict=True)
    written, learnt = [], []
    for (sample_id, epoch, attempt, finish, length), own_ids, own_logp in zip(who, ids, logp, strict=True):
        rollout = Rollout(Request(prompts[sample_id], epoch, attempt), tuple(own_ids.tolist()), own_logp.clone(), FINISH[finish])
        written.append(rollout)
        learnt.append(rollout.first(length))
    per_token = {name: tensors[name][tokens(learnt_ends)].to(device) for name in tensors if name == "teacher_logp" or name.startswith(SEEN)}
    return Round(
        written,
        learnt,
        bonus=tensors["bonus"][mine].to(device) if "bonus" in tensors else None,
        teacher_logp_N=per_token.pop("teacher_logp", None),
        seen={name.removeprefix(SEEN): values for name, values in per_token.items()},
        # Sums over processes are to count them once.
        means=Means(*({name: value if rank == 0 else 0.0 for name, value in numbers[kind].items()} for kind in ("sums", "counts"))),
        inner=numbers["inner"],
        seconds=dict(numbers["seconds"]),
    )
