"""`opd`: on-policy distillation of causal language models, as a command line and as a few importable pieces."""

from importlib import import_module

__version__ = "0.1.0"

# Imported when first asked for, so that `import opd` and the command line answer without torch.
EXPORTS = {"OnPolicyDistillationTrainer": "opd.api", "reward": "opd.data.rewards"}

__all__ = ["OnPolicyDistillationTrainer", "__version__", "reward"]


def __getattr__(name: str) -> object:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(EXPORTS[name]))[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS})
