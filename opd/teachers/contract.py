"""Are a served teacher's scores of a run's first batch right? They are compared with those of a second request, and of a float32 forward
pass of the weights at `teacher.path`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedModel

from opd.config.options import Dtype, TeacherConfig
from opd.data.rollouts import MicroBatch, Rollout, collate
from opd.errors import EngineError
from opd.models.device import free_memory
from opd.models.load import load_config, load_model
from opd.models.locate import locate
from opd.models.memory import FLOAT32, count, empty_model
from opd.models.policy import output_head
from opd.teachers.base import Scored
from opd.teachers.local import LocalTeacher

log = logging.getLogger(__name__)

MAX_SPREAD = 0.1  # nats per token between two scorings of a text: about twice what a small model in float32 and in bf16 differs by
MAX_SHARE = 0.25  # of the distance between teacher and student, which is what the run learns from
MAX_ROUNDING = 2.0  # times the distance between the weights in float32 and in bf16, which a server may compute in
MAX_TOKENS = 4096  # scored with the weights, which takes a CPU some seconds for each billion parameters
MEMORY_SHARE = 0.25  # of the free main memory, for the weights


def check_spread(scored: Sequence[Scored], second: Sequence[float]) -> None:
    """Raise `EngineError` where a second scoring differs by more than `MAX_SHARE` of the distance to the student, and `MAX_SPREAD`."""
    first = [value for one in scored for value in one.teacher_logp]
    spread, signal = distance(first, second), distance(first, [value for one in scored for value in one.logp])
    if spread > max(MAX_SHARE * signal, MAX_SPREAD):
        raise EngineError(
            f"teacher.url: two scorings of the first batch differ by {spread:.3g} nats per token, and the teacher from the student by "
            f"{signal:.3g}, of which {MAX_SHARE:g} is allowed: do the servers have the same model and dtype?"
        )
    log.info("the teacher's scores of the first batch, scored twice, differ by %.2g nats per token", spread)


def check_weights(config: TeacherConfig, scored: Sequence[Scored]) -> None:
    """Compare scores with those of the weights at `teacher.path`, where they are there and fit in main memory.

    Raises:
        EngineError: They are further apart than `MAX_SHARE` of the distance to the student, and than rounding explains.
    """
    if not can_load(config):
        return
    chosen: list[Scored] = []
    tokens = 0
    for one in scored:
        if not chosen or tokens + one.rollout.length <= MAX_TOKENS:
            chosen.append(one)
            tokens += one.rollout.length
    plain = replace(config, url=None, dtype=Dtype.float32, attn_implementation=None)
    model = load_model(plain, "teacher", torch.device("cpu")).eval()
    rollouts = [one.rollout for one in chosen]
    expected = scores_of(model, rollouts)
    gap = distance([value for one in chosen for value in one.teacher_logp], expected)
    signal = distance([value for one in chosen for value in one.logp], expected)
    if gap > MAX_SHARE * signal:
        rounding = distance(scores_of(model.to(torch.bfloat16), rollouts), expected)
        if gap > MAX_ROUNDING * rounding:
            raise EngineError(
                f"teacher.url: its scores of the first batch are {gap:.3g} nats per token from those of the weights at "
                f"teacher.path={config.path}, which are {signal:.3g} from the student's (of which {MAX_SHARE:g} is allowed) and "
                f"{rounding:.2g} from themselves in bf16: serve that model, or set teacher.path to the one that is served"
            )
    log.info("the served teacher is %.2g nats per token from the weights at teacher.path, these are %.2g from the student", gap, signal)


def can_load(config: TeacherConfig) -> bool:
    """Return whether the weights are in a local folder, not quantised, and take at most `MEMORY_SHARE` of the free memory in float32."""
    folder = Path(locate(config, "teacher"))
    if not any(folder.glob("*.safetensors")) or "quantization_config" in load_config(config, "teacher").to_dict():
        return False
    return FLOAT32 * count(empty_model(config, "teacher")) <= MEMORY_SHARE * free_memory(torch.device("cpu"))


def scores_of(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> list[float]:
    """Return the log-probs of all trained tokens, each rollout scored alone."""
    teacher = LocalTeacher(model, output_head(model).vocabulary)
    values = []
    for rollout in rollouts:
        batch = collate([rollout], [0], pad_id=0)
        ids = batch.ids_N if batch.spans is None else batch.spans.ids_M
        values += of_spans(batch, teacher.logp(batch.teacher_inputs, ids, 1.0).tolist())
    return values


def of_spans(batch: MicroBatch, values: Sequence[float]) -> list[float]:
    """Return the sums over the spans of a teacher with another tokenizer; for another teacher the values."""
    if batch.spans is None:
        return list(values)
    rows = batch.spans.row_M.tolist()
    sums = dict.fromkeys(rows, 0.0)
    for row, value in zip(rows, values, strict=True):
        sums[row] += value
    return list(sums.values())


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the mean absolute difference."""
    return fmean(abs(one - other) for one, other in zip(first, second, strict=True))
