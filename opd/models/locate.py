"""Where a model is loaded from. Does not import torch, so that a mistake is reported at once."""

from opd.config.compose import PACKAGE
from opd.config.files import is_folder_name, local_path, missing
from opd.config.options import ModelConfig
from opd.errors import ConfigError

BUNDLED = "bundled:"


def locate(config: ModelConfig, role: str) -> str:
    """Return the folder or hub id to load from. Raises `ConfigError` for a local folder that does not exist or has no model of its own."""
    if config.path.startswith(BUNDLED):
        folder = PACKAGE / "assets" / config.path.removeprefix(BUNDLED)
        if not folder.is_dir():
            raise ConfigError(
                f"{role}.path={config.path}: bundled are {', '.join(sorted(BUNDLED + p.name for p in folder.parent.glob('*/')))}"
            )
        return str(folder)
    path = local_path(config.path)
    if path.is_file():
        raise ConfigError(f"{role}.path={config.path}: a file; name its folder (for a GGUF file, with {role}.gguf_file={path.name})")
    if is_folder_name(config.path) and not path.is_dir():
        raise ConfigError(f"{role}.path={config.path}: {missing(path, 'folder')}")
    if (path / "adapter_config.json").is_file():
        raise ConfigError(f"{role}.path={config.path}: contains an adapter (adapter_config.json); {adapter_remedy(config, role)}")
    if (path / "final" / "config.json").is_file() and not (path / "config.json").is_file():
        raise ConfigError(f"{role}.path={config.path}: a run folder; its model is {role}.path={path / 'final'}")
    return str(path) if path.is_dir() else config.path


def adapter_remedy(config: ModelConfig, role: str) -> str:
    return f"name its base model as {role}.path and the adapter's folder as {role}.adapter={config.path}, or remove the adapter's files"
