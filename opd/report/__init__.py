"""Runs as one self-contained HTML file: what they achieved, how, and where student and teacher differ. Needs no torch."""

from opd.report.page import render_report

__all__ = ["render_report"]
