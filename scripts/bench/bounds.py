"""Upper bounds of the device, measured with plain operations."""

import time
from collections.abc import Callable

import torch


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def fastest(work: Callable[[], object], device: str, times: int = 7) -> float:
    """Return the seconds of the fastest of several calls."""
    seconds = []
    for _ in range(times):
        synchronise(device)
        begin = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def bandwidth(device: str) -> float:
    """Return the bytes a second that a sum reads; decoding reads all weights for each token."""
    elements = 2**26 if device == "cpu" else 2**30
    values = torch.ones(elements, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return values.nbytes / fastest(values.sum, device)


def matmul(device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a square matrix product."""
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: left @ right, device)
