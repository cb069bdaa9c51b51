"""A teacher in this process."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.data.rollouts import MicroBatch
from opd.models.policy import autocast, completion_hidden, output_head, without
from opd.models.sharding import whole
from opd.objective import TeacherStates
from opd.teachers.placement import head_on


class LocalTeacher:
    """Implements `Teacher` on a frozen transformers model.

    vocabulary, rows: size and rows of its `Head`. adapters: the student's, where the teacher is the student's own base. bf16: compute in
    bf16 whatever the weights are; otherwise they decide, also where the student computes under autocast. device: the student's, where what
    it says is needed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: int,
        adapters: Any | None = None,
        rows: int | None = None,
        bf16: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.bf16 = bf16
        self.device = device or model.device
        self.head = head_on(output_head(model, vocabulary, rows, torch.bfloat16 if bf16 else model.dtype), self.device)

    @torch.no_grad()
    def states(self, batch: MicroBatch) -> TeacherStates:
        with self.active(), autocast(self.model.device, self.bf16):
            hidden_NH = completion_hidden(self.model.base_model, batch.teacher_inputs.to(self.model.device))
        return TeacherStates(hidden_NH.to(self.device), self.head)

    def ready(self) -> AbstractContextManager[None]:
        """Within it each process may ask what it likes. All processes have to enter: the layers may be shared out among them."""
        return whole(self.model)

    def active(self) -> AbstractContextManager[None]:
        """Within it, the model behind the teacher computes as the teacher."""
        return without(self.adapters)

    def logp(self, batch: MicroBatch, temperature: float) -> Tensor:
        return self.states(batch).token_logp(batch.target_N, temperature)
