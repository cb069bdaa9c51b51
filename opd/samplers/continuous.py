"""Sampling with transformers' continuous batching: a paged cache, requests that come and go, CUDA graphs where there are any.

It samples with the model's own weights, so there is nothing to hand over after a step (or, with `twin`, a bf16 copy). Random numbers come
from one stream a call, so a sample depends on what else is in the call; the same call draws the same samples, in whichever process, while
the cache has room for all that are decoded side by side: where it has not, who waits for whom depends on the free memory.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, cast

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints

from opd import signals
from opd.data.order import derive_seed
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.errors import ConfigError, EngineError
from opd.models.policy import output_head
from opd.samplers.base import Decoding, Lead, by_itself
from opd.samplers.bf16_copy import Twin

LOOK = 0.05  # seconds after which a call that waits for completions looks again whether it is to stop


class ContinuousSampler:
    """Implements `Sampler` on a transformers model.

    eos: ids that end a completion. vocabulary: only ids below it may be drawn. seed: the run's. twin: sample with a bf16 copy of the
    weights. memory_share: the part of the free memory that the cache may take. graphs: a GPU may replay steps as graphs; these hold no
    hooks that gather sharded weights. Raises `ConfigError` where the model has ids that must not be drawn: no way to leave them out here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Sequence[int],
        pad_id: int,
        vocabulary: int,
        seed: int,
        twin: bool,
        memory_share: float,
        graphs: bool = True,
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
        self.graphs = graphs

    def refresh(self) -> None:
        """Nothing to do: the weights of now are what samples, and each call has a cache of its own."""

    def sync_weights(self, lead: Lead = by_itself) -> None:
        """Nothing to do either."""

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
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            max_memory_percent=self.memory_share,
            max_requests_per_batch=decoding.batch_size,
            use_cuda_graph=None if self.graphs else False,
        )
        with self.source as model, generators_kept(model.device), quiet():
            answers = answered(model, prompts, self.generation_config(decoding, copies), batching, seed)
        failed = next((answer.error for answer in answers if answer.error), None)
        drawn = [answer for answer in answers if not answer.error]
        if len(drawn) != len(requests):
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


def answered(
    model: PreTrainedModel, prompts: list[list[int]], decoding: GenerationConfig, batching: ContinuousBatchingConfig, seed: int
) -> list[GenerationOutput]:
    """What the engine, which works in a thread of its own, answers: in the order of the prompts, all completions of one side by side.

    As transformers' `generate_batch`, with three differences: the engine ends after the step it is at, with `Preempted`, when this process
    is asked to stop; it begins with all prompts there, not with those that it happens to find, on which its random numbers depend; and it
    begins with `seed`, to which it would add the process's rank. Fewer answers where it breaks off.
    """
    copies = decoding.num_return_sequences
    hints = WorkloadHints(
        max_prompt_length=max(map(len, prompts)), max_generated_length=decoding.max_new_tokens, num_requests=len(prompts) * copies
    )
    manager = warm(model, decoding, batching, hints)
    torch.manual_seed(seed)
    names = manager.add_requests(prompts, max_new_tokens=decoding.max_new_tokens)
    answers: dict[str, GenerationOutput] = {}
    manager.start()
    try:
        while len(answers) < len(prompts) * copies:
            signals.check()
            running = manager.is_running()
            answer = manager.get_result(timeout=LOOK)
            if answer is not None:
                answers[answer.request_id] = answer
            elif not running:
                break
    finally:
        manager.stop(hard_stop=True)
        manager.destroy()
    wanted = [copy for name in names for copy in (*(f"{name}__child#{index}" for index in range(copies - 1)), name)]
    return [answers[name] for name in wanted if name in answers]


def warm(model: PreTrainedModel, decoding: GenerationConfig, batching: ContinuousBatchingConfig, hints: WorkloadHints) -> Any:
    """An engine with its cache, which has seeded torch's generators for itself. Raises `EngineError` where there is no room for a cache."""
    attention = model.config._attn_implementation
    manager = cast(Any, model).init_continuous_batching(decoding, batching, workload_hints=hints)
    try:
        manager.warmup()
    except (MemoryError, torch.OutOfMemoryError, ValueError) as error:
        model.set_attn_implementation(attention)  # an engine that was not started leaves its own behind
        raise EngineError(
            f"sampling.engine=continuous has no room for its cache ({str(error).splitlines()[0]}): raise sampling.memory_share (now "
            f"{batching.max_memory_percent:g}), or use sampling.engine=generate"
        ) from error
    return manager


def generators_kept(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards torch's global generators, which the engine draws from, are as they were before."""
    kept: AbstractContextManager[None] = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    return kept


@contextmanager
def quiet() -> Iterator[None]:
    """The engine's lines are about its own choices. It has a logger of its own, which writes to stderr."""
    loggers = [logging.getLogger(name) for name in ("transformers", "ContinuousBatchingLogger")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
