"""What the processes of a run decide together, so that none waits for another that has gone elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from opd import signals
from opd.errors import OpdError, Preempted
from opd.objective.means import Means

T = TypeVar("T")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process. All processes have to ask."""
    if accelerator.num_processes == 1:
        return flag
    found = accelerator.reduce(torch.tensor([float(flag)], device=accelerator.device), "sum")
    return bool(float(found) > 0)


def stop_all_processes(accelerator: Accelerator) -> None:
    """Raises `Preempted` in all processes once any of them was asked to stop."""
    if any_process(accelerator, signals.requested()):
        signals.check()
        raise Preempted("another process of the run was asked to stop")


def run_stoppable(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work`, which watches for signals and waits for no other process, returns; or `Preempted` in all processes."""
    done: list[T] = []
    try:
        done.append(work())
    except Preempted:
        assert signals.requested()
    stop_all_processes(accelerator)
    return done[0]


def on_main_process(accelerator: Accelerator, find: Callable[[], T]) -> T:
    """What `find` returns in the main process, in all of them; or the `OpdError` that it raises there."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find()]
        except OpdError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], OpdError):
        raise found[0]
    result: T = found[0]
    return result


def is_peer_failure(error: Exception) -> bool:
    """Whether it was raised because another process did not answer any more. Gloo has no class of its own for that."""
    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    return gloo or isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError)


def global_sum(accelerator: Accelerator, value: float) -> float:
    """The value added up over all processes."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=accelerator.device)
    return float(accelerator.reduce(tensor, "sum"))


def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Let all processes have the sum of their gradients. One that none of them has stays None: experts that no token was sent to."""
    if not parameters:
        return
    has_one = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=parameters[0].device)
    torch.distributed.all_reduce(has_one, torch.distributed.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, has_one.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)


def most(accelerator: Accelerator, own: int) -> int:
    """The largest of all processes' numbers."""
    if accelerator.num_processes == 1:
        return own
    return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())


def all_reduce_means(accelerator: Accelerator, means: Means) -> Means:
    """Sums and counts over all processes, which have the same names."""
    if accelerator.num_processes == 1:
        return means
    return means.from_tensor(accelerator.reduce(means.to_tensor(accelerator.device), "sum"))


def quantile(accelerator: Accelerator, own: Tensor, q: float) -> float:
    """The quantile of all processes' values."""
    own = own.float()
    if accelerator.num_processes > 1:
        own = accelerator.gather(accelerator.pad_across_processes(own, pad_index=float("nan")))
    return float(own.nanquantile(q))


def in_main_process() -> bool:
    """Whether this process speaks and writes for all of them."""
    first: bool = PartialState().is_main_process
    return first
