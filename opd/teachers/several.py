"""Several teachers as one: each scores the sequences of its own datasets.

A micro-batch has one teacher, and all micro-batches of a teacher follow each other, so that teachers with `placement: offload` are on the
device in turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import Tensor

from opd.config.options import naming_teacher
from opd.data.rollouts import Inputs, Rollout
from opd.objective import TeacherStates, TeacherTop
from opd.objective.head import TokenStats
from opd.teachers.base import Scored, Teacher


class SeveralTeachers:
    """Implements `Teacher` for sequences that name their teacher (`Inputs.teacher`).

    Args:
        teachers: By label.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = teachers

    def logp(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> Tensor:
        with naming_teacher(inputs.teacher):
            return self.teachers[inputs.teacher].logp(inputs, ids_N, temperature)

    def states(self, inputs: Inputs) -> TeacherStates:
        with naming_teacher(inputs.teacher):
            return self.teachers[inputs.teacher].states(inputs)

    def top(self, inputs: Inputs) -> TeacherStates | TeacherTop:
        with naming_teacher(inputs.teacher):
            return self.teachers[inputs.teacher].top(inputs)

    def columns(self, inputs: Inputs, ids_N: Tensor, temperature: float) -> TokenStats:
        with naming_teacher(inputs.teacher):
            return self.teachers[inputs.teacher].columns(inputs, ids_N, temperature)

    def expect(self, rollouts: Sequence[Rollout]) -> None:
        for label, teacher in self.teachers.items():
            teacher.expect([rollout for rollout in rollouts if rollout.request.prompt.teacher == label])

    def check(self) -> None:
        for label, teacher in self.teachers.items():
            with naming_teacher(label):
                teacher.check()

    def check_scores(self, scored: Sequence[Scored]) -> None:
        for label, teacher in self.teachers.items():
            own = [one for one in scored if one.rollout.request.prompt.teacher == label]
            with naming_teacher(label):
                if own:
                    teacher.check_scores(own)

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()  # one by one, when they score or their samplers sample: of two that are the student one may need its adapters

    @contextmanager
    def ready(self) -> Iterator[None]:
        with ExitStack() as stack:
            for teacher in self.teachers.values():  # in the same order in all processes
                stack.enter_context(teacher.ready())
            yield


def as_one(teachers: Mapping[str, Teacher]) -> Teacher:
    """Return the teachers of a run, by label, as one; a single one as it is."""
    return SeveralTeachers(teachers) if len(teachers) > 1 else next(iter(teachers.values()))
