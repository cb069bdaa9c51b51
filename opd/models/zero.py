"""DeepSpeed's ZeRO-2, whose gradients and optimizer are sharded, and ZeRO-3, whose weights are as well.

DeepSpeed reduces gradients into the shards during each backward pass, and with ZeRO-3 gathers each module's weights for its forward and its
backward pass. All processes have to make equally many passes, and one that runs out of memory in the middle of one cannot be waited for.
Besides the weights that are computed with DeepSpeed keeps a copy of its own, sharded, which it updates.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from opd.models.tensors import Part

MISSING = "distributed_type: DEEPSPEED needs the package deepspeed: pip install 'opd[deepspeed]'"
MOMENTS = ("exp_avg", "exp_avg_sq")
LIVE = 10**9  # weights that ZeRO-3 keeps gathered through a pass at most, unless `stage3_max_live_parameters` says otherwise
BUCKET = 5 * 10**7  # gradients that are reduced at a time; DeepSpeed's own 5e8 are a buffer of 2 GB


def is_installed() -> bool:
    return find_spec("deepspeed") is not None


def begin(device: torch.device) -> None:
    """Before Accelerate: have DeepSpeed compute on the device and compile nothing, and let no model be sharded while it is loaded."""
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "false"
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled; gloo does the same
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # an update that is left out is told of otherwise
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def check_settings(settings: Mapping[str, Any]) -> str | None:
    """What of DeepSpeed's config does not work here, with the remedy; None where all does."""
    zero = settings["zero_optimization"]
    if zero.get("stage") not in (2, 3):
        return f"zero_stage: {zero.get('stage')} is not supported; take 2 or 3, or distributed_type: MULTI_GPU (DDP)"
    for what in ("optimizer", "param"):
        if (zero.get(f"offload_{what}") or {}).get("device", "none") != "none":
            return f"offload_{what}_device: {zero[f'offload_{what}']['device']} is not supported; set it to none"
    for dtype in ("fp16", "bf16"):
        if settings.get(dtype, {}).get("enabled", False) not in (False, "auto"):
            return f"{dtype} of DeepSpeed is not supported: its weights would be rounded; leave it out and take model.dtype=bfloat16"
    for what in ("optimizer", "scheduler"):
        if what in settings:
            return f"DeepSpeed's {what} is not supported: leave it out of its config; optim.* has one"
    return None


def configure(settings: dict[str, Any], max_grad_norm: float) -> None:
    """Let DeepSpeed clip as opd does, hold weights in float32, and leave it to opd when an update is complete."""
    settings.update(
        train_batch_size="auto",
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=max_grad_norm,
        fp16={"enabled": False},
        bf16={"enabled": False},
    )
    settings["zero_optimization"] = zero = {name: value for name, value in settings["zero_optimization"].items() if value != "auto"}
    zero.setdefault("reduce_bucket_size", BUCKET)
    zero["memory_efficient_linear"] = False  # would take the place of torch's own in all of the process, and rounds otherwise in bf16


class ZeroPolicy(nn.Module):
    """The student as DeepSpeed's engine calls it."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine
        self.stage: int = engine.zero_optimization_stage()
        self.is_whole = self.stage < 3

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `opd.models.sharding.backward`. DeepSpeed divides gradients by the number of processes."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * torch.distributed.get_world_size())

    def at_rest(self) -> int:
        parameters: list[Any] = list(self.parameters())
        return sum(int(parameter.numel() if self.stage < 3 else parameter.ds_tensor.numel()) for parameter in parameters)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As `opd.models.sharding.whole`. What is whole stays so in a `whole` within it."""
        if self.is_whole:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        self.is_whole = True
        try:
            with GatheredParameters(list(self.parameters())), self.without_hooks():
                yield
        finally:
            self.is_whole = False

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Within it the student's modules neither gather weights nor let go of them. DeepSpeed's `unwrap_model_for_generation`, which does
        the same, does not put the hooks back after an error.
        """
        hooked = self.engine.optimizer.parameter_offload
        for hook in (*hooked.forward_hooks, *hooked.backward_hooks):
            hook.remove()
        hooked.forward_hooks, hooked.backward_hooks = [], []
        try:
            yield
        finally:
            hooked._register_deepspeed_module(hooked.module)


class ZeroOptimizer(Optimizer):
    """AdamW on the parameters of `groups`, as DeepSpeed steps it. Its state is that of AdamW without sharding, in `Part`s."""

    def __init__(self, groups: list[dict[str, Any]], engine: Any) -> None:
        super().__init__(groups, {})
        self.engine = engine
        self.zero: Any = engine.optimizer
        self.inner: Optimizer = self.zero.optimizer  # on each process's share of the weights, flat
        self.stage: int = engine.zero_optimization_stage()
        self.begin_state()

    @property
    def parameters(self) -> list[Any]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip and step, unless the gradients of any process are not finite; they are gone in either case."""
        for own, theirs in zip(self.param_groups, self.zero.param_groups, strict=True):
            theirs["lr"] = own["lr"]
        self.engine.step()

    @property
    def norm(self) -> float:
        """That of the gradients at the last step, before they were clipped; infinite where they were not finite."""
        return math.inf if self.zero.overflow else float(self.engine.get_global_grad_norm())

    def spoil(self) -> None:
        """Let the next step be left out: that is how DeepSpeed forgets gradients."""
        from deepspeed.utils import safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

        parameter = self.parameters[0]
        if self.stage < 3:
            safe_set_full_grad(parameter, torch.full_like(parameter, math.nan))
        else:
            safe_set_local_grad(parameter, torch.full_like(safe_get_local_grad(parameter), math.nan))

    def state_dict(self) -> dict[str, Any]:
        step = next(iter(self.inner.state.values()))["step"]
        state = {
            number: {"step": step.clone(), **{name: self.moment(parameter, name) for name in MOMENTS}}
            for number, parameter in enumerate(self.parameters)
        }
        return {"state": state, "param_groups": [{**group, "params": []} for group in self.param_groups]}

    def moment(self, parameter: Any, name: str) -> Part:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state

        def put(value: Tensor) -> None:
            value = value.to(parameter.device)
            if self.stage < 3:
                safe_set_full_optimizer_state(parameter, value, name)
            else:  # what sets a full one does not know that the last process's share may be shorter
                safe_set_local_optimizer_state(parameter, own_share(value, parameter.ds_tensor.numel()), name)

        return Part(full_shape(parameter), torch.float32, partial(safe_get_full_optimizer_state, parameter, name), put)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state of AdamW without sharding, every tensor in full; all processes together, once they have the weights that go with it."""
        self.zero.refresh_fp32_params()
        state = state_dict["state"]
        step = max((float(entries["step"]) for entries in state.values()), default=0.0)
        for entries in self.inner.state.values():
            entries["step"].fill_(step)
        for number, parameter in enumerate(self.parameters):
            for name in MOMENTS:  # a weight that never had a gradient has none
                found = state[number][name] if number in state else torch.zeros(full_shape(parameter))
                self.moment(parameter, name).put(found)

    def begin_state(self) -> None:
        """What AdamW makes at its first step, after which DeepSpeed would find that of the first of its groups alone."""
        shares = self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat
        for share in shares:
            self.inner.state[share] = {
                "step": torch.zeros((), device=share.device),
                **{name: torch.zeros_like(share, requires_grad=False) for name in MOMENTS},
            }
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()


def full_shape(parameter: Any) -> torch.Size:
    """ZeRO-3 marks the parameters that it shards by `ds_…` attributes."""
    return torch.Size(parameter.ds_shape) if hasattr(parameter, "ds_id") else parameter.shape


def own_share(value: Tensor, size: int) -> Tensor:
    """This process's `size` numbers of a full tensor, filled up with zeros."""
    padded = F.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size)


def weight(parameter: Any) -> Tensor | Part:
    """The parameter, as `Part` where ZeRO-3 shards it, else detached."""
    if not hasattr(parameter, "ds_id"):
        detached: Tensor = parameter.detach()
        return detached
    from deepspeed.runtime.zero import GatheredParameters

    def assemble() -> Tensor:
        with GatheredParameters([parameter]):
            copy: Tensor = parameter.detach().clone()
        return copy

    def put(value: Tensor) -> None:
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    return Part(full_shape(parameter), parameter.dtype, assemble, put)


@contextmanager
def together(parameters: Sequence[Any]) -> Iterator[None]:
    """Within it, which all processes enter together, those of the parameters that ZeRO-3 shards are whole."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded):
        yield
