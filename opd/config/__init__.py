"""Typed options, their checks, and how they are composed from YAML files. Nothing here imports torch."""
