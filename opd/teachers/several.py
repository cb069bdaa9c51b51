"""Several teachers as one: each scores the sequences of its own datasets.

A micro-batch has one teacher, and all micro-batches of a teacher follow each other, so that teachers with `placement: offload` are on the
device in turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor

from opd.config.schema import naming_teacher
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
        return self.each(lambda teacher: teacher.active())

    def ready(self) -> AbstractContextManager[None]:
        return self.each(lambda teacher: teacher.ready())

    @contextmanager
    def each(self, context: Callable[[Teacher], AbstractContextManager[None]]) -> Iterator[None]:
        """Enter a context of every teacher, in the same order in all processes."""
        with ExitStack() as stack:
            for teacher in self.teachers.values():
                stack.enter_context(context(teacher))
            yield


def as_one(teachers: Mapping[str, Teacher]) -> Teacher:
    """Return the teachers of a run, by label, as one; a single one as it is."""
    return SeveralTeachers(teachers) if len(teachers) > 1 else next(iter(teachers.values()))
