"""Samplers generate completions with the student's current weights. `make_sampler` picks one by a fixed rule, not by measuring speed."""

import logging
from collections.abc import Sequence

import torch

from opd.config.options import Engine, SamplingDtype
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.errors import ConfigError
from opd.samplers.base import Decoding, Sampler, SamplerSpec
from opd.samplers.generate import GenerateSampler
from opd.samplers.several import of_teachers
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_server import VllmServerSampler

__all__ = ["Decoding", "GenerateSampler", "Sampler", "SamplerSpec", "longest_sequence", "make_sampler", "of_teachers"]

log = logging.getLogger(__name__)


def make_sampler(config: Config, spec: SamplerSpec, bf16_copy: bool) -> Sampler:
    """Return the configured sampler: `generate` for auto.

    Raises:
        ConfigError: The engine is not installed or cannot run the model.
        EngineError: A server does not answer.
    """
    if config.sampling.engine is not Engine.vllm:
        sampler = GenerateSampler(spec, bf16_copy)
        try:
            sampler.check("model")
        except ConfigError as error:
            if not bf16_copy or config.sampling.dtype is not SamplingDtype.auto:
                raise
            log.warning("sampling with the trainer's weights, not with a bf16 copy: %s", str(error).partition(";")[0])
            sampler.drop_copy()
            sampler.check("model")
        return sampler
    options = config.sampling.vllm
    bf16 = spec.bf16 or spec.model.dtype == torch.bfloat16 or config.sampling.dtype is SamplingDtype.bfloat16
    if options.url is None:
        return VllmSampler(spec, bf16, config.sampling.memory_share)
    return VllmServerSampler(spec, bf16, options.url, options.timeout, options.weights_folder)


def longest_sequence(config: Config, prompts: Sequence[Prompt]) -> int:
    """Return the tokens of the longest prompt and the longest completion together."""
    new_tokens = max(config.sampling.max_new_tokens, config.eval.max_new_tokens, config.eval.kl_max_new_tokens)
    return max(len(prompt.ids) for prompt in prompts) + new_tokens
