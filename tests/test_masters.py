"""Float32 master weights of a bf16 module."""

from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file

from opd.api import from_options
from opd.models.masters import MasterWeights
from opd.training import runner
from opd.training.events import StepDone

DEBUG = {
    "model.path": "bundled:tiny-student",
    "teacher.path": "bundled:tiny-teacher",
    "model.dtype": "bfloat16",
    "teacher.dtype": "bfloat16",
    "device": "cpu",
    "data.source": "arithmetic",
    "data.path": None,
    "data.subset": None,
    "data.prompt": "prompt",
    "data.answer_after": None,
    "eval.reward": None,
    "eval.kl_prompts": 0,
    "sampling.max_new_tokens": 8,
    "sampling.n": 2,
    "ppo.steps": 2,
    "optim.lr": 1e-4,
    "train.max_steps": 4,
    "train.batch_size": 4,
    "checkpoint.every": 2,
}


@pytest.fixture
def model():
    return random_model(tie_word_embeddings=True)


def backward(model, ids):
    model(torch.tensor([ids])).logits.float().square().mean().backward()


def test_gradients_are_added_in_float32(model):
    masters = MasterWeights(model)
    parts = []
    for ids in ((3, 4, 5), (7, 8)):
        backward(model, ids)
        parts.append([master.grad.clone() for master in masters.masters])
        assert all(weight.dtype == torch.bfloat16 and weight.grad is None for weight in model.parameters())
    # Each gradient is bf16; their sum has more digits than that.
    assert all(gradient.dtype == torch.float32 for gradient in parts[1])
    differences = [later - earlier for earlier, later in zip(*parts, strict=True)]
    assert any(not torch.equal(later, later.bfloat16().float()) for later in parts[1])
    assert all(torch.allclose(difference, difference.bfloat16().float(), rtol=1e-5, atol=1e-7) for difference in differences)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    """Each gradient is rounded to bf16, which leaves 0.4 %; with their sum in bf16 it would be 0.8 %."""
    ids = torch.randint(2, 23, (64, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for rows in (64, 8, 1):
        model = random_model(hidden=32)
        masters = MasterWeights(model)
        for part in ids.split(rows):
            logp = model(part).logits.float().log_softmax(-1)
            (-logp[:, :-1].gather(-1, part[:, 1:, None]).sum() / ids.numel()).backward()
        gradients.append(torch.cat([master.grad.flatten() for master in masters.masters]))
    whole, *parts = gradients
    assert all(float((part - whole).norm() / whole.norm()) < 0.006 for part in parts)


def test_an_update_reaches_the_module_at_its_address_and_small_ones_add_up(model):
    masters = MasterWeights(model)
    addresses = [weight.data_ptr() for weight in model.parameters()]
    master, weight = masters.masters[0], masters.weights[0]
    before = weight.detach().clone()
    for _ in range(64):  # one of them is lost in bf16
        with torch.no_grad():
            master.mul_(1 + 2**-12)
        masters.update_module()
    assert [weight.data_ptr() for weight in model.parameters()] == addresses
    assert torch.equal(weight, master.bfloat16()) and not torch.equal(weight, before)
    masters.restore_module()
    assert weight.dtype == torch.float32 and torch.equal(weight, master)


def test_an_interrupted_run_resumes_bitwise_from_the_masters(tmp_path: Path):
    def stop_at_3(event):
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    config = from_options({**DEBUG, "name": "run"})
    runner.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runner.train(config, tmp_path / "stopped", on_event=stop_at_3)
    runner.train(config, tmp_path / "stopped")
    whole, stopped = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "stopped"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    stored = load_file(tmp_path / "stopped" / "checkpoints" / "step_000004" / "model.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in stored.values()), "checkpoints hold the masters"
