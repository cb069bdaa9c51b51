"""Teachers score the tokens that the student generated."""

from opd.teachers.base import Scored, Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.placement import loading_device, place
from opd.teachers.served import ServedTeacher, canary_ids
from opd.teachers.several import as_one
from opd.teachers.student import ChangingTeacher, MovingAverage, starting_module, teaching_module

__all__ = [
    "ChangingTeacher",
    "LocalTeacher",
    "MovingAverage",
    "Scored",
    "ServedTeacher",
    "Teacher",
    "as_one",
    "canary_ids",
    "loading_device",
    "place",
    "starting_module",
    "teaching_module",
]
