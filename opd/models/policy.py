"""How student and teacher are run: final hidden states, the output head, adapters, and the student as a module to train.

Shapes: `B` sequences, `T` positions, `N` kept completion tokens, `V` vocabulary, `H` hidden.
"""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.config.schema import LoraConfig
from opd.data.rollouts import Inputs
from opd.errors import ConfigError
from opd.objective import Head

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def prepare_student(model: PreTrainedModel, device: torch.device, bf16: bool = False, frozen: bool = False) -> PreTrainedModel:
    """On the device, in eval mode for good: dropout would make sampling and scoring disagree.

    bf16: it will compute under autocast. frozen: adapters will be trained in its place. Weights that are trained are float32; frozen ones
    are held in what they compute in.
    """
    dtype = torch.bfloat16 if frozen and bf16 else torch.float32
    nn.Module.to(model, device=device, dtype=dtype).eval().requires_grad_(not frozen)
    with autocast(device, bf16):
        check_head(model, "model")
    return model


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> Any:
    """Low-rank adapters in the model's layers, in place, which alone are trained from here on. Returns peft's handle on them."""
    try:
        import peft
    except ImportError:
        raise ConfigError(f"lora.rank={config.rank} needs the package peft: pip install 'opd[lora]'") from None
    targets = config.targets[0] if config.targets == ["all-linear"] else list(config.targets)
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        adapters = peft.get_peft_model(model, settings).base_model
    except ValueError as error:
        raise ConfigError(f"lora.targets={config.targets}: {str(error).splitlines()[0]}") from None
    model.eval()
    return adapters


@contextmanager
def without(adapters: Any | None) -> Iterator[None]:
    """The model as it was before its adapters; does nothing for None."""
    if adapters is None:
        yield
        return
    adapters.disable_adapter_layers()
    try:
        yield
    finally:
        adapters.enable_adapter_layers()


def prepare_teacher(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """On the device, frozen, in eval mode."""
    nn.Module.to(model, device).eval().requires_grad_(False)
    check_head(model, "teacher")
    return model


def output_head(model: PreTrainedModel, size: int | None = None, rows: int | None = None, dtype: torch.dtype | None = None) -> Head:
    """The model's output layer with the scale and soft cap of the architectures that have them. size, rows, dtype: as in `Head`."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    values = config.to_dict()
    scale = values.get("logit_scale") or 1.0  # Cohere
    if values.get("logits_scaling"):  # Granite
        scale = scale / values["logits_scaling"]
    return Head(layer.weight, layer.bias, size, scale, values.get("final_logit_softcapping"), rows, dtype)  # Gemma 2 soft-caps


def last_hidden(layers: Any, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Final hidden states (B, T, H) of a model's layers: what the output head is applied to."""
    hidden_BTH: Tensor = layers(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
    return hidden_BTH


def completion_hidden(layers: Any, inputs: Inputs) -> Tensor:
    """The final hidden states (N, H) that predict the kept tokens."""
    return last_hidden(layers, inputs.ids_BT, inputs.positions_BT).flatten(0, 1)[inputs.kept_N]


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers, which hold nearly all weights. Embedding, last norm and output head stay out: the objective reads the head itself."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def uses_packing(model: PreTrainedModel, packing: bool | None) -> bool:
    """Whether sequences go end to end: as configured, or where the attention skips what lies between sequences instead of masking it."""
    attention = model.config._attn_implementation or ""
    return packing if packing is not None else attention.startswith("flash_attention")


def padding_limit(device: torch.device) -> int:
    """Tokens of padding that a micro-batch may hold: about what another one would cost, which reads all weights and starts all kernels."""
    return 2048 if device.type == "cuda" else 128


@torch.no_grad()
def check_head(model: PreTrainedModel, role: str) -> None:
    """Refuse an architecture whose logits are not what `output_head` makes of its hidden states."""
    ids_BT = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    expected = model(input_ids=ids_BT, use_cache=False).logits.float()
    found = output_head(model).logits(last_hidden(model.base_model, ids_BT).flatten(0, 1))[None]
    rounded = model.dtype == torch.bfloat16 or torch.is_autocast_enabled(model.device.type)
    if not torch.allclose(found, expected, atol=1e-3 + 3e-2 * float(expected.abs().max()) * rounded, rtol=1e-3):
        raise ConfigError(f"{role}: {type(model).__name__} makes its logits in a way that opd does not know; it cannot be scored in chunks")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process held so far, on its GPU, or of main memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_memory(device: torch.device) -> None:
    """Give back the memory that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give back the host's memory that nothing uses: glibc keeps it, in pieces that do not fit what comes next."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def tied_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding, if it is the output head as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding if isinstance(embedding, nn.Embedding) and embedding.weight is head.weight else None


def give_back_at_once() -> None:
    """From here on glibc gives back what is freed, from 1 MiB on: layers that are gathered and let go of in turn leave holes otherwise."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 2**20)


class Policy(nn.Module):
    """The student as the trainer calls it. Everything that needs gradients happens inside `forward`, where FSDP sees it.

    size, rows: as in `Head`. checkpointing: recompute activations in the backward pass. compiled: layers through torch.compile. sharded:
    weights are to be. On a CPU a tied embedding gives the gradient of the rows that it looked up alone: with the head's in place
    (`Head.folds`) these are added to it, and no second (V, H) is made. On a GPU their sum would depend on chance; neither torch.compile nor
    FSDP knows such gradients.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        size: int,
        rows: int | None = None,
        checkpointing: bool = False,
        compiled: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.rows = rows
        self.bf16 = False  # Accelerate sees to it, but not for FSDP
        self._no_split_modules = model._no_split_modules  # the layers that FSDP takes one by one
        self.checkpointed: list[nn.Module] = []
        if checkpointing:
            self.checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            for layer in self.checkpointed:
                vars(layer).update(gradient_checkpointing=True, _gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
        by_rows = model.device.type == "cpu" and not compiled and not sharded
        self.by_rows = (tied_embedding(model) if by_rows else None,)
        # In a tuple, or they would be registered as a second copy of the parameters.
        self.layers = (torch.compile(model.base_model, dynamic=True) if compiled else model.base_model,)

    def forward(self, inputs: Inputs, loss: Callable[[Tensor, Head], Any]) -> Any:
        """`loss` of the hidden states (N, H) at the kept positions and the output head."""
        if not self.bf16:
            return self.apply_loss(inputs, loss)
        with torch.autocast(inputs.ids_BT.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return self.apply_loss(inputs, loss)

    def apply_loss(self, inputs: Inputs, loss: Callable[[Tensor, Head], Any]) -> Any:
        with self.recomputing(), self.sparse():
            hidden_NH = completion_hidden(self.layers[0], inputs)
        return loss(hidden_NH, replace(output_head(self.model, self.size, self.rows), folds=self.by_rows[0] is not None))

    @contextmanager
    def sparse(self) -> Iterator[None]:
        """The module itself is as it was afterwards: it may be the caller's own."""
        (embedding,) = self.by_rows
        if embedding is not None:
            embedding.sparse = True
        try:
            yield
        finally:
            if embedding is not None:
                embedding.sparse = False

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Layers checkpoint only in training mode; what is inside them, dropout above all, stays in eval mode."""
        for layer in self.checkpointed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self.checkpointed:
                layer.training = False
