"""A teacher in this process."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.data.rollouts import Inputs, Rollout
from opd.models.device import autocast
from opd.models.distributed import full_tensor, unsharded
from opd.models.policy import adapters_disabled, output_head, predicting_hidden
from opd.objective import Head, TeacherStates
from opd.objective.head import TokenStats
from opd.teachers.base import Scored


class LocalTeacher:
    """Implements `Teacher` on a frozen transformers model.

    Args:
        model: The model.
        vocabulary, rows, masked: Size, rows and masked ids of its `Head`.
        adapters: The student's, where the teacher is the student without them.
        bf16: Compute under bf16 autocast. Otherwise the weights' dtype decides, even where the student computes under autocast.
        device: The student's device, to which results are moved.
        ready: Replaces `ready`, where the student's sharding strategy gathers the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: int,
        adapters: Any | None = None,
        rows: int | None = None,
        bf16: bool = False,
        device: torch.device | None = None,
        ready: Callable[[], AbstractContextManager[None]] | None = None,
        masked: Tensor | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.bf16 = bf16
        self.device = device or model.device
        self.gather = ready
        self.vocabulary, self.rows, self.masked = vocabulary, rows, masked
        self.head = self.read_head()

    def read_head(self) -> Head:
        """Return the output head in full and on the student's device: the objective reads it outside of `ready`, with the student's own."""
        head = output_head(self.model, self.vocabulary, self.rows, torch.bfloat16 if self.bf16 else self.model.dtype, self.masked)
        bias_V = None if head.bias_V is None else full_tensor(head.bias_V).to(self.device)
        masked = None if head.masked is None else head.masked.to(self.device)
        return replace(head, weight_VH=full_tensor(head.weight_VH).to(self.device), bias_V=bias_V, masked=masked)

    @torch.no_grad()
    def states(self, inputs: Inputs) -> TeacherStates:
        with self.active(), autocast(self.model.device, self.bf16):
            hidden_NH = predicting_hidden(self.model.base_model, inputs.to(self.model.device))
        return TeacherStates(hidden_NH.to(self.device), self.head)

    def logp(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> Tensor:
        return self.states(inputs).token_logp(ids_N, temperature)

    def columns(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> TokenStats:
        return self.states(inputs).columns(ids_N, temperature)

    def ready(self) -> AbstractContextManager[None]:
        return unsharded(self.model) if self.gather is None else self.gather()

    def top(self, inputs: Inputs) -> TeacherStates:
        return self.states(inputs)

    def expect(self, rollouts: Sequence[Rollout]) -> None: ...

    def check(self) -> None: ...

    def check_scores(self, scored: Sequence[Scored]) -> None: ...

    def active(self) -> AbstractContextManager[None]:
        return adapters_disabled(self.adapters)
