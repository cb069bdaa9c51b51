"""A teacher in this process, on the student's device."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.data.rollouts import MicroBatch
from opd.models import kept_hidden, output_head
from opd.objective import chunked_stats
from opd.objective.estimators import token_logp
from opd.teachers.base import Scores


class LocalTeacher:
    """Implements `Teacher` on a frozen transformers model; `vocabulary` cuts its head to the ids it shares with the student."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self.model = model
        self.head = output_head(model, vocabulary)

    @torch.no_grad()
    def distributions(self, batch: MicroBatch) -> Scores:
        return Scores(hidden_NH=kept_hidden(self.model, batch.ids_BT, batch.kept_N), head=self.head)

    @torch.no_grad()
    def score(self, batch: MicroBatch, temperature: float) -> Scores:
        def pick(logits_CV: Tensor, part: slice) -> dict[str, Tensor]:
            return {"logp": token_logp(logits_CV, batch.target_N[part], temperature)}

        hidden_NH = kept_hidden(self.model, batch.ids_BT, batch.kept_N)
        return Scores(logp_N=chunked_stats(hidden_NH, self.head, pick)["logp"])
