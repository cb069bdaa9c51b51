"""Runs as one HTML file that needs nothing else: what they achieved, how, and where student and teacher differ. Needs no torch."""

from opd.report.page import page

__all__ = ["page"]
