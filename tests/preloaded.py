"""Imports whatever a run imports, so that runs in forked processes need not. Computes nothing: threads would be lost in a fork."""

from contextlib import redirect_stdout, suppress
from io import StringIO

import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from hydra.core.plugins import Plugins

from opd.training import runner  # noqa: F401

Plugins.instance()
with suppress(ImportError), redirect_stdout(StringIO()):  # to which it would log
    import deepspeed  # noqa: F401 - Accelerate imports it where it is installed
