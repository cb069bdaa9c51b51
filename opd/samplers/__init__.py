"""Samplers write completions with the student's weights of the moment."""

from opd.samplers.base import Decoding, Sampler
from opd.samplers.generate import GenerateSampler
from opd.samplers.make import Choice, Material, longest, make_sampler
from opd.samplers.trial import choose

__all__ = ["Choice", "Decoding", "GenerateSampler", "Material", "Sampler", "choose", "longest", "make_sampler"]
