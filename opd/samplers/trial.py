"""`sampling.engine=auto` and `sampling.dtype=auto`: what is fastest here, by trying it on the first prompts."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from opd.config.schema import Engine, SamplingConfig, SamplingDtype
from opd.data.rollouts import Request, Rollout, micro_batches
from opd.errors import ConfigError, EngineError
from opd.models.load import is_fast_in_bf16
from opd.models.policy import autocast, completion_hidden, output_head
from opd.objective import TeacherStates
from opd.samplers.base import Decoding
from opd.samplers.make import Choice, Material, make_sampler

log = logging.getLogger(__name__)

TRIAL_TOKENS = 32
TRIAL_BATCH = 8192  # tokens
# What is exact or simpler stays unless another is faster by this factor: less is noise.
WORTH = 1.15


@dataclass(frozen=True, slots=True)
class Trial:
    """tokens_per_second: of sampling. gap: mean |engine logp − trainer logp| in nats."""

    choice: Choice
    tokens_per_second: float
    gap: float

    def __str__(self) -> str:
        return f"{self.choice} {self.tokens_per_second:,.0f} tokens/s, gap {self.gap:.4f} nats"


def candidates(config: SamplingConfig, device: torch.device, sharded: bool = False) -> list[Choice]:
    """What `auto` leaves open, the exact and simple first.

    sharded: weights will be, whose hooks no graph can hold.
    """
    if config.engine is Engine.vllm:  # has a copy of its own, which nothing is to be compared with
        return [Choice(Engine.vllm, config.dtype is SamplingDtype.bfloat16)]
    engines = [config.engine]
    if config.engine is Engine.auto:
        engines = [Engine.generate, Engine.continuous] if device.type == "cuda" else [Engine.generate]
    twins = [config.dtype is SamplingDtype.bfloat16]
    if config.dtype is SamplingDtype.auto:
        twins = [False, True] if is_fast_in_bf16(device) else [False]
    statics = [bool(config.static_cache)]
    if config.static_cache is None and device.type == "cuda" and not sharded:
        statics = [False, True]
    found = [Choice(engine, twin, static) for engine, twin, static in product(engines, twins, statics)]
    return [choice for choice in found if choice.engine is Engine.generate or not choice.static]


def choose(config: SamplingConfig, material: Material, requests: Sequence[Request]) -> Choice:
    """The fastest candidate whose log-probs are within `sampling.max_gap` of the trainer's, tried on `requests`.

    Waits for no other process: of several, one tries for all. Raises what the last candidate raised where none can run the model.
    """
    open_ones = candidates(config, material.model.device, material.sharded)
    if len(open_ones) == 1:
        return open_ones[0]
    trials = []
    for choice in open_ones:
        try:
            trials.append(attempt(choice, config, material, requests))
        except (ConfigError, EngineError) as error:
            if choice == open_ones[-1] and not trials:
                raise
            log.info("%s: %s", choice, error)
    best = trials[0]
    for trial in trials[1:]:
        if trial.gap <= config.max_gap and trial.tokens_per_second > WORTH * best.tokens_per_second:
            best = trial
    return replace(best.choice, why="; ".join(map(str, trials)))


def attempt(choice: Choice, config: SamplingConfig, material: Material, requests: Sequence[Request]) -> Trial:
    """Raises `ConfigError` where the engine cannot run the model, `EngineError` where it breaks off."""
    decoding = Decoding(config.temperature, min(TRIAL_TOKENS, config.max_new_tokens), batch_size=config.batch_size)
    sampler = make_sampler(choice, material)
    sampler.sample(requests, replace(decoding, max_new_tokens=1), "trial")  # what only the first call does
    begin = time.perf_counter()
    rollouts = sampler.sample(requests, decoding, "trial")
    seconds = time.perf_counter() - begin
    return Trial(choice, sum(len(rollout.completion) for rollout in rollouts) / seconds, mean_gap(material, rollouts, config.temperature))


@torch.no_grad()
def mean_gap(material: Material, rollouts: Sequence[Rollout], temperature: float) -> float:
    """Mean |behaviour_logp − logp| of the rollouts' tokens, in nats."""
    model, total, count = material.model, 0.0, 0
    with autocast(model.device, material.bf16):
        head = output_head(model, material.vocabulary)
        for batch in micro_batches(rollouts, TRIAL_BATCH, material.pad_id):
            batch = batch.to(model.device)
            logp_N = TeacherStates(completion_hidden(model.base_model, batch.inputs), head).token_logp(batch.target_N, temperature)
            total, count = total + float((logp_N - batch.behaviour_logp_N).abs().sum()), count + len(logp_N)
    return total / count
