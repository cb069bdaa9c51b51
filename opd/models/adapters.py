"""Low-rank adapters in folders of peft: `model.adapter`, which is trained further or merged, and `teacher.adapter`.

Such a folder has an `adapter_config.json` and an `adapter_model.safetensors`.
"""

from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from opd.config.files import local_path
from opd.config.options import LoraConfig, ModelConfig
from opd.config.schema import Config
from opd.errors import ConfigError
from opd.models.policy import MODEL_ERRORS, add_adapters

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = ["all-linear"]
# Settings of peft that train or compute something else than a product of two matrices next to a linear layer.
NOT_TRAINED = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora",
)  # fmt: skip
# Settings of peft that describe the file, not the adapter.
NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "auto_mapping")


def read_settings(config: ModelConfig, role: str) -> Any:
    """Return peft's settings of the configured adapter. Raises `ConfigError` for a folder that has no LoRA adapter."""
    option = f"{role}.adapter={config.adapter}"
    if find_spec("peft") is None:
        raise ConfigError(f"{option} needs the package peft: pip install 'opd[lora]'")
    import peft

    assert config.adapter is not None
    folder = local_path(config.adapter)
    absent = next((name for name in (SETTINGS, TENSORS) if not (folder / name).is_file()), None)
    if absent is not None:
        raise ConfigError(f"{option}: contains no adapter ({absent} is missing); name a folder that peft's save_pretrained wrote")
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, *MODEL_ERRORS) as error:
        raise ConfigError(f"{option}: {SETTINGS} cannot be read: {(str(error).splitlines() or [''])[0]}; check the folder") from error
    if not isinstance(settings, peft.LoraConfig):
        raise ConfigError(f"{option}: an adapter of the kind {settings.peft_type}; only LoRA adapters can be loaded: merge it with peft")
    settings.init_lora_weights = True  # the tensors come from the file; other values would change the base model
    settings.inference_mode = False
    return settings


def peft_options(settings: Any) -> dict[str, Any]:
    """Return the options of `lora` for the adapters that a `peft.LoraConfig` describes.

    Raises `ConfigError` for what the options cannot express.
    """
    import peft

    if not isinstance(settings, peft.LoraConfig):
        raise ConfigError(f"peft_config is a {type(settings).__name__}; only LoRA adapters are trained: pass a peft.LoraConfig")
    values, defaults = asdict(settings), asdict(peft.LoraConfig())
    known = ("r", "lora_alpha", "target_modules", "task_type", *NOT_OF_THE_ADAPTER)
    other = [name for name in values if name not in known and values[name] != defaults[name]]
    if settings.task_type not in (None, "CAUSAL_LM"):
        other.append("task_type")
    if other:
        raise ConfigError(f"peft_config: {other[0]}={values[other[0]]!r} has no counterpart in opd; leave it at its default")
    targets = settings.target_modules
    if targets is None or (isinstance(targets, str) and targets != ALL_LINEAR[0]):
        remedy = "a list of layers' names, or 'all-linear'"
        raise ConfigError(f"peft_config: target_modules={targets!r}: set {remedy}")
    return {
        "lora.rank": settings.r,
        "lora.alpha": settings.lora_alpha,
        "lora.targets": ALL_LINEAR if isinstance(targets, str) else sorted(targets),
    }


def lora_options(config: Config) -> LoraConfig:
    """Return the options of the adapters that are trained: `lora`, with rank, alpha and layers of `model.adapter` where there is one.

    Raises `ConfigError` where `lora` asks for others than the adapter has, or the adapter has parts that are not trained here.
    """
    lora = config.lora
    if config.model.adapter is None or lora.rank == 0:
        return lora
    settings = read_settings(config.model, "model")
    merging = "set lora.rank=0, which merges it and trains all weights"
    values = settings.to_dict()
    other = next((name for name in NOT_TRAINED if values.get(name)), None) or ("bias" if settings.bias != "none" else None)
    if other is not None:
        raise ConfigError(f"model.adapter={config.model.adapter}: has parts that opd does not train ({other}); {merging}")
    targets = settings.target_modules
    names = ALL_LINEAR if isinstance(targets, str) else sorted(targets)
    found = replace(lora, rank=settings.r, alpha=settings.lora_alpha, targets=names)
    asked = lora.targets if lora.targets == ALL_LINEAR else sorted(lora.targets)
    if (lora.rank, lora.alpha) != (found.rank, found.alpha) or asked not in (ALL_LINEAR, names):
        fitting = f"lora.rank={found.rank} lora.alpha={found.alpha}" + ("" if asked == ALL_LINEAR else f" lora.targets=[{','.join(names)}]")
        raise ConfigError(
            f"lora.rank={lora.rank}: the adapter of model.adapter={config.model.adapter} is another: set {fitting}; or {merging}"
        )
    return found


def trained_adapters(model: PreTrainedModel, config: Config) -> Any:
    """Add adapters to train to the student in place, new ones or those of `model.adapter`, and return peft's handle on them."""
    lora, adapter = lora_options(config), config.model.adapter
    handle = add_adapters(model, lora) if adapter is None else load_adapter(model, config.model, "model")
    check_vocabulary_layers(model, f"lora.targets={lora.targets}" if adapter is None else f"model.adapter={adapter}", is_trained=True)
    return handle


def check_vocabulary_layers(model: PreTrainedModel, option: str, is_trained: bool) -> None:
    """Raise `ConfigError` for adapters on the output head, which the loss reads as a plain matrix, or on an embedding tied to it.

    Args:
        is_trained: Whether adapters are trained. Merged ones may be on a head of its own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding_is_adapted, head_is_adapted = (isinstance(layer, BaseTunerLayer) for layer in layers)
    is_tied = layers[0].weight is layers[1].weight  # those of the plain layers, also where they are adapted
    if (head_is_adapted and (is_trained or is_tied)) or (embedding_is_adapted and is_tied):
        why = "are not trained here" if is_trained else "change the embedding that is tied to it"
        raise ConfigError(f"{option}: adapters on the output head, or on the embedding tied to it, {why}; use adapters on other layers")


def load_adapter(model: PreTrainedModel, config: ModelConfig, role: str) -> Any:
    """Add the configured adapter to the model in place, trainable, and return peft's handle on it.

    Raises `ConfigError` for an adapter of another model: one that does not fit, or of which not every tensor finds its place.
    """
    settings = read_settings(config, role)
    import peft

    option, remedy = f"{role}.adapter={config.adapter}", f"name an adapter of {role}.path={config.path}"
    try:
        adapted = peft.get_peft_model(model, settings)
        result: Any = peft.set_peft_model_state_dict(adapted, load_file(local_path(str(config.adapter)) / TENSORS))
    except (OSError, SafetensorError, *MODEL_ERRORS) as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)[:300]
        raise ConfigError(f"{option}: does not fit {type(model).__name__}: {reason.rstrip('.')}; {remedy}") from error
    unplaced = sorted(result.unexpected_keys) + sorted(name for name in result.missing_keys if ".lora_" in name)
    if unplaced:
        raise ConfigError(f"{option}: {len(unplaced)} of its tensors and those of the model do not match, such as {unplaced[0]}; {remedy}")
    check_vocabulary_layers(model, option, is_trained=False)
    model.eval()
    return adapted.base_model
