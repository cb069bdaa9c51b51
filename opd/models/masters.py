"""Float32 master weights of a module that computes in bf16.

The optimizer updates the masters. Gradients, bf16 from each backward pass, are added to the masters' in float32; after a step the module's
weights are copied from the masters in place, so that their addresses stay. Bytes per parameter: 2 + 4 (weights), 4 (gradient), 8 (AdamW).
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class MasterWeights:
    """Masters of the module's trainable parameters, which become bf16, as do its frozen ones until `restore_module`.

    Args:
        module: The module, with the weights that the masters start from.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: list[str] = []
        self.weights: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        self.hooks: list[RemovableHandle] = []
        self.frozen: list[tuple[nn.Parameter, Tensor]] = []  # as they were, in main memory
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                master = nn.Parameter(weight.detach().float().clone())
                self.names.append(name)
                self.weights.append(weight)
                self.masters.append(master)
                self.hooks.append(weight.register_post_accumulate_grad_hook(partial(add_gradient, master)))
            elif weight.dtype == torch.float32:
                self.frozen.append((weight, weight.detach().cpu()))
            if weight.is_floating_point():  # not quantised ones, which are integers
                weight.data = weight.data.to(torch.bfloat16)  # buffers, such as rotary frequencies, keep their dtype

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return zip(self.names, self.masters, strict=True)

    @torch.no_grad()
    def update_module(self) -> None:
        """Copy the masters to the module's weights."""
        torch._foreach_copy_([weight.data for weight in self.weights], [master.data for master in self.masters])

    def restore_module(self) -> None:
        """Let the module have the masters as its weights, in float32, and its frozen weights unrounded."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data = master.data
        for weight, original in self.frozen:
            weight.data = original.to(weight.device)
        for hook in self.hooks:
            hook.remove()


def add_gradient(master: nn.Parameter, weight: Tensor) -> None:
    """Add a weight's gradient to its master's in float32, and free it."""
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad.add_(weight.grad)
    weight.grad = None
