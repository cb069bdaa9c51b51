"""Teachers score the tokens that the student wrote."""

from opd.teachers.base import Teacher
from opd.teachers.local import LocalTeacher
from opd.teachers.placement import home, place

__all__ = ["LocalTeacher", "Teacher", "home", "place"]
