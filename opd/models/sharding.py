"""Weights, gradients and optimizer state that are sharded over processes: gathered while something computes with them, sharded again
behind it.

At rest a process holds its shards. Sampling, evaluation and the teacher's scores wait for no other process: `whole` gathers all weights for
them. FSDP2 (`opd.models.fsdp2`) and DeepSpeed's ZeRO-2 and ZeRO-3 (`opd.models.zero`) do that in their own ways; which one it is shows
in the policy that they have prepared. What is here does nothing where nothing is sharded.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from opd.models import fsdp2
from opd.models.passes import nothing
from opd.models.tensors import Held, Part, full, gathered, like, put, write_full
from opd.models.zero import ZeroOptimizer, ZeroPolicy, together, weight

__all__ = [
    "Held",
    "Part",
    "ZeroOptimizer",
    "ZeroPolicy",
    "at_rest",
    "backward",
    "full",
    "gathered",
    "idle",
    "is_sharded",
    "like",
    "put",
    "strategy",
    "together",
    "weight",
    "whole",
    "write_full",
]


def strategy(policy: nn.Module) -> str | None:
    """The name of what shards it; None where nothing does."""
    if isinstance(policy, ZeroPolicy):
        return f"ZeRO-{policy.stage}"
    return "FSDP2" if fsdp2.units(policy) else None


def is_sharded(policy: nn.Module) -> bool:
    return strategy(policy) is not None


def at_rest(policy: nn.Module) -> int:
    """How many parameters this process holds while nothing computes with them."""
    return policy.at_rest() if isinstance(policy, ZeroPolicy) else fsdp2.at_rest(policy)


def whole(model: nn.Module) -> AbstractContextManager[None]:
    """Within it each process holds all weights, and computing with them waits for no other. All processes have to enter."""
    if isinstance(model, ZeroPolicy):
        return model.whole()
    return fsdp2.whole(model) if fsdp2.units(model) else nullcontext()


def backward(policy: nn.Module, loss: Tensor, last: bool) -> None:
    """A pass whose gradients are added to those so far, and with sharded gradients to those of the other processes.

    last: of the update.
    """
    if isinstance(policy, ZeroPolicy):
        policy.backward(loss, last)
    else:
        loss.backward()


def idle(policy: nn.Module, last: bool) -> None:
    """A forward and a backward pass of a token that counts nothing. last: as in `backward`."""
    backward(policy, nothing(policy), last)
