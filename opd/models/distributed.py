"""The processes of a run: collective decisions, and the strategy by which processes share gradients and weights.

`Strategy` is one process, or several with all weights each; `Fsdp2` shards weights, gradients and optimizer state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from opd import signals
from opd.data.rollouts import Inputs
from opd.errors import EngineError, OpdError, Preempted, SamplerError
from opd.models.masters import MasterWeights
from opd.models.policy import Policy

T = TypeVar("T")


def shards_weights(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type is DistributedType.FSDP)


# Collective decisions. Every process has to call these.


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    return global_sum(accelerator, float(flag)) > 0


def global_sum(accelerator: Accelerator, value: float) -> float:
    """Return the sum of the value over all processes."""
    if accelerator.num_processes == 1:
        return value
    return float(accelerator.reduce(torch.tensor([value], dtype=torch.float64, device=accelerator.device), "sum"))


def global_quantile(accelerator: Accelerator, values: Tensor, q: float) -> float:
    """Return the quantile of the values of all processes."""
    values = values.float()
    if accelerator.num_processes > 1:
        values = accelerator.gather(accelerator.pad_across_processes(values, pad_index=float("nan")))
    return float(values.nanquantile(q))


def on_main_process(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` in the main process; return its result, or raise its `OpdError`, in all of them."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except OpdError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], OpdError):
        raise outcome[0]
    result: T = outcome[0]
    return result


def in_main_process() -> bool:
    is_main: bool = PartialState().is_main_process
    return is_main


def stop_all_processes(accelerator: Accelerator) -> None:
    """Raise `Preempted` in all processes once any of them was asked to stop."""
    if any_process(accelerator, signals.requested()):
        signals.check()
        raise Preempted("another process of the run was asked to stop")


def run_stoppable(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Return the result of `work`, which lets an engine sample, watches for signals and uses no collectives.

    Raises in all processes:
        Preempted: One was asked to stop.
        SamplerError: The engine of one failed.
    """
    results: list[T] = []
    failure: OpdError | None = None
    try:
        results.append(work())
    except Preempted:
        assert signals.requested()
    except EngineError as error:
        failure = SamplerError(str(error))
    stop_all_processes(accelerator)
    if any_process(accelerator, failure is not None):
        share_failure(accelerator, failure)
    return results[0]


def share_failure(accelerator: Accelerator, failure: OpdError | None) -> None:
    """Raise the first process's failure in all processes; does nothing where none has one."""
    failures = [failure] if accelerator.num_processes == 1 else gather_object([failure])
    for error in failures:
        if error is not None:
            raise error


def is_peer_failure(error: Exception) -> bool:
    """Return whether the error says that another process stopped answering. Gloo has no exception class for that."""
    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)
    return gloo or isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError)


# Strategies.


class Strategy:
    """One process, or several that hold all weights each and sum their gradients once a step.

    Args:
        accelerator: Accelerate's handle.
        policy: The student, prepared by `prepare`.
        optimizer: Its optimizer, prepared too.
        masters: Float32 weights that the optimizer updates, where the student computes in bf16.
    """

    name = ""
    is_sharded = False

    def __init__(self, accelerator: Accelerator, policy: nn.Module, optimizer: Optimizer, masters: MasterWeights | None = None) -> None:
        self.accelerator = accelerator
        self.policy = policy
        self.optimizer = optimizer
        self.masters = masters

    def trained(self) -> list[Tensor]:
        """Return the parameters that the optimizer updates."""
        if self.masters is not None:
            return list(self.masters.masters)
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def step(self) -> None:
        """Take an optimizer step."""
        self.optimizer.step()
        self.update_module()

    def update_module(self) -> None:
        """Give the module the weights of its masters, where it has some."""
        if self.masters is not None:
            self.masters.update_module()

    def gathered_weights(self) -> AbstractContextManager[None]:
        """Hold all weights in every process for the block, so that computing with them needs no collectives. All processes enter."""
        return nullcontext()

    def passes(self, micro_batches: int) -> int:
        """Return how many backward passes this process makes for so many micro-batches."""
        return micro_batches

    def empty_pass(self) -> None:
        """Take part in a backward pass of the other processes without adding to any gradient."""

    def clip_gradients(self, max_norm: float) -> float:
        """Sum gradients over processes, clip them to the norm, and return the norm before clipping."""
        if self.accelerator.num_processes > 1:
            all_reduce_gradients(self.trained())
        return float(full_tensor(self.accelerator.clip_grad_norm_(self.trained(), max_norm)))

    def held_parameters(self) -> int:
        """Return how many parameters this process holds between computations."""
        parameters = self.policy.parameters()
        return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in parameters)


class Fsdp2(Strategy):
    """Weights, gradients and optimizer state sharded over processes, layer by layer.

    Gradients are reduced into the shards during each backward pass, so all processes make equally many passes, and none can wait for one
    that runs out of memory.
    """

    name = "FSDP2"
    is_sharded = True

    def __init__(self, accelerator: Accelerator, policy: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(accelerator, policy, optimizer)
        root = fsdp_units(policy)[0]
        root.set_reshard_after_backward(True)
        root.set_reduce_scatter_unused_params(True)  # MoE: an expert that is unused on this rank may be used on another
        for unit in fsdp_units(policy):
            unit.set_force_sum_reduction_for_comms(True)  # losses are divided by one global token count; gloo has no mean either
            unit.set_gradient_divide_factor(1.0)
        # The first forward pass decides which module is FSDP's root: it has to be the whole policy.
        with torch.no_grad(), self.gathered_weights():
            policy(one_token(policy), lambda hidden_NH, head: None)

    def gathered_weights(self) -> AbstractContextManager[None]:
        return unsharded(self.policy)

    def passes(self, micro_batches: int) -> int:
        return int(self.accelerator.gather(torch.tensor([micro_batches], device=self.accelerator.device)).max())

    def empty_pass(self) -> None:
        loss = self.policy(one_token(self.policy), lambda hidden_NH, head: hidden_NH.sum() * 0.0 + head.weight_VH[0, 0] * 0.0)
        loss.backward()

    def clip_gradients(self, max_norm: float) -> float:
        return float(full_tensor(self.accelerator.clip_grad_norm_(self.policy.parameters(), max_norm)))


def prepare(accelerator: Accelerator, policy: Policy, optimizer: Optimizer, masters: MasterWeights | None = None) -> Strategy:
    """Prepare student and optimizer for the processes of the run and return the strategy."""
    if shards_weights(accelerator):
        return Fsdp2(accelerator, *accelerator.prepare(policy, optimizer))
    # Not wrapped in DDP, which would hold a second copy of all gradients: gradients are summed once a step.
    module = accelerator.prepare_model(policy, evaluation_mode=True)
    if accelerator.num_processes > 1:
        for parameter in (*module.parameters(), *(masters.masters if masters is not None else ())):
            broadcast(parameter.data)  # modules that a caller passes in may differ
    return Strategy(accelerator, module, accelerator.prepare_optimizer(optimizer), masters)


def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Sum the gradients over all processes. One that no process has stays None: experts that no token was routed to."""
    if not parameters:
        return
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=parameters[0].device)
    torch.distributed.all_reduce(has_gradient, torch.distributed.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, has_gradient.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)


# Sharded modules and tensors.


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that are gathered one by one, the root first; none where nothing is sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard(layers: Iterable[nn.Module]) -> None:
    """Shard each of the layers, which are never trained, over all processes."""
    for layer in layers:
        fully_shard(layer)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights of the model for the block; all processes enter. Does nothing for a model that is not sharded."""
    units = fsdp_units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        for layer in units[1:]:  # not the root, which holds the output head: the loss reads it after the layers
            layer.set_reshard_after_forward(True, recurse=False)


def one_token(policy: nn.Module) -> Inputs:
    device = next(policy.parameters()).device
    return Inputs(torch.zeros((1, 1), dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor gathered from its shards, in every process; one that is not sharded is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return all tensors in full, gathered one after the other, sharded ones on the CPU; empty in processes that do not `keep` them."""
    gathered = {}
    for name, tensor in tensors.items():
        value = full_tensor(tensor)
        if keep:
            gathered[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return gathered


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a full tensor sharded as `model` is; needs no collectives."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
