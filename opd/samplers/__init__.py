"""Samplers write completions with the student's weights of the moment."""

from opd.config.schema import Engine
from opd.samplers.base import Decoding, Sampler
from opd.samplers.generate import GenerateSampler
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_server import VllmServerSampler

SAMPLERS = {Engine.generate: GenerateSampler}

__all__ = ["SAMPLERS", "Decoding", "GenerateSampler", "Sampler", "VllmSampler", "VllmServerSampler"]
