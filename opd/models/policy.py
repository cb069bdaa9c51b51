"""How student and teacher are run: final hidden states, the output head, adapters, and the student as a module to train.

Shapes: `B` sequences, `T` positions, `N` trained tokens, `V` vocabulary, `H` hidden.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.config.options import LoraConfig
from opd.data.rollouts import Inputs
from opd.errors import ConfigError
from opd.models.device import autocast
from opd.objective import Head

# What models that cannot do something raise. Memory that runs out is a RuntimeError too.
MODEL_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether the model's matrices are stored in 8 or 4 bits."""
    return hasattr(model.config, "quantization_config")


@contextmanager
def refusing(role: str, model: PreTrainedModel, what: str, remedy: str) -> Iterator[None]:
    """Turn an error of the model's code in the block into a `ConfigError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{role}: {type(model).__name__} {what}: {type(error).__name__}: {reason}; {remedy}") from error


def prepare_student(model: PreTrainedModel, device: torch.device, bf16: bool = False, frozen: bool = False) -> PreTrainedModel:
    """Move the student to the device, in eval mode for good: dropout would make sampling and scoring disagree.

    Args:
        bf16: Whether it computes in bf16.
        frozen: Whether adapters are trained instead of its weights, which are then frozen and have the compute dtype. Without, weights are
            float32, and those with `requires_grad=False` stay so.
    """
    dtype = torch.bfloat16 if frozen and bf16 else torch.float32
    for weight in filter(torch.is_floating_point, model.parameters()):  # before the move: a device may have no room for float32
        weight.data = weight.data.to(dtype)
    for buffer in filter(torch.is_floating_point, model.buffers()):  # such as rotary frequencies, which bf16 would round
        buffer.data = buffer.data.float()
    nn.Module.to(model, device).eval()
    if frozen:
        model.requires_grad_(False)
    with autocast(device, bf16):
        check_head(model, "model")
    return model


def prepare_teacher(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move the teacher to the device, frozen, in eval mode."""
    nn.Module.to(model, device).eval().requires_grad_(False)
    check_head(model, "teacher")
    return model


def fuse_layers(model: PreTrainedModel) -> bool:
    """Replace norms, rotary embedding and SwiGLU of a model on a GPU by Liger's kernels; return whether that was done.

    It is done where the package liger-kernel is installed and knows the architecture. Other models of the family stay as they are, but for
    the rotary embedding of those on a GPU.
    """
    if model.device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import monkey_patch

    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    with keeping_family(model):
        monkey_patch._apply_liger_kernel_to_instance(
            model=model, rope=True, rms_norm=True, swiglu=True, geglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    return True


@contextmanager
def keeping_family(model: PreTrainedModel) -> Iterator[None]:
    """Undo what the block replaces in the files of the model's classes, which all models of the family in this process share.

    Liger replaces classes, and the rotary embedding, which is a function. The latter stays replaced for tensors on a GPU. With kernels in
    them a teacher in main memory fails; a copy without storage, on which caches are measured, has them read at address 0, and no later
    operation on the GPU succeeds.
    """
    files = [sys.modules[name] for name in {type(part).__module__ for part in model.modules()}]
    before = [(file, dict(vars(file))) for file in files]
    try:
        yield
    finally:
        for file, values in before:
            for name, value in values.items():
                replaced = getattr(file, name)
                if replaced is not value:
                    setattr(file, name, value if isinstance(value, type) else fused_on_gpu(replaced, value))


def fused_on_gpu(fused: Any, plain: Any) -> Any:
    """Return a function that is `fused` for a first argument on a GPU, else `plain`, or what that one is for others."""
    plain = getattr(plain, "plain", plain)

    def either(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if first.is_cuda else plain)(first, *args, **kwargs)

    vars(either)["plain"] = plain
    return either


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> Any:
    """Add trainable low-rank adapters to the model in place and return peft's handle on them."""
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
def adapters_disabled(adapters: Any | None) -> Iterator[None]:
    """Turn the adapters off for the block; does nothing for None."""
    if adapters is None:
        yield
        return
    adapters.disable_adapter_layers()
    try:
        yield
    finally:
        adapters.enable_adapter_layers()


def output_head(
    model: PreTrainedModel,
    size: int | None = None,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    masked: Tensor | None = None,
) -> Head:
    """Return the model's output layer, with the scale and soft cap of the architectures that have them.

    Args:
        size, rows, dtype, masked: As in `Head`.
    """
    layer = model.get_output_embeddings()
    values = model.config.get_text_config().to_dict()
    scale = values.get("logit_scale") or values.get("lm_head_multiplier") or 1.0  # Cohere; Falcon-H1
    if values.get("logits_scaling"):  # Granite
        scale = scale / values["logits_scaling"]
    cap = values.get("final_logit_softcapping") or values.get("logits_soft_cap")  # Gemma 2; RecurrentGemma
    masked = None if masked is None else masked.to(layer.weight.device)
    return Head(layer.weight, layer.bias, size, scale, cap, rows, dtype, masked=masked)


@torch.no_grad()
def check_head(model: PreTrainedModel, role: str) -> None:
    """Raise `ConfigError` for an architecture whose logits are not `output_head` of its final hidden states, or depend on later tokens."""
    ids_BT = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with refusing(role, model, "cannot be run", "use another architecture"):
        expected = model(input_ids=ids_BT, use_cache=False).logits.float()
        computed = output_head(model).logits(last_hidden(model.base_model, ids_BT).flatten(0, 1))[None]
    if not expected.isfinite().all():
        raise ConfigError(f"{role}: the logits of {type(model).__name__} are not finite; its weights are damaged")
    rounded = model.dtype == torch.bfloat16 or torch.is_autocast_enabled(model.device.type) or is_quantized(model)
    if not torch.allclose(computed, expected, atol=1e-3 + 3e-2 * float(expected.abs().max()) * rounded, rtol=1e-3):
        raise ConfigError(f"{role}: {type(model).__name__} computes logits in a way that opd does not know; use another architecture")
    first = model(input_ids=ids_BT[:, :4], use_cache=False).logits.float()
    if float((first - expected[:, :4]).abs().mean()) > 1e-3 + 3e-2 * float(expected.abs().max()) * rounded:
        raise ConfigError(f"{role}: {type(model).__name__} is not a causal language model here: its logits depend on later tokens")


def last_hidden(layers: Any, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Return the final hidden states (B, T, H): the input of the output head."""
    hidden_BTH: Tensor = layers(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
    return hidden_BTH


def predicting_hidden(layers: Any, inputs: Inputs) -> Tensor:
    """Return the final hidden states (N, H) that predict the trained tokens."""
    return last_hidden(layers, inputs.ids_BT, inputs.positions_BT).flatten(0, 1)[inputs.predicting_N]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers, which hold nearly all weights: not the embedding, the last norm and the output head."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def uses_packing(model: PreTrainedModel, packing: bool | None) -> bool:
    """Return whether sequences are packed: as configured, else where attention skips the space between sequences instead of masking it."""
    attention = model.config._attn_implementation or ""
    return packing if packing is not None else attention.startswith("flash_attention")


@torch.no_grad()
def check_packing(model: PreTrainedModel, role: str) -> None:
    """Raise `ConfigError` where sequences that share a row see each other: the hidden states are not those of separate rows."""
    ids_2T = torch.arange(16, device=model.device).view(2, 8) % model.config.get_text_config().vocab_size
    positions_1T = torch.arange(8, device=model.device).repeat(2)[None]
    remedy = "set train.packing=false"
    with refusing(role, model, "cannot read packed sequences", remedy):
        expected_TH = last_hidden(model.base_model, ids_2T)[1]
        packed_TH = last_hidden(model.base_model, ids_2T.view(1, -1), positions_1T)[0, 8:]
    error = float((packed_TH - expected_TH).abs().mean() / expected_TH.abs().mean())
    if not error <= (1e-1 if packed_TH.dtype == torch.bfloat16 or is_quantized(model) else 1e-3):
        raise ConfigError(
            f"train.packing: {role}: sequences packed into one row see each other in {type(model).__name__} "
            f"(hidden states differ by {error:.0%}); {remedy}"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has a table for; None where it computes any (rotary embeddings, ALiBi, recurrent states)."""
    settings = model.config.get_text_config()
    if settings.model_type == "mpt":  # its ALiBi has a fixed size
        return int(settings.max_seq_len)
    limit = getattr(settings, "max_position_embeddings", None)
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = [table for table in (*embeddings, *model.buffers()) if table.ndim == 2 and table is not model.get_input_embeddings().weight]
    has_table = limit is not None and any(0 <= len(table) - limit <= 2 for table in tables)  # OPT has two rows more
    return limit if has_table else None


def check_positions(model: PreTrainedModel, role: str, option: str, lengths: Iterable[int], new_tokens: int) -> None:
    """Raise `ConfigError` where prompts of these lengths and completions of `new_tokens`, which is `option`, need too many positions."""
    limit, longest = position_limit(model), max(lengths, default=0) + new_tokens
    if limit is not None and longest > limit:
        raise ConfigError(
            f"{option}={new_tokens}: with the longest prompt that is {longest:,} tokens, and {type(model).__name__} ({role}) has only "
            f"{limit:,} positions; lower {option} or data.max_prompt_tokens"
        )


def cache_argument(layers: Any) -> str:
    """Return the name under which the layers take their cache."""
    return "cache_params" if "cache_params" in inspect.signature(layers.forward).parameters else "past_key_values"  # Mamba; others


def padding_limit(device: torch.device) -> int:
    """Return how many padding tokens a micro-batch may hold: about the cost of one more micro-batch, which reads all weights again."""
    return 2048 if device.type == "cuda" else 128


class Policy(nn.Module):
    """The student as the trainer calls it. Everything that needs gradients happens inside `forward`, where FSDP sees it.

    Args:
        model: The student.
        size, rows, masked: As in `Head`.
        checkpointing: Recompute activations in the backward pass.
        compiled: Run the layers through torch.compile.
        bf16: Compute under bf16 autocast. Set for FSDP only: without sharding, Accelerate's `prepare_model` does it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        size: int,
        rows: int | None = None,
        checkpointing: bool = False,
        compiled: bool = False,
        bf16: bool = False,
        masked: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.masked = masked
        self.size = size
        self.rows = rows
        self.bf16 = bf16
        self._no_split_modules = model._no_split_modules  # the layers that FSDP shards one by one
        self.checkpointed: list[nn.Module] = []
        if checkpointing:
            self.checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            for layer in self.checkpointed:
                vars(layer).update(gradient_checkpointing=True, _gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
                # OPT's layers apply dropout themselves, in the training mode that `apply_loss` sets.
                vars(layer).update({name: 0.0 for name, value in vars(layer).items() if "dropout" in name and isinstance(value, float)})
        # In a tuple, or it would be registered as a second copy of the parameters.
        self.layers = (torch.compile(model.base_model, dynamic=True) if compiled else model.base_model,)

    def forward(self, inputs: Inputs, loss: Callable[[Tensor, Head], Any]) -> Any:
        """Return `loss` of the hidden states (N, H) that predict the trained tokens and of the output head."""
        if not self.bf16:
            return self.apply_loss(inputs, loss)
        with torch.autocast(inputs.ids_BT.device.type, dtype=torch.bfloat16, cache_enabled=False):
            return self.apply_loss(inputs, loss)

    def apply_loss(self, inputs: Inputs, loss: Callable[[Tensor, Head], Any]) -> Any:
        # Layers checkpoint in training mode only; the modules inside them, dropout above all, stay in eval mode.
        for layer in self.checkpointed:
            layer.training = True
        try:
            hidden_NH = predicting_hidden(self.layers[0], inputs)
        finally:
            for layer in self.checkpointed:
                layer.training = False
        return loss(hidden_NH, output_head(self.model, self.size, self.rows, masked=self.masked))
