"""Where decoding keeps keys and values, and how the next token's logits come from them.

Shapes: `B` sequences of the batch, `T` positions so far, `L` positions there is room for, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from opd.errors import ConfigError, EngineError

# (ids_BT, mask of all positions of the cache, positions_BT, cache) -> logits (B, V) of the token behind `ids_BT`, which go into the cache
Forward = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]


class Growing:
    """A cache that is as long as what is in it.

    worthwhile: the share of rows that have to be done before the batch is rebuilt without them, which copies the cache.
    """

    worthwhile: ClassVar[float] = 0.25

    def __init__(self, forward: Forward, cache: DynamicCache, mask_BT: Tensor) -> None:
        self.forward = forward
        self.cache = cache
        self.mask_BT = mask_BT

    def keep(self, rows: Tensor) -> "Growing":
        self.cache.batch_select_indices(rows)
        self.mask_BT = self.mask_BT[rows]
        return self

    def next_logits(self, ids_B: Tensor) -> Tensor:
        positions_B1 = self.mask_BT.sum(-1, keepdim=True)
        self.mask_BT = torch.cat((self.mask_BT, self.mask_BT.new_ones(len(ids_B), 1)), -1)
        return self.forward(ids_B[:, None], self.mask_BT, positions_B1, self.cache)


class OneDtype(StaticCache):
    """Values in the dtype of keys, as `DynamicCache` has them too: under autocast rotated keys are float32 and values bf16."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states.to(key_states.dtype), layer_idx, *args, **kwargs)
        return found


class Fixed:
    """A cache with room for all that will come: each step computes with the same tensors, so that a GPU can replay it as one graph.

    The first step is computed as it is, which lets libraries set themselves up; the second is captured. Nothing of either is kept for the
    next call: a graph's memory is the trainer's in between. Raises `ConfigError` for a model with layers that see a part of the past only.
    """

    worthwhile: ClassVar[float] = 0.5  # each rebuild is captured anew

    def __init__(self, forward: Forward, config: PretrainedConfig, layers: list[tuple[Tensor, Tensor]], mask_BT: Tensor, room: int) -> None:
        """layers: keys and values (B, heads, T, size) of each. room: tokens that will come."""
        self.forward = forward
        self.config = config
        self.used = mask_BT.shape[1]
        self.cache = OneDtype(config, max_cache_len=self.used + room)
        if not all(type(layer) is StaticLayer for layer in self.cache.layers):
            raise ConfigError("sampling.static_cache=true: some layers of the student see a part of the past only; set it to false")
        for number, (keys, values) in enumerate(layers):
            self.cache.update(keys, values, number)
        self.mask_BL = torch.cat((mask_BT, mask_BT.new_ones(len(mask_BT), room)), -1)  # what is to come is hidden for being later
        self.positions_B1 = mask_BT.sum(-1, keepdim=True)
        self.ids_B1 = torch.zeros_like(self.positions_B1)
        self.logits_BV: Tensor | None = None
        self.graph: Any = None

    def keep(self, rows: Tensor) -> "Fixed":
        layers = [(keys[rows, :, : self.used], values[rows, :, : self.used]) for keys, values in held(self.cache)]
        return Fixed(self.forward, self.config, layers, self.mask_BL[rows, : self.used], self.mask_BL.shape[1] - self.used)

    def next_logits(self, ids_B: Tensor) -> Tensor:
        self.ids_B1.copy_(ids_B[:, None])
        if self.ids_B1.is_cuda and self.logits_BV is not None and self.graph is None:
            self.graph = self.captured()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        self.used += 1
        assert self.logits_BV is not None
        return self.logits_BV

    def captured(self) -> Any:
        """The step as a graph, not yet computed. A teacher in a thread of its own may use another GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(
                f"sampling.static_cache: a step of decoding could not be captured ({str(error).splitlines()[0]}); set it to false"
            ) from error
        return graph

    def step(self) -> None:
        self.logits_BV = self.forward(self.ids_B1, self.mask_BL, self.positions_B1, self.cache)
        self.positions_B1 += 1


def held(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values."""
    return [(layer.keys, layer.values) for layer in cast(Any, cache.layers)]
