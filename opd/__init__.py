"""`opd`: on-policy distillation of causal language models, as a command line and as a few importable pieces."""

import sys
from importlib import import_module

# `python -m opd` looks for every module in the working folder first, where a random.py or types.py would be taken for Python's. Before any
# of them is imported the folder is removed. The first argument is "-m" while Python still looks for the module to run.
IN_FOLDER = f"{sys.path[0]}/opd" == __path__[0]  # a source checkout that is not installed
if sys.argv[:1] == ["-m"] and any(word.partition(".")[0] == "opd" for word in sys.orig_argv) and not sys.flags.safe_path and not IN_FOLDER:
    del sys.path[0]

__version__ = "0.1.0"

# Imported when first asked for, so that `import opd` and the command line answer without torch.
ERRORS = ("OpdError", "ConfigError", "DataError", "EngineError", "NumericError", "OutputError", "Preempted", "RewardError", "TeacherError")
EXPORTS = {"OnPolicyDistillationTrainer": "opd.api", "reward": "opd.data.rewards", **dict.fromkeys(ERRORS, "opd.errors")}

__all__ = ["OnPolicyDistillationTrainer", "__version__", "reward", *ERRORS]


def __getattr__(name: str) -> object:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(EXPORTS[name]))[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *EXPORTS})
