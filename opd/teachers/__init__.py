"""Teachers score the tokens that the student wrote."""

from opd.teachers.base import Teacher
from opd.teachers.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]
