"""A teacher in this process, on the student's device."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.data.rollouts import MicroBatch
from opd.models import kept_hidden, output_head
from opd.objective import TeacherStates, chunked_stats, token_logp


class LocalTeacher:
    """Implements `Teacher` on a frozen transformers model; `vocabulary` cuts its head to the ids it shares with the student."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self.model = model
        self.head = output_head(model, vocabulary)

    @torch.no_grad()
    def states(self, batch: MicroBatch) -> TeacherStates:
        return TeacherStates(kept_hidden(self.model, batch.ids_BT, batch.kept_N), self.head)

    def logp(self, batch: MicroBatch, temperature: float) -> Tensor:
        def pick(logits_CV: Tensor, part: slice) -> dict[str, Tensor]:
            return {"logp": token_logp(logits_CV, batch.target_N[part], temperature)}

        return chunked_stats(self.states(batch).hidden_NH, self.head, pick)["logp"]
