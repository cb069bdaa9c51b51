"""The decode line: one decode step, captured once as a CUDA graph and replayed for every token of the run.

A line is a set of buffers for so many rows of so many positions, and the step that works on them in place: draw, log-prob, end of sequence,
mask, the model, and where the results go. Nothing in a step waits for the host or allocates memory. When rows finish, the others move to a
line of half as many rows, on the same buffers. On an H100 this takes a third of the time of a cache that grows (scripts/bench/README.md).

Shapes: `B` rows, `L` positions of the cache, `T` new tokens, `V` vocabulary, `K` key-value heads, `D` head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast
from weakref import proxy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd import signals
from opd.errors import EngineError
from opd.models.memory import line_length
from opd.objective import behaviour_logp, draw

LOOK = 16  # steps between looks at which rows are still decoded
ATTENTION = "opd_grouped"
CHANGED = ("mask", "position", "logits", "ids", "logp", "live", "slot", "step")  # buffers that a step changes, besides keys and values


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend with one query per row: the query heads that share a key head are its rows, so keys and values are not repeated."""
    B, H, Q, D = query.shape
    K = key.shape[1]
    if Q > 1:
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return attended
    out = F.scaled_dot_product_attention(query.reshape(B, K, H // K, D), key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(B, 1, H, -1), None  # values may have another size than keys


AttentionInterface.register(ATTENTION, grouped_attention)


def can_capture(model: PreTrainedModel) -> bool:
    """Return whether a decode step can be captured: on a GPU, where every layer attends to the whole past."""
    return model.device.type == "cuda" and all(type(layer) is StaticLayer for layer in StaticCache(model.config, max_cache_len=1).layers)


def keys_and_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast(Any, cache.layers)]


class SlotLayer(StaticLayer):
    """Keys and values of a layer; a step writes its own at the position `slot`, which all layers share."""

    keys: Tensor
    values: Tensor
    slot: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))  # autocast mixes dtypes
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values


@dataclass(slots=True)
class Buffers:
    """What the lines of one length share, for the largest number of rows; smaller lines work on the first rows.

    Args:
        keys, values: (B, K, L, D) of each layer.
        mask: (B, 1, 1, L), 0 where attention may look, else -inf.
        position: (B, 1), of the next token.
        uniform: (B, T), the random number of each token.
        logits: (B, V), of the next token.
        ids, logp: (B, T), the completion so far; -1 and 0 after its end.
        live: (B,), whether the row is still decoded.
        slot, step: (1,), where the next keys and the next token go.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    position: Tensor
    uniform: Tensor
    logits: Tensor
    ids: Tensor
    logp: Tensor
    live: Tensor
    slot: Tensor
    step: Tensor

    def rows(self) -> list[Tensor]:
        """Return the buffers that have a row for each sequence."""
        return [*self.keys, *self.values, self.mask, self.position, self.uniform, self.logits, self.ids, self.logp, self.live]


class DecodeLine:
    """The step for `rows` rows of the buffers. On a CPU it is computed, on a GPU captured at its first use and replayed."""

    def __init__(self, lines: "DecodeLines", rows: int) -> None:
        self.lines: DecodeLines = proxy(lines)  # in a cycle, the buffers would take memory until Python looks for garbage
        shared = lines.buffers
        names = ("mask", "position", "uniform", "logits", "ids", "logp", "live")
        views = {name: getattr(shared, name)[:rows] for name in names}
        self.own = Buffers([k[:rows] for k in shared.keys], [v[:rows] for v in shared.values], slot=shared.slot, step=shared.step, **views)
        self.cache = StaticCache(lines.model.config, max_cache_len=shared.mask.shape[-1])
        for index, (keys, values) in enumerate(zip(self.own.keys, self.own.values, strict=True)):
            layer = SlotLayer(max_cache_len=keys.shape[2])
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values, layer.slot = keys, values, shared.slot
            self.cache.layers[index] = layer
        self.graph: Any = None

    def compute(self) -> None:
        """Draw a token for every row, and compute the logits of the next."""
        own, decoding = self.own, self.lines.decoding
        if decoding.temperature == 0:
            drawn_B = own.logits.argmax(-1)
            logp_B = torch.zeros_like(drawn_B, dtype=torch.float32)
        else:
            logp_BV = behaviour_logp(own.logits, decoding.temperature, decoding.top_k, decoding.top_p)
            drawn_B = draw(logp_BV, own.uniform.index_select(1, own.step)[:, 0])
            logp_B = logp_BV.gather(-1, drawn_B[:, None])[:, 0]
        own.ids.index_copy_(1, own.step, torch.where(own.live, drawn_B, -1)[:, None])
        own.logp.index_copy_(1, own.step, torch.where(own.live, logp_B, 0.0)[:, None])
        own.live.logical_and_((drawn_B[:, None] != self.lines.eos).all(-1))
        own.mask.index_fill_(3, own.slot, 0.0)
        own.logits.copy_(self.lines.forward(drawn_B[:, None], own.mask, own.position, self.cache))
        own.position.add_(1)
        own.slot.add_(1)
        own.step.add_(1)

    def run(self) -> None:
        if not self.own.ids.is_cuda:
            self.compute()
            return
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()

    def capture(self) -> Any:
        """Return the step as a graph, not yet run. The state is the same before and after."""
        changed = [getattr(self.own, name) for name in CHANGED]
        saved = [tensor.clone() for tensor in changed]
        stream, own_stream = capturing_stream(self.own.logits.device), torch.cuda.current_stream()
        stream.wait_stream(own_stream)
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries initialise at their first calls, which cannot be captured
                self.compute()
        own_stream.wait_stream(stream)
        for tensor, value in zip(changed, saved, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.lines.pool, stream=stream, capture_error_mode="thread_local"):
                self.compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(own_stream)  # torch stays on the other one when a capture fails
            raise EngineError(f"sampling.engine=generate: a decode step cannot be captured: {str(error).splitlines()[0]}") from error
        return graph


class DecodeLines:
    """The decode lines of one length and one decoding: for all rows of a batch, and for 1, 2, 4, ... of them.

    Args:
        model: The model, whose weights must keep their addresses.
        forward: Computes logits (B, V) of the next token from (ids_B1, mask, positions_B1, cache).
        decoding: How to decode.
        eos: Ids that end a completion.
        rows: Rows of the largest batch.
        length: Positions of the longest prompt.
        layers: Keys and values of a prefill, for their shapes and dtype.
        logits: Logits of a prefill, for their shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[[Tensor, Tensor, Tensor, Cache], Tensor],
        decoding: Any,
        eos: Tensor,
        layers: Sequence[tuple[Tensor, Tensor]],
        logits: Tensor,
        rows: int,
        length: int,
    ) -> None:
        self.model, self.forward, self.decoding, self.eos = model, forward, decoding, eos
        self.sizes = sorted({rows, *(2**power for power in range(rows.bit_length()) if 2**power < rows)})
        device, tokens = logits.device, decoding.max_new_tokens
        self.length = line_length(length + tokens)
        dtype = layers[0][0].dtype

        def cache_like(states: Tensor) -> Tensor:
            return torch.zeros((rows, states.shape[1], self.length, states.shape[3]), dtype=dtype, device=device)

        self.buffers = Buffers(
            keys=[cache_like(keys) for keys, _ in layers],
            values=[cache_like(values) for _, values in layers],
            mask=torch.full((rows, 1, 1, self.length), -torch.inf, dtype=dtype, device=device),
            position=torch.zeros((rows, 1), dtype=torch.long, device=device),
            uniform=torch.zeros((rows, tokens), dtype=torch.float64, device=device),
            logits=torch.zeros((rows, logits.shape[1]), dtype=torch.float32, device=device),
            ids=torch.full((rows, tokens), -1, dtype=torch.long, device=device),
            logp=torch.zeros((rows, tokens), dtype=torch.float32, device=device),
            live=torch.zeros(rows, dtype=torch.bool, device=device),
            slot=torch.zeros(1, dtype=torch.long, device=device),
            step=torch.zeros(1, dtype=torch.long, device=device),
        )
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.lines: dict[int, DecodeLine] = {}

    def fits(self, rows: int, length: int) -> bool:
        tokens: int = self.decoding.max_new_tokens
        return rows <= self.sizes[-1] and length + tokens <= self.length

    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers.rows())

    def line(self, rows: int) -> DecodeLine:
        """Return the smallest line that holds so many rows."""
        size = next(size for size in self.sizes if size >= rows)
        if size not in self.lines:
            self.lines[size] = DecodeLine(self, size)
        return self.lines[size]

    def load(self, layers: Sequence[tuple[Tensor, Tensor]], mask_BT: Tensor, logits_BV: Tensor, uniforms_BT: Tensor) -> None:
        """Fill the buffers with a batch after its prefill, prompts padded on the left. Rows beyond the batch are dead."""
        rows, width = mask_BT.shape
        buffers = self.buffers
        for (keys, values), own_keys, own_values in zip(layers, buffers.keys, buffers.values, strict=True):
            own_keys[:rows, :, :width].copy_(keys)
            own_values[:rows, :, :width].copy_(values)
        buffers.mask.fill_(-torch.inf)
        buffers.mask[:, 0, 0, 0] = 0.0  # a dead row attends to something, or its softmax is NaN
        buffers.mask[:rows, 0, 0, :width] = torch.where(mask_BT.bool(), 0.0, -torch.inf).to(buffers.mask.dtype)
        buffers.position.zero_()  # of dead rows too, or they count on from batch to batch, beyond a table of positions
        buffers.position[:rows].copy_(mask_BT.sum(-1, keepdim=True))
        buffers.uniform[:rows].copy_(uniforms_BT)
        buffers.logits[:rows].copy_(logits_BV)
        buffers.ids.fill_(-1)
        buffers.logp.zero_()
        buffers.live.fill_(False)
        buffers.live[:rows] = True
        buffers.slot.fill_(width)
        buffers.step.zero_()

    @torch.inference_mode()
    def generate(
        self, layers: Sequence[tuple[Tensor, Tensor]], mask_BT: Tensor, logits_BV: Tensor, uniforms_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode a batch to its end; return ids (B, T), -1 after the end of sequence, and their log-probs, both on the CPU.

        Args:
            layers: Keys and values of the prompts, by layer.
            mask_BT: Mask of left padding.
            logits_BV: Logits of the first new token.
            uniforms_BT: Random numbers.
        """
        self.load(layers, mask_BT, logits_BV, uniforms_BT)
        total, tokens = len(mask_BT), self.decoding.max_new_tokens
        ids_BT = torch.full((total, tokens), -1, dtype=torch.long, device=logits_BV.device)
        logp_BT = torch.zeros((total, tokens), dtype=torch.float32, device=logits_BV.device)
        rows = torch.arange(total, device=logits_BV.device)  # the sequence of each row
        line = self.line(total)
        with grouped(self.model):
            for step in range(1, tokens + 1):
                line.run()
                if step % LOOK and step < tokens:
                    continue
                signals.check()
                live = line.own.live[: len(rows)].nonzero()[:, 0]
                self.decoding.ended(total - len(live))
                ids_BT[rows], logp_BT[rows] = line.own.ids[: len(rows)], line.own.logp[: len(rows)]
                if len(live) == 0 or step == tokens:
                    break
                smaller = self.line(len(live))
                if len(smaller.own.ids) < len(line.own.ids):
                    self.keep(live, len(smaller.own.ids))
                    rows, line = rows[live], smaller
        return ids_BT.cpu(), logp_BT.cpu()

    def keep(self, live: Tensor, size: int) -> None:
        """Move the live rows to the front of the buffers; the rows up to `size` repeat the first of them and are dead."""
        chosen = torch.cat((live, live[:1].expand(size - len(live))))
        for tensor in self.buffers.rows():
            tensor[:size].copy_(tensor[chosen])
        self.buffers.live[len(live) : size] = False


@cache
def capturing_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures: cuBLAS keeps 32 MiB on an H100 for each stream that it was called in."""
    return torch.cuda.Stream(device)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend with `grouped_attention` for the block."""
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
