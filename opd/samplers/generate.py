"""Sampling with the model itself: one prefill a prompt, a KV cache, and rows that leave the batch when they are done.

transformers' `generate` is not used because a sample here must not depend on the batch it falls into: each draws its own random numbers,
derived from (seed, epoch, sample id, attempt), and prompts of different lengths share a batch.

Shapes: `P` prompts, `B` sequences of the batch, `T` positions, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from opd import signals
from opd.data.order import derive_seed
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.models.policy import autocast, output_head
from opd.objective import behaviour_logp, draw
from opd.samplers.base import Decoding, Lead, by_itself
from opd.samplers.bf16_copy import Twin
from opd.samplers.caches import Fixed, Growing, held


class GenerateSampler:
    """Implements `Sampler` on a transformers model.

    eos: ids that end a completion. vocabulary: only ids below it are drawn. seed: the run's. bf16: compute in bf16, as the trainer does.
    twin: sample with a bf16 copy of the weights. static: keep keys and values in tensors of one size (see `Fixed`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Sequence[int],
        pad_id: int,
        vocabulary: int,
        seed: int,
        bf16: bool,
        twin: bool = False,
        static: bool = False,
    ) -> None:
        self.model = model
        self.twin = Twin(model) if twin else None
        self.pad_id = pad_id
        self.vocabulary = vocabulary
        self.seed = seed
        self.bf16 = bf16 and not twin
        self.static = static
        self.eos = torch.tensor(list(eos), device=model.device)

    def refresh(self) -> None:
        """Nothing to do: the weights of now are what samples."""

    def sync_weights(self, lead: Lead = by_itself) -> None:
        """Nothing to do either."""

    def sample(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        stream: str,
        done: Callable[[dict[int, Rollout]], None] = lambda batch: None,
    ) -> list[Rollout]:
        """done: is told of each batch that was decoded, its rollouts by their place among the requests."""
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt.ids), requests[index].prompt.ids))
        rollouts: dict[int, Rollout] = {}
        with self.twin or nullcontext(self.model) as self.model, autocast(self.model.device, self.bf16):
            for start in range(0, len(order), decoding.batch_size):
                batch = order[start : start + decoding.batch_size]
                written = dict(zip(batch, self._sample_batch([requests[index] for index in batch], decoding, stream), strict=True))
                done(written)
                rollouts |= written
        return [rollouts[index] for index in range(len(requests))]

    def _sample_batch(self, requests: list[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """Requests with equal prompts stand beside each other: each prompt is prefilled once."""
        ids_BT, logp_BT = self._write(requests, decoding, stream)
        return [
            self._to_rollout(request, ids, logp) for request, ids, logp in zip(requests, ids_BT.tolist(), logp_BT.unbind(), strict=True)
        ]

    @torch.inference_mode()
    def _write(self, requests: list[Request], decoding: Decoding, stream: str) -> tuple[Tensor, Tensor]:
        """As `_decode`."""
        groups = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt.ids)]
        cache, logits_PV, mask_PT = self._prefill([group[0].prompt for group in groups])
        copies = torch.tensor([row for row, group in enumerate(groups) for _ in group], device=self.model.device)
        cache.batch_select_indices(copies)
        uniforms_BT = self._uniforms(requests, decoding, stream)
        return self._decode(self._kept(cache, mask_PT[copies], decoding), logits_PV[copies], uniforms_BT, decoding)

    def _kept(self, cache: DynamicCache, mask_BT: Tensor, decoding: Decoding) -> Growing | Fixed:
        if self.static and decoding.max_new_tokens > 1:
            return Fixed(self._next_logits, self.model.config, held(cache), mask_BT, decoding.max_new_tokens - 1)
        return Growing(self._next_logits, cache, mask_BT)

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[DynamicCache, Tensor, Tensor]:
        """The cache after the prompts, the logits (P, V) of the next token, and the mask (P, T) of what is not padding on the left."""
        width = max(len(prompt.ids) for prompt in prompts)
        device = self.model.device
        ids_PT = torch.tensor([[self.pad_id] * (width - len(prompt.ids)) + list(prompt.ids) for prompt in prompts], device=device)
        lengths_P = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
        mask_PT = (torch.arange(width, device=device)[None] >= width - lengths_P[:, None]).long()
        cache = DynamicCache(config=self.model.config)
        return cache, self._next_logits(ids_PT, mask_PT, (mask_PT.cumsum(-1) - 1).clamp_min(0), cache), mask_PT

    def _next_logits(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) of the token after `ids_BT`, whose keys and values are added to the cache."""
        output = self.model.base_model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True
        )
        head = output_head(self.model, self.vocabulary)
        return (head if self.twin is None else self.twin.head(head)).logits(output.last_hidden_state[:, -1])

    def _uniforms(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> Tensor:
        """One number in [0, 1) for each sequence and position (B, T), whatever batch the sequence is in."""
        if decoding.temperature == 0:
            return torch.zeros(len(requests), decoding.max_new_tokens, device=self.model.device)
        generator = torch.Generator()
        rows = []
        for request in requests:
            generator.manual_seed(derive_seed(stream, self.seed, request.epoch, request.prompt.sample_id, request.attempt))
            rows.append(torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(self.model.device)

    def _decode(self, kept: Growing | Fixed, logits_BV: Tensor, uniforms_BT: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
        """Sampled ids (B, max_new_tokens), the first end-of-sequence token and −1 behind it, and their log-probs, both on the CPU."""
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
            if alive == 0 or step + 1 == limit:
                break
            if alive <= (1 - kept.worthwhile) * len(rows_B):
                stay = live_B.nonzero()[:, 0]
                kept = kept.keep(stay)
                rows_B, live_B, next_B = rows_B[stay], live_B[stay], next_B[stay]
            logits_BV = kept.next_logits(next_B)
        return ids_BT.cpu(), logp_BT.cpu()

    def _to_rollout(self, request: Request, ids: list[int], logp_T: Tensor) -> Rollout:
        completion = tuple(id for id in ids if id >= 0)
        stopped = completion[-1] in self.eos.tolist()
        return Rollout(request, completion, logp_T[: len(completion)].clone(), FinishReason.stop if stopped else FinishReason.length)


def choose(logits_BV: Tensor, uniform_B: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """The next ids (B,) and their log-probs under the distribution they were drawn from; greedily chosen ones are certain."""
    if decoding.temperature == 0:
        next_B = logits_BV.argmax(-1)
        return next_B, torch.zeros_like(next_B, dtype=torch.float32)
    logp_BV = behaviour_logp(logits_BV, decoding.temperature, decoding.top_k, decoding.top_p)
    next_B = draw(logp_BV, uniform_B)
    return next_B, logp_BV.gather(-1, next_B[:, None])[:, 0]
