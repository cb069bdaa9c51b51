"""The samplers of several teachers as one: each answers the prompts that it scores."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from opd.data.rollouts import Request, Rollout
from opd.samplers.base import Decoding, OnDone, OnMain, Sampler, run_here, unchanged
from opd.teachers import Teacher


class TeacherSamplers:
    """Implements `Sampler` for requests whose prompts name their teacher.

    Args:
        samplers: By the teacher's label.
        teachers: Those that have to be active while theirs samples.
    """

    def __init__(self, samplers: Mapping[str, Sampler], teachers: Mapping[str, Teacher]) -> None:
        self.samplers, self.teachers = samplers, teachers

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str, on_done: OnDone = unchanged) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        for label, sampler in self.samplers.items():
            own = [index for index, request in enumerate(requests) if request.prompt.teacher == label]
            if own:
                with self.teachers[label].active() if label in self.teachers else nullcontext():
                    rollouts |= zip(own, sampler.sample([requests[index] for index in own], decoding, stream, on_done), strict=True)
        return [rollouts[index] for index in range(len(requests))]

    def refresh(self) -> None:
        """Do nothing: teachers do not change."""

    def sync_weights(self, on_main: OnMain = run_here) -> None:
        """Do nothing: teachers do not change."""


def of_teachers(samplers: Mapping[str, Sampler], teachers: Mapping[str, Teacher] | None = None) -> Sampler:
    """Return the samplers of a run's teachers, by label, as one; a single one as it is, for blocks in which its teacher is active."""
    return TeacherSamplers(samplers, teachers or {}) if len(samplers) > 1 else next(iter(samplers.values()))
