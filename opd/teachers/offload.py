"""Keep a teacher's layers in main memory: while one layer computes on the device, the next one's weights are copied to it.

This is own code because the library's way is too slow: on an H100 a 1.5B teacher scores 8,192 tokens in 65 ms this way, in 571 ms with
`accelerate.cpu_offload`, which copies each matrix when it is needed, and in 40 ms when it stays on the GPU (scripts/bench/README.md).

A thread does the copying. On CUDA it copies from pinned memory in a stream of its own, ordered by events with the stream that computes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Copies = tuple[list[Tensor], torch.cuda.Event | None]  # a layer's weights, and the event after which they have arrived


class Offload:
    """Make each of `layers`, which are never trained, compute on `device`; otherwise their parameters are tensors in main memory.

    Layers are given in the order in which they run; one that is called out of order waits for its copy. At most two are on the device, none
    after the last one or after an exception. Errors of the copying thread are raised by the layer that needed the copy. Not thread-safe.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parameters = [list(layer.parameters()) for layer in layers]
        for parameter in (parameter for layer in self.parameters for parameter in layer):
            if self.stream is not None and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()
        self.host = [[parameter.data for parameter in layer] for layer in self.parameters]
        self.copier = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self.pending: tuple[int, Future[Copies]] | None = None
        self.used: list[Tensor] = []  # device memory of the layer that computes, or computed last
        for index, layer in enumerate(layers):
            for buffer in layer.buffers():
                buffer.data = buffer.data.to(device)
            vars(layer)["forward"] = self.with_weights(index, layer.forward)

    def with_weights(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_on_device(*args: Any, **kwargs: Any) -> Any:
            with self.on_device(index):
                return forward(*args, **kwargs)

        return forward_on_device

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Hold the layer's weights on the device for the block, and copy the next layer's meanwhile."""
        try:
            if self.pending is None or self.pending[0] != index:
                self.take_arrived()
                self.start_copy(index)
            weights = self.take_arrived()
            self.point(index, weights)
            if index + 1 < len(self.parameters):
                self.start_copy(index + 1)
            self.used = weights
            del weights  # a traceback would keep it alive
            yield
        except BaseException:
            self.take_arrived()
            raise
        finally:
            self.point(index, self.host[index])
            if self.pending is None:
                self.used = []

    def point(self, index: int, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters[index], tensors, strict=True):
            parameter.data = tensor

    def start_copy(self, index: int) -> None:
        """Copy a layer's weights over those of the layer before, if they fit, else to new memory.

        New memory is allocated by the computing thread and stream, and the copy waits for that stream to get here, so that nothing is
        overwritten that is still read.
        """
        host, target = self.host[index], self.used
        self.used = []
        if [(tensor.shape, tensor.dtype) for tensor in target] != [(tensor.shape, tensor.dtype) for tensor in host]:
            with torch.inference_mode(False):  # the copying thread writes outside of that mode
                target = [torch.empty_like(tensor, device=self.device) for tensor in host]
        free = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        self.pending = index, self.copier.submit(self.copy, index, target, free)

    def copy(self, index: int, target: list[Tensor], free: torch.cuda.Event | None) -> Copies:
        with torch.cuda.stream(self.stream):  # does nothing for None
            if self.stream is not None and free is not None:
                self.stream.wait_event(free)
            for tensor, source in zip(target, self.host[index], strict=True):
                tensor.copy_(source, non_blocking=True)
            return target, None if self.stream is None else self.stream.record_event()

    def take_arrived(self) -> list[Tensor]:
        """Return the copied weights, ordered before what computes from here on; empty where nothing was copied."""
        if self.pending is None:
            return []
        (_, copies), self.pending = self.pending, None
        tensors, done = copies.result()
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return tensors
