"""The student as its own teacher. `teacher.weights` says with which weights:

    base      those at the start of the run: the student without its adapters, else a frozen copy (context distillation, arXiv 2209.15189)
    current   the present ones: only what the teacher reads besides sets it apart
    ema       an exponential moving average of the trained ones, updated after each step (mean teacher, arXiv 1703.01780)

Nothing is loaded for it. A copy is made of the trained weights only; all others are the student's.
"""

import copy
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from opd.config.options import TeacherWeights
from opd.config.schema import Config
from opd.data.rollouts import Inputs
from opd.errors import ConfigError
from opd.models.distributed import full_tensor
from opd.objective import TeacherStates
from opd.teachers.local import LocalTeacher


def teaching_module(config: Config, student: PreTrainedModel, sharded: bool) -> PreTrainedModel:
    """Return the module that computes as the teacher: the student itself, or a frozen copy of it.

    Args:
        student: With its adapters, before it is sharded.
        sharded: Whether it will be.

    Raises:
        ConfigError: The objective needs an output head that is only gathered while the teacher scores.
    """
    weights = config.teacher_weights
    if weights is TeacherWeights.current and sharded and config.needs_teacher_states:
        raise ConfigError(
            "teacher.weights=current: the output head of sharded weights is gathered for scoring only: set teacher.weights=ema, or "
            "ppo.estimator=sampled ppo.baseline=false"
        )
    if weights is TeacherWeights.current or (weights is TeacherWeights.base and not config.names_weights):
        return student  # which is, without its adapters, the model that teacher.path names
    return starting_module(config, student) if weights is TeacherWeights.base else frozen_copy(student)


def starting_module(config: Config, student: PreTrainedModel) -> PreTrainedModel:
    """Return the module that computes with the weights of the start: the student, to be used without its adapters, else a frozen copy.

    Args:
        student: With its adapters, before it is sharded and trained.
    """
    return student if config.starts_at_base else frozen_copy(student)


def frozen_copy(student: PreTrainedModel) -> PreTrainedModel:
    shared = {id(weight): weight for weight in student.parameters() if not weight.requires_grad}
    return copy.deepcopy(student, shared).requires_grad_(False)


class ChangingTeacher(LocalTeacher):
    """A teacher whose weights change during the run. Its output head, which may be a copy, is read again at each scoring."""

    def states(self, inputs: Inputs) -> TeacherStates:
        self.head = self.read_head()
        return super().states(inputs)


class MovingAverage:
    """The exponential moving average of the student's trained weights.

    Args:
        model: A frozen copy of the student, which computes with the average.
        trained: The student's trained weights by name, or their float32 masters: where the average begins.
        decay: The share of the average that stays at each update.
    """

    def __init__(self, model: PreTrainedModel, trained: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        weights = dict(model.named_parameters())
        self.weights = {name: weights[name].data for name in trained}
        # Averaged in the dtype of the masters: in bf16 most updates would be rounded away.
        self.averages = {name: own if own.dtype == trained[name].dtype else trained[name].clone() for name, own in self.weights.items()}

    def update(self, trained: Mapping[str, Tensor]) -> None:
        """Move the average towards the weights by 1 - `decay`. Collective where they are sharded."""
        for name, average in self.averages.items():
            average.lerp_(full_tensor(trained[name]), 1 - self.decay)
            self.weights[name].copy_(average)

    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Set the average. Collective where the tensors are sharded."""
        for name, average in self.averages.items():
            average.copy_(full_tensor(averages[name]))
            self.weights[name].copy_(average)
