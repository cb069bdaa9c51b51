"""Sampling with the model itself: one prefill per prompt, a KV cache, and rows that leave the batch when they are finished.

transformers' `generate` is not used because a sample here must not depend on the batch it falls into: each draws its own random numbers,
derived from (seed, epoch, sample id, attempt), and prompts of different lengths share a batch. On a GPU the decode step is captured once
and replayed (`opd.samplers.line`); elsewhere the cache grows.

Shapes: `P` prompts, `B` sequences of the batch, `T` positions, `V` vocabulary.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from opd import signals
from opd.data.order import derive_seed
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, collate
from opd.errors import ConfigError, EngineError
from opd.models.device import autocast
from opd.models.policy import cache_argument, is_quantized, output_head, predicting_hidden, refusing
from opd.objective import behaviour_logp, draw
from opd.samplers.base import Decoding, OnDone, OnMain, SamplerSpec, run_here, unchanged
from opd.samplers.bf16_copy import Bf16Copy
from opd.samplers.line import DecodeLines, can_capture, keys_and_values

log = logging.getLogger(__name__)

CHECK_PROMPTS, CHECK_TOKENS = (12, 2, 24), 6  # tokens of the prompts, and of their completions at most, that a model is checked with
MAX_CHECK_GAP = {False: 1e-3, True: 0.15}  # nats per token, in float32 and in bf16; models that ignore the cache are 0.2 to 5 away
TRAIN = "train"  # the stream of training
FINISHED_SHARE = 0.25  # of a batch's rows from which a smaller batch is worth copying the cache


class GenerateSampler:
    """Implements `Sampler` on a transformers model.

    Args:
        spec: The model and its ids. `spec.bf16`: compute under bf16 autocast, as the trainer does.
        bf16_copy: Sample with a bf16 copy of the weights instead.
    """

    def __init__(self, spec: SamplerSpec, bf16_copy: bool = False) -> None:
        self.spec = spec
        self.model = spec.model
        self.copy = Bf16Copy(spec.model) if bf16_copy else None
        self.cache_argument = cache_argument(spec.model.base_model)
        self.captures = can_capture(spec.model) and not spec.sharded
        self.lines: DecodeLines | None = None  # those of training, kept for the run
        self.passing: DecodeLines | None = None  # those of any other use, kept for one call
        self.eos = torch.tensor(list(spec.eos), device=spec.model.device)

    def refresh(self) -> None:
        """Do nothing: samples come from the current weights."""

    def sync_weights(self, on_main: OnMain = run_here) -> None:
        """Do nothing: samples come from the current weights."""

    def drop_copy(self) -> None:
        """Sample with the trainer's weights from now on."""
        self.copy, self.model, self.lines = None, self.spec.model, None

    def check(self, role: str) -> None:
        """Compare log-probs of a few samples with those of plain forward passes; give the decode line up where only it is wrong.

        Draws no numbers from torch's own generator. Collective where weights are sharded: all processes do the same.

        Raises:
            ConfigError: The log-probs differ, or the model's code fails.
        """
        try:
            self.compare(role)
        except (ConfigError, EngineError) as error:
            if not self.captures:
                raise
            log.warning("decoding without a CUDA graph: %s", str(error).partition(";")[0])  # GPT-Neo, BLOOM: masks of their own
            self.captures = False
            self.compare(role)

    @torch.no_grad()
    def compare(self, role: str) -> None:
        """Check samples of uneven prompts, one of them sampled twice; a third of all ids end a completion, so that rows leave the batch."""
        spec, generator = self.spec, torch.Generator().manual_seed(0)
        ids = [torch.randint(spec.vocabulary, (length,), generator=generator).tolist() for length in CHECK_PROMPTS]
        requests = [Request(Prompt(row, tuple(prompt), "")) for row, prompt in enumerate([*ids, min(ids, key=len)])]
        remedy = "set eval.reward=null" if role == "teacher" else "set sampling.engine=vllm if it knows the model"
        remedy = "set sampling.dtype=trainer" if self.copy is not None else f"{remedy}, or use another architecture"
        eos, self.eos = self.eos, torch.arange(0, spec.vocabulary, 3, device=self.eos.device)
        gaps = []
        try:
            with refusing(role, spec.model, "cannot be sampled", remedy):
                for rollout in self.sample(requests, Decoding(1.0, CHECK_TOKENS), "check"):
                    batch = collate([rollout], [0], spec.pad_id).to(spec.model.device)
                    with autocast(spec.model.device, spec.bf16):
                        hidden_NH = predicting_hidden(spec.model.base_model, batch.inputs)
                        logp_NV = output_head(spec.model, spec.vocabulary, masked=spec.masked).logits(hidden_NH).log_softmax(-1)
                    gaps.append((logp_NV.gather(-1, batch.ids_N[:, None])[:, 0].cpu() - rollout.behaviour_logp).abs())
        finally:
            self.eos = eos
        gap = float(torch.cat(gaps).mean())
        in_bf16 = spec.bf16 or spec.model.dtype == torch.bfloat16 or self.copy is not None
        if not gap <= MAX_CHECK_GAP[in_bf16 or is_quantized(spec.model)]:  # also where it is not finite
            raise ConfigError(
                f"{role}: {type(spec.model).__name__} cannot be sampled: its samples' log-probs are {gap:.2g} nats from those of plain "
                f"forward passes; {remedy}"
            )

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str, on_done: OnDone = unchanged) -> list[Rollout]:
        rollouts: dict[int, Rollout] = {}
        bf16 = self.spec.bf16 and self.copy is None
        batches = decoding_batches(requests, decoding.batch_size)
        largest = max(map(len, batches), default=0), max((len(request.prompt.ids) for request in requests), default=0)
        try:
            with self.copy or nullcontext(self.spec.model) as self.model, autocast(self.spec.model.device, bf16):
                for batch in batches:
                    sampled = self.sample_batch([requests[index] for index in batch], decoding, stream, largest)
                    rollouts |= zip(batch, on_done(sampled), strict=True)
        finally:
            self.passing = None
        return [rollouts[index] for index in range(len(requests))]

    @torch.inference_mode()
    def sample_batch(self, requests: list[Request], decoding: Decoding, stream: str, largest: tuple[int, int]) -> list[Rollout]:
        """Sample requests that are sorted by prompt: each prompt is prefilled once.

        Args:
            largest: Rows of the largest batch of the call, and tokens of its longest prompt.
        """
        groups = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt.ids)]
        cache, logits_PV, mask_PT = self.prefill([group[0].prompt for group in groups])
        copies = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=self.model.device)
        select_rows(cache, copies)
        batch = (mask_PT[copies], logits_PV[copies], self.uniforms(requests, decoding, stream))
        if self.captures:
            lines = self.decode_lines(cache, batch[1], decoding, stream, *largest)
            ids_BT, logp_BT = lines.generate(keys_and_values(cache), *batch)
        else:
            ids_BT, logp_BT = self.decode(cache, *batch, decoding)
        eos = self.eos.tolist()
        rollouts = []
        for request, ids, logp_T in zip(requests, ids_BT.tolist(), logp_BT.unbind(), strict=True):
            completion = tuple(id for id in ids if id >= 0)
            reason = FinishReason.stop if completion[-1] in eos else FinishReason.length
            rollouts.append(Rollout(request, completion, logp_T[: len(completion)].clone(), reason))
        return rollouts

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Return the cache after the prompts, the logits (P, V) of the next token, and the mask (P, T) of left padding."""
        width = max(len(prompt.ids) for prompt in prompts)
        device = self.model.device
        ids_PT = torch.tensor([[self.spec.pad_id] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts], device=device)
        lengths_P = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
        mask_PT = (torch.arange(width, device=device)[None] >= width - lengths_P[:, None]).long()
        cache = DynamicCache(config=self.model.config)
        return cache, self.next_logits(ids_PT, mask_PT, (mask_PT.cumsum(-1) - 1).clamp_min(0), cache), mask_PT

    def next_logits(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache) -> Tensor:
        """Return the logits (B, V) of the token after `ids_BT`, whose keys and values are added to the cache."""
        if self.cache_argument == "cache_params":
            mask_BT = mask_BT[:, -ids_BT.shape[1] :]  # Mamba masks the new tokens only
        output = self.model.base_model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=True, **{self.cache_argument: cache}
        )
        head = output_head(self.model, self.spec.vocabulary, masked=self.spec.masked)
        return (head if self.copy is None else self.copy.head(head)).logits(output.last_hidden_state[:, -1])

    def uniforms(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> Tensor:
        """Return one number in [0, 1) for each sequence and position (B, T), the same whatever batch the sequence is in."""
        if decoding.temperature == 0:
            return torch.zeros(len(requests), decoding.max_new_tokens, device=self.model.device)
        generator = torch.Generator()
        rows = []
        for request in requests:
            generator.manual_seed(derive_seed(stream, self.spec.seed, request.epoch, request.prompt.sample_id, request.attempt))
            rows.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(self.model.device)

    def decode_lines(self, cache: DynamicCache, logits_BV: Tensor, decoding: Decoding, stream: str, rows: int, width: int) -> DecodeLines:
        """Return lines that hold any batch of the call; those of training stay for the run, others for the call.

        Args:
            rows, width: Rows of the largest batch, and tokens of the longest prompt.
        """
        if stream != TRAIN:
            if self.passing is None:
                self.passing = DecodeLines(self.model, self.next_logits, decoding, self.eos, keys_and_values(cache), logits_BV, rows, width)
            return self.passing
        rows, width = max(rows, decoding.batch_size), max(width, self.spec.longest - decoding.max_new_tokens)
        if self.lines is None or self.lines.decoding != decoding or not self.lines.fits(rows, width):
            self.lines = None  # frees its buffers first
            self.lines = DecodeLines(self.model, self.next_logits, decoding, self.eos, keys_and_values(cache), logits_BV, rows, width)
        return self.lines

    def decode(
        self, cache: DynamicCache, mask_BT: Tensor, logits_BV: Tensor, uniforms_BT: Tensor, decoding: Decoding
    ) -> tuple[Tensor, Tensor]:
        """Return sampled ids (B, max_new_tokens), -1 after the end of sequence, and their log-probs, both on the CPU."""
        total, limit = uniforms_BT.shape
        device = logits_BV.device
        ids_BT = torch.full((total, limit), -1, dtype=torch.long, device=device)
        logp_BT = torch.zeros((total, limit), dtype=torch.float32, device=device)
        rows_B = torch.arange(total, device=device)  # which sequence each row of the batch is
        live_B = torch.ones(total, dtype=torch.bool, device=device)
        for step in range(limit):
            signals.check()
            next_B, next_logp_B = choose(logits_BV, uniforms_BT[rows_B, step], decoding)
            ids_BT[rows_B[live_B], step] = next_B[live_B]
            logp_BT[rows_B[live_B], step] = next_logp_B[live_B]
            live_B = live_B & ~torch.isin(next_B, self.eos)
            alive = int(live_B.sum())
            decoding.ended(total - alive)
            if alive == 0 or step + 1 == limit:
                break
            if alive <= (1 - FINISHED_SHARE) * len(rows_B):
                stay = live_B.nonzero()[:, 0]
                select_rows(cache, stay)
                rows_B, live_B, next_B, mask_BT = rows_B[stay], live_B[stay], next_B[stay], mask_BT[stay]
            positions_B1 = mask_BT.sum(-1, keepdim=True)
            mask_BT = torch.cat((mask_BT, mask_BT.new_ones(len(next_B), 1)), -1)
            logits_BV = self.next_logits(next_B[:, None], mask_BT, positions_B1, cache)
        return ids_BT.cpu(), logp_BT.cpu()


def decoding_batches(requests: Sequence[Request], size: int) -> list[list[int]]:
    """Return the indices of the requests that are decoded together: those with the same prompt, then with prompts of like length."""
    order = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt.ids), requests[index].prompt.ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


def select_rows(cache: Any, rows: Tensor) -> None:
    """Replace the rows of the cache by those with these indices."""
    cache.reorder_cache(rows)  # batch_select_indices is for attention only, not for recurrent states


def choose(logits_BV: Tensor, uniform_B: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Return the next ids (B,) and their log-probs under the distribution they are drawn from; 0 for greedy ones."""
    if decoding.temperature == 0:
        next_B = logits_BV.argmax(-1)
        return next_B, torch.zeros_like(next_B, dtype=torch.float32)
    logp_BV = behaviour_logp(logits_BV, decoding.temperature, decoding.top_k, decoding.top_p)
    next_B = draw(logp_BV, uniform_B)
    return next_B, logp_BV.gather(-1, next_B[:, None])[:, 0]
