"""Layers whose weights stay in main memory: while one computes on the device, those of the next are on their way to it.

A thread copies. On CUDA it copies from pinned memory in a stream of its own, and events order that with the stream that computes; elsewhere
copies are the same without either. (Accelerate's `cpu_offload` copies each matrix when it is needed, FSDP2's `CPUOffloadPolicy` in the
stream that computes: neither has the two overlap.)
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Copies = tuple[list[Tensor], torch.cuda.Event | None]  # a layer's weights, and the moment from which they are there


class Offload:
    """Has each of `layers`, which are never trained, compute on `device`; at rest their parameters are the tensors in main memory.

    The layers are in the order in which they follow each other: one that comes out of turn is waited for. At most two are on the device,
    and none behind the last or behind an exception. What copying raises is raised by the layer that needed it. For one thread at a time.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parameters = [list(layer.parameters()) for layer in layers]
        for parameter in (parameter for own in self.parameters for parameter in own):
            if self.stream is not None and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()
        self.host = [[parameter.data for parameter in own] for own in self.parameters]
        self.copier = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self.coming: tuple[int, Future[Copies]] | None = None
        self.used: list[Tensor] = []  # the place of the layer that computes, or was the last to
        for index, layer in enumerate(layers):
            for buffer in layer.buffers():
                buffer.data = buffer.data.to(device)
            vars(layer)["forward"] = self.computing(index, layer.forward)

    def computing(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def here(*args: Any, **kwargs: Any) -> Any:
            with self.on_device(index):
                return forward(*args, **kwargs)

        return here

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Within it the layer's weights are on the device, and the next layer's on their way."""
        try:
            if self.coming is None or self.coming[0] != index:
                self.arrived()
                self.send(index)
            here = self.arrived()
            self.point(index, here)
            if index + 1 < len(self.parameters):
                self.send(index + 1)
            self.used = here
            del here  # or the traceback of what is raised would keep it
            yield
        except BaseException:
            self.arrived()
            raise
        finally:
            self.point(index, self.host[index])
            if self.coming is None:
                self.used = []

    def point(self, index: int, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters[index], tensors, strict=True):
            parameter.data = tensor

    def send(self, index: int) -> None:
        """Have a layer's weights copied to where those of the layer before were, if they fit there.

        A new place is taken by the thread and in the stream that compute, and the copy begins once that stream has come this far: nothing
        is written to that something still reads.
        """
        host, place = self.host[index], self.used
        self.used = []
        if [(tensor.shape, tensor.dtype) for tensor in place] != [(tensor.shape, tensor.dtype) for tensor in host]:
            with torch.inference_mode(False):  # the thread that copies writes to it outside of that mode
                place = [torch.empty_like(tensor, device=self.device) for tensor in host]
        free = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        self.coming = index, self.copier.submit(self.copy, index, place, free)

    def copy(self, index: int, place: list[Tensor], free: torch.cuda.Event | None) -> Copies:
        with torch.cuda.stream(self.stream):  # none: does nothing
            if self.stream is not None and free is not None:
                self.stream.wait_event(free)
            for tensor, source in zip(place, self.host[index], strict=True):
                tensor.copy_(source, non_blocking=True)
            return place, None if self.stream is None else self.stream.record_event()

    def arrived(self) -> list[Tensor]:
        """What was sent, from now on in order with what computes; empty where nothing was."""
        if self.coming is None:
            return []
        (_, copies), self.coming = self.coming, None
        tensors, done = copies.result()
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return tensors
