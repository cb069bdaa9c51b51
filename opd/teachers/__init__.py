"""Teachers score the tokens that the student generated."""

from opd.teachers.base import Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.placement import loading_device, place

__all__ = ["LocalTeacher", "Teacher", "loading_device", "place"]
