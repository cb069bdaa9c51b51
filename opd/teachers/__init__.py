"""Teachers score the tokens that the student generated."""

from opd.teachers.base import Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.placement import loading_device, place
from opd.teachers.served import ServedTeacher
from opd.teachers.several import as_one

__all__ = ["LocalTeacher", "ServedTeacher", "Teacher", "as_one", "loading_device", "place"]
