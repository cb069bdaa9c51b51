"""The token table: everything that is known about the tokens of a step, one row per trained token.

Rows are grouped by teacher and then by rollout, the longest rollout first, so that a micro-batch, which has one teacher, is a contiguous
slice of rows. Sampling fills `behaviour_logp`, the teacher `teacher_logp` and, with `teacher.contrast`, `contrast_logp`; the first pass of
the update fills `logp`, `entropy`, `reverse_kl` and the advantages, which are those before any update. With `teacher.alignment=spans` the
column `span` says how many tokens of its span follow a token, -1 where it is not scored, and `teacher_logp` has a span's at its last token.
A run can stop between inner steps and resume from the table.

Shapes: `N` rows, `R` rollouts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, MicroBatch, Request, Rollout, micro_batches
from opd.objective import TeacherStates, TeacherTop

FINISH = tuple(FinishReason)
COLUMN = "column."  # prefix of columns in a checkpoint


@dataclass(slots=True)
class Means:
    """Metrics as running means, `sums[name] / counts[name]`, so that means over micro-batches and processes are exact."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_tensors(self, name: str, parts: Sequence[Tensor]) -> None:
        """Add every element of each tensor with a count of one, and wait for the device once."""
        total: Any = self.sums.get(name, 0.0)
        for values in parts:
            total = total + values.double().sum()
        self.sums[name] = float(total)
        self.counts[name] = self.counts.get(name, 0.0) + sum(values.numel() for values in parts)

    def over_processes(self, accelerator: Accelerator) -> "Means":
        """Return sums and counts over all processes, which have the same names."""
        if accelerator.num_processes == 1:
            return self
        names = sorted(self.sums)
        pairs = torch.tensor([[self.sums[name], self.counts[name]] for name in names], dtype=torch.float64, device=accelerator.device)
        rows = accelerator.reduce(pairs, "sum").tolist()
        return Means(*({name: row[column] for name, row in zip(names, rows, strict=True)} for column in (0, 1)))

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name]}


@dataclass(slots=True)
class Slice:
    """A micro-batch as a slice of the table.

    Args:
        rows: Its rows.
        batch: What the models read, on the device.
        teacher: The teacher's hidden states or most probable ids, where the objective compares distributions.
        reference: The hidden states of the student's start, likewise.
    """

    rows: slice
    batch: MicroBatch
    teacher: TeacherStates | TeacherTop | None = None
    reference: TeacherStates | None = None


@dataclass(slots=True)
class Tokens:
    """The token table of this process for one step.

    Args:
        rollouts: As sampled, each with the mask of its trained tokens.
        device: Where the columns are.
        columns: (N,) tensors by name.
        bonus_R: Task reward added to the advantages of each rollout's tokens, or None.
        means: Metrics so far.
        inner: Inner steps done.
        unscored: The advantage of tokens that a teacher with another tokenizer does not score.
        is_detailed: Whether to measure the overlap with a local teacher, which takes its whole distributions.
        seconds: Time spent so far, by kind of work.
        slices: The micro-batches; made again after a resume, or when memory ran out.
    """

    rollouts: list[Rollout]
    device: torch.device
    columns: dict[str, Tensor] = field(default_factory=dict)
    bonus_R: Tensor | None = None
    means: Means = field(default_factory=Means)
    inner: int = 0
    unscored: float = 0.0
    is_detailed: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("sample", "wait", "score", "update"), 0.0))
    slices: list[Slice] = field(default_factory=list)
    rollout_N: Tensor = field(init=False)
    sampling_order_N: Tensor = field(init=False)
    given_N: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        lengths = [len(rollout.trained) for rollout in self.rollouts]
        trained = (index for index, length in enumerate(lengths) if length)
        order = sorted(trained, key=lambda index: (self.rollouts[index].request.prompt.teacher, -self.rollouts[index].length))
        # The rollout of each row, and the rows in the order in which their rollouts were sampled.
        rows = torch.tensor([index for index in order for _ in range(lengths[index])], dtype=torch.long)
        self.rollout_N = rows.to(self.device)
        self.sampling_order_N = rows.argsort(stable=True).to(self.device)
        # Which rows are of given completions, or None: a run without them computes as if there were no such thing.
        is_given = torch.tensor([rollout.given for rollout in self.rollouts], dtype=torch.bool)[rows]
        self.given_N = is_given.to(self.device) if any(rollout.given for rollout in self.rollouts) else None
        if "behaviour_logp" not in self.columns:
            logp = [self.rollouts[index].behaviour_logp[self.rollouts[index].trained] for index in order]
            self.columns["behaviour_logp"] = torch.cat(logp).to(self.device) if logp else torch.zeros(0, device=self.device)
        following = {index: each.alignment.following for index, each in enumerate(self.rollouts) if each.alignment is not None}
        if following:
            of_rows = [following[index][offset] for index in order for offset in self.rollouts[index].trained]
            self.columns["span"] = torch.tensor(of_rows, dtype=torch.long).to(self.device)

    def split(self, max_tokens: int, pad_id: int, packed: bool, max_padding: float) -> None:
        """Cut the table into micro-batches of at most `max_tokens` padded tokens."""
        self.slices, start = [], 0
        for batch in micro_batches(self.rollouts, max_tokens, pad_id, packed, max_padding):
            rows = slice(start, start + len(batch.ids_N))
            self.slices.append(Slice(rows, batch.to(self.device)))
            start = rows.stop

    def fill(self, name: str, parts: Iterable[Tensor]) -> None:
        """Set a column from the values of each micro-batch."""
        self.columns[name] = torch.cat(list(parts))

    def as_sampled(self, name: str) -> Tensor:
        """Return a column (N,) with its rows in the order in which the rollouts were sampled."""
        return self.columns[name][self.sampling_order_N]

    def own(self, name: str) -> Tensor:
        """Return a column without the rows of given completions (N',), in the order in which the rollouts were sampled."""
        values = self.as_sampled(name)
        return values if self.given_N is None else values[~self.given_N[self.sampling_order_N]]

    def of_rollout(self, index: int) -> dict[str, Tensor]:
        """Return the rows of one rollout, by column, on the CPU."""
        rows = self.rollout_N == index
        return {name: values[rows].cpu() for name, values in self.columns.items()}

    def to_tensors(self) -> dict[str, Tensor]:
        """Return rollouts and columns as tensors in sampling order, which can be concatenated over processes."""
        requests = [rollout.request for rollout in self.rollouts]
        masks = [rollout.mask or (True,) * len(rollout.completion) for rollout in self.rollouts]
        stored = {
            "sample_id": torch.tensor([request.prompt.sample_id for request in requests]),
            "epoch": torch.tensor([request.epoch for request in requests]),
            "attempt": torch.tensor([request.attempt for request in requests]),
            "given": torch.tensor([rollout.given for rollout in self.rollouts]),
            "finish": torch.tensor([FINISH.index(rollout.finish_reason) for rollout in self.rollouts]),
            "length": torch.tensor([len(rollout.completion) for rollout in self.rollouts]),
            "ids": torch.tensor([token for rollout in self.rollouts for token in rollout.completion]),
            "mask": torch.tensor([is_trained for mask in masks for is_trained in mask], dtype=torch.bool),
            "behaviour_logp": torch.cat([rollout.behaviour_logp for rollout in self.rollouts]),
        }
        if self.bonus_R is not None:
            stored["bonus"] = self.bonus_R.cpu()
        return stored | {COLUMN + name: self.as_sampled(name).detach().cpu() for name in self.columns}

    def numbers(self) -> dict[str, Any]:
        """Return what `to_tensors` leaves out, as JSON."""
        return {
            "inner": self.inner,
            "is_detailed": self.is_detailed,
            "sums": self.means.sums,
            "counts": self.means.counts,
            "seconds": self.seconds,
        }


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the stored tables of all processes as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gather_table(tokens: Tokens | None) -> dict[str, Tensor] | None:
    """Return the stored tables of all processes as one; None where a process has none. Collective."""
    parts = gather_object([None if tokens is None else tokens.to_tensors()])
    return None if None in parts else concatenate(parts)


def load_tokens(
    stored: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    prompts: Mapping[int, Prompt],
    rank: int,
    processes: int,
    device: torch.device,
    align: Callable[[list[Rollout]], list[Rollout]] = lambda rollouts: rollouts,
) -> Tokens:
    """Return this process's share of a stored table, whatever the number of processes was when it was stored.

    Args:
        stored: As `to_tensors` returned it, concatenated over processes.
        numbers: As `numbers` returned it.
        prompts: By sample id.
        align: `Step.align`.
    """
    total = len(stored["length"])
    assert total % processes == 0
    share = slice(rank * total // processes, (rank + 1) * total // processes)
    ends = stored["length"].cumsum(0).tolist()
    tokens = slice(ends[share.start - 1] if share.start else 0, ends[share.stop - 1])
    lengths = stored["length"][share].tolist()
    ids, masks, logps = (stored[name][tokens].split(lengths) for name in ("ids", "mask", "behaviour_logp"))
    stored = {"given": torch.zeros(total, dtype=torch.bool), **stored}  # older versions stored none
    facts = zip(*(stored[name][share].tolist() for name in ("sample_id", "epoch", "attempt", "finish", "given")), strict=True)
    rollouts = []
    for (sample_id, epoch, attempt, finish, is_given), ids_T, mask_T, logp_T in zip(facts, ids, masks, logps, strict=True):
        mask = None if bool(mask_T.all()) else tuple(mask_T.tolist())
        request = Request(prompts[sample_id], epoch, attempt)
        rollouts.append(Rollout(request, tuple(ids_T.tolist()), logp_T.clone(), FINISH[finish], mask, bool(is_given)))
    first_row = int(stored["mask"][: tokens.start].sum())
    rows = slice(first_row, first_row + int(stored["mask"][tokens].sum()))
    table = Tokens(
        align(rollouts),
        device,
        bonus_R=stored["bonus"][share].to(device) if "bonus" in stored else None,
        # Sums over processes are to count them once.
        means=Means(*({name: value if rank == 0 else 0.0 for name, value in numbers[kind].items()} for kind in ("sums", "counts"))),
        inner=numbers["inner"],
        is_detailed=numbers.get("is_detailed", False),
        seconds=dict(numbers["seconds"]),
    )
    for name in stored:
        if name.startswith(COLUMN):
            values = stored[name][rows].to(device)
            table.columns[name.removeprefix(COLUMN)] = torch.empty_like(values).index_copy_(0, table.sampling_order_N, values)
    return table
