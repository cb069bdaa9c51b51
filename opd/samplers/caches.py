"""Key-value caches of a decode loop, and how the next token's logits are computed with them.

On an H100 one decoded token of 64 rows takes 25 ms with a cache that grows and 7 ms with a static one whose step is replayed as a CUDA
graph (scripts/bench/README.md). On a CPU the static one is slower.

Shapes: `B` sequences of the batch, `T` positions so far, `L` positions there is room for, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from opd.errors import EngineError

# (ids_BT, mask of all positions of the cache, positions_BT, cache) -> logits (B, V) of the token after `ids_BT`, which enter the cache
Forward = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]


def can_capture(model: PreTrainedModel) -> bool:
    """Return whether the decode step can be replayed as a CUDA graph: on a GPU, where every layer attends to the whole past."""
    return model.device.type == "cuda" and all(type(layer) is StaticLayer for layer in StaticCache(model.config, max_cache_len=1).layers)


def keys_and_values(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast(Any, cache.layers)]


class GrowingCache:
    """A cache that is as long as its content. `finished_share`: finished rows from which a smaller batch is worth copying the cache."""

    finished_share: ClassVar[float] = 0.25

    def __init__(self, forward: Forward, cache: DynamicCache, mask_BT: Tensor) -> None:
        self.forward = forward
        self.cache = cache
        self.mask_BT = mask_BT

    def select(self, rows: Tensor) -> "GrowingCache":
        self.cache.batch_select_indices(rows)
        self.mask_BT = self.mask_BT[rows]
        return self

    def step(self, ids_B: Tensor) -> Tensor:
        positions_B1 = self.mask_BT.sum(-1, keepdim=True)
        self.mask_BT = torch.cat((self.mask_BT, self.mask_BT.new_ones(len(ids_B), 1)), -1)
        return self.forward(ids_B[:, None], self.mask_BT, positions_B1, self.cache)


class KeyDtypeCache(StaticCache):
    """Stores values in the dtype of keys, as `DynamicCache` does: under autocast rotated keys are float32 and values bf16."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states.to(key_states.dtype), layer_idx, *args, **kwargs)
        return updated


class StaticStep:
    """A cache with room for the whole completion: every step works on the same tensors, so that a GPU can replay it as one graph.

    The first step runs eagerly, which lets libraries initialise; the second is captured.

    Args:
        forward: Computes a step.
        config: The model's.
        layers: Keys and values (B, heads, T, size) of each layer.
        mask_BT: Mask of left padding.
        room: Tokens still to come.
    """

    finished_share: ClassVar[float] = 0.5  # each smaller batch is captured again

    def __init__(self, forward: Forward, config: PretrainedConfig, layers: list[tuple[Tensor, Tensor]], mask_BT: Tensor, room: int) -> None:
        self.forward = forward
        self.config = config
        self.used = mask_BT.shape[1]
        self.cache = KeyDtypeCache(config, max_cache_len=self.used + room)
        for number, (keys, values) in enumerate(layers):
            self.cache.update(keys, values, number)
        self.mask_BL = torch.cat((mask_BT, mask_BT.new_ones(len(mask_BT), room)), -1)  # causality hides the positions to come
        self.positions_B1 = mask_BT.sum(-1, keepdim=True)
        self.ids_B1 = torch.zeros_like(self.positions_B1)
        self.logits_BV: Tensor | None = None
        self.graph: Any = None

    def select(self, rows: Tensor) -> "StaticStep":
        layers = [(keys[rows, :, : self.used], values[rows, :, : self.used]) for keys, values in keys_and_values(self.cache)]
        return StaticStep(self.forward, self.config, layers, self.mask_BL[rows, : self.used], self.mask_BL.shape[1] - self.used)

    def step(self, ids_B: Tensor) -> Tensor:
        self.ids_B1.copy_(ids_B[:, None])
        if self.ids_B1.is_cuda and self.logits_BV is not None and self.graph is None:
            self.graph = self.capture()
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        self.used += 1
        assert self.logits_BV is not None
        return self.logits_BV

    def compute(self) -> None:
        self.logits_BV = self.forward(self.ids_B1, self.mask_BL, self.positions_B1, self.cache)
        self.positions_B1 += 1

    def capture(self) -> Any:
        """Return the step as a graph, not yet run."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EngineError(f"sampling.engine=generate: a decode step could not be captured ({str(error).splitlines()[0]})") from error
        return graph
