"""What the device can do at most, measured by the plainest operations that do it."""

import time
from collections.abc import Callable

import torch


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def quickest(work: Callable[[], object], device: str, times: int = 7) -> float:
    """Seconds of the quickest of several calls."""
    taken = []
    for _ in range(times):
        synchronise(device)
        begin = time.perf_counter()
        work()
        synchronise(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def bandwidth(device: str) -> float:
    """Bytes a second that a sum reads: decoding reads all weights for each token it writes."""
    elements = 2**26 if device == "cpu" else 2**30
    values = torch.ones(elements, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    return values.nbytes / quickest(values.sum, device)


def matmul(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product."""
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / quickest(lambda: left @ right, device)
