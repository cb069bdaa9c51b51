"""Is a served teacher the model at `teacher.path`? Its scores of a text are compared with a float32 forward pass of the weights there."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from opd.config.schema import Dtype, TeacherConfig
from opd.data.rollouts import Inputs
from opd.errors import EngineError
from opd.models.device import free_memory
from opd.models.load import load_model, locate
from opd.models.memory import FLOAT32, count, empty_model
from opd.teachers.local import LocalTeacher
from opd.teachers.served import MAX_SPREAD, ServedTeacher, distance

log = logging.getLogger(__name__)

MAX_SHARE = 0.25  # of the distance between teacher and student, which is what the run learns from
MEMORY_SHARE = 0.25  # of the free main memory, for the copy


def check_weights(teacher: ServedTeacher, config: TeacherConfig, student: PreTrainedModel, vocabulary: int) -> None:
    """Compare the canary's scores with those of the weights at `teacher.path`, where they are there and fit in main memory.

    Raises:
        EngineError: They are further apart than `MAX_SHARE` of the distance to the student, and than rounding explains.
    """
    if not can_load(config):
        return
    copy = load_model(replace(config, url=None, dtype=Dtype.float32), "teacher", torch.device("cpu")).eval()
    expected = canary_logp(copy, teacher.canary, vocabulary)
    gap, signal = distance(teacher.reference, expected), distance(canary_logp(student, teacher.canary, vocabulary), expected)
    if gap > max(MAX_SHARE * signal, MAX_SPREAD):
        raise EngineError(
            f"teacher.url: its scores of a text are {gap:.3g} nats per token from those of the weights at teacher.path={config.path}; "
            f"these are {signal:.3g} from the student's: serve that model, or set teacher.path to the one that is served"
        )
    log.info("the served teacher is %.2g nats per token from the weights at teacher.path, these are %.2g from the student", gap, signal)


def can_load(config: TeacherConfig) -> bool:
    """Return whether the weights are in a local folder and take no more than `MEMORY_SHARE` of the free memory in float32."""
    folder = Path(locate(config, "teacher"))
    if not any(folder.glob("*.safetensors")):
        return False
    return FLOAT32 * count(empty_model(config, "teacher")) <= MEMORY_SHARE * free_memory(torch.device("cpu"))


def canary_logp(model: PreTrainedModel, ids: Sequence[int], vocabulary: int) -> list[float]:
    """Return the log-probs of all ids but the first, in nats at temperature 1."""
    inputs = Inputs(torch.tensor([list(ids)]), torch.arange(len(ids) - 1)).to(model.device)
    logp_N: list[float] = LocalTeacher(model, vocabulary).logp(inputs, inputs.ids_BT[0, 1:], 1.0).tolist()
    return logp_N
