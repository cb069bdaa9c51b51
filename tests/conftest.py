"""What several test files need: small random models, no network."""

import logging
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

PIPE, LEVEL, SAFE_PATH = signal.getsignal(signal.SIGPIPE), logging.getLogger().level, os.environ.get("PYTHONSAFEPATH")


def random_model(vocabulary: int = 23, seed: int = 0, hidden: int = 16, **kwargs: object) -> PreTrainedModel:
    """A Qwen2 of two layers with random weights, in eval mode. Its distributions are far from uniform, so that differences show."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        **{"num_hidden_layers": 2, **kwargs},
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(autouse=True)
def restored_process():
    """Undo what a command in this process did to it: the level of the log, the handler of its train.log, the path of its children, SIGPIPE.

    A verb that prints lets SIGPIPE end its process, which would end a later test that writes to a closed connection. All becomes as it was
    before the first test, not before this one: a fixture of a module may have run a command.
    """
    os.environ.pop("PYTHONSAFEPATH", None)
    root = logging.getLogger()
    yield
    signal.signal(signal.SIGPIPE, PIPE)
    root.setLevel(LEVEL)
    for handler in root.handlers[:]:
        if type(handler) is logging.FileHandler:
            root.removeHandler(handler)
            handler.close()
    os.environ.pop("PYTHONSAFEPATH", None)
    if SAFE_PATH is not None:
        os.environ["PYTHONSAFEPATH"] = SAFE_PATH


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory):
    """A finished run of experiment=debug, for tests that only read it."""
    from opd.train import main

    root = tmp_path_factory.mktemp("debug")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["experiment=debug", "device=cpu", "name=run", "track.rollouts_per_step=3"]) == 0
    return root / "runs" / "run"


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would be waited for: those that give Python a value, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
        return operation(*args, **(kwargs or {}))
