"""Sampling with transformers' continuous batching: a paged cache, requests that come and go, CUDA graphs where there are any.

It samples with the model's own weights, so there is nothing to hand over after a step (or, with `twin`, a bf16 copy). Random numbers come
from one stream a call, so a sample depends on what else is in the call; the same call draws the same samples.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from opd.data.order import derive_seed
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.errors import ConfigError, EngineError
from opd.forward import output_head
from opd.samplers.base import Decoding
from opd.samplers.twin import Twin


class ContinuousSampler:
    """Implements `Sampler` on a transformers model.

    eos: ids that end a completion. vocabulary: only ids below it may be drawn. seed: the run's. twin: sample with a bf16 copy of the
    weights. memory_share: the part of the free memory that the cache may take. Raises `ConfigError` where the model has ids that must not
    be drawn: there is no way to leave them out here.
    """

    def __init__(
        self, model: PreTrainedModel, eos: Sequence[int], pad_id: int, vocabulary: int, seed: int, twin: bool, memory_share: float
    ) -> None:
        width = output_head(model).vocabulary
        if vocabulary < width:
            raise ConfigError(
                f"sampling.engine=continuous draws from all {width} ids of the student, of which only {vocabulary} are the teacher's too; "
                "use sampling.engine=generate"
            )
        self.source = Twin(model) if twin else nullcontext(model)
        self.eos = list(eos)
        self.pad_id = pad_id
        self.seed = seed
        self.memory_share = memory_share

    def refresh(self) -> None:
        """Nothing to do: the weights of now are what samples, and each call has a cache of its own."""

    @torch.no_grad()
    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """Raises `EngineError` when not every request is answered."""
        if not requests:
            return []
        order = sorted(range(len(requests)), key=lambda index: requests[index].prompt.ids)
        groups = [list(group) for _, group in groupby(order, key=lambda index: requests[index].prompt.ids)]
        sizes = {len(group) for group in groups}
        # Completions of one prompt share its cache only if every prompt has as many.
        copies = sizes.pop() if len(sizes) == 1 and decoding.temperature > 0 else 1
        prompts = [list(requests[index].prompt.ids) for group in groups for index in group[::copies]]
        seed = derive_seed(
            stream, self.seed, *((request.epoch, request.prompt.sample_id, request.attempt) for request in (requests[i] for i in order))
        )
        with self.source as model, generator_of(model.device, seed), quiet():
            answers = cast(Any, model).generate_batch(
                inputs=prompts,
                generation_config=self.generation_config(decoding, copies),
                continuous_batching_config=ContinuousBatchingConfig(
                    return_logprobs=True,
                    seed=seed % 2**32,
                    max_memory_percent=self.memory_share,
                    max_requests_per_batch=decoding.batch_size,
                ),
            )
        drawn = list(answers.values())
        failed = next((answer.error for answer in drawn if answer.error), None)
        if failed or len(drawn) != len(requests):
            raise EngineError(
                f"sampling.engine=continuous gave {len(drawn)} of {len(requests)} completions ({failed or 'the engine stopped'}): raise "
                "sampling.memory_share, lower sampling.batch_size, or use sampling.engine=generate"
            )
        rollouts = {index: self.to_rollout(requests[index], answer, decoding) for index, answer in zip(order, drawn, strict=True)}
        return [rollouts[index] for index in range(len(requests))]

    def generation_config(self, decoding: Decoding, copies: int) -> GenerationConfig:
        """Exactly `decoding`: what is left out here has no effect."""
        sampled = decoding.temperature > 0
        return GenerationConfig(
            do_sample=sampled,
            temperature=decoding.temperature if sampled else None,
            top_k=decoding.top_k if sampled else None,
            top_p=decoding.top_p if sampled else None,
            max_new_tokens=decoding.max_new_tokens,
            num_return_sequences=copies,
            eos_token_id=self.eos,
            pad_token_id=self.pad_id,
        )

    def to_rollout(self, request: Request, answer: GenerationOutput, decoding: Decoding) -> Rollout:
        completion = tuple(answer.generated_tokens)
        logp_T = torch.tensor(answer.logprobs) if decoding.temperature > 0 else torch.zeros(len(completion))
        return Rollout(request, completion, logp_T, FinishReason.stop if completion[-1] in self.eos else FinishReason.length)


@contextmanager
def generator_of(device: torch.device, seed: int) -> Iterator[None]:
    """torch's global generators, which the engine draws from, as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """The engine's lines are about its own choices."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
