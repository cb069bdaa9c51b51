"""Weights sharded over two processes (FSDP2 on gloo): gradients a layer at a time, and what is written of them."""

import os
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opd.data.rollouts import Inputs
from opd.models import fsdp2, sharding, zero
from opd.models.policy import Policy
from opd.models.together import all_reduce_gradients
from opd.objective import Head

LENGTHS = (5, 9, 4)  # of the sequences that the first process learns from; the second has none


def loss(hidden_NH: Tensor, head: Head) -> Tensor:
    return head.logits(hidden_NH).log_softmax(-1)[:, 3].sum()


def inputs(length: int) -> Inputs:
    return Inputs(torch.arange(length)[None] % 23, torch.arange(length - 1))


def make_policy(tied: bool) -> Policy:
    return Policy(random_model(tie_word_embeddings=tied), 23, checkpointing=tied)


def whole_layers(policy: Policy) -> int:
    found = [[not isinstance(parameter, DTensor) for parameter in layer.parameters()] for layer in policy.model.model.layers]
    return sum(map(any, found))


def work(rank: int, folder: Path) -> None:
    """One of two processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for tied in (False, True):
        learn_and_write(rank, folder, tied)
    learn_apart(rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def learn_apart(rank: int) -> None:
    """Of three weights both processes used the first, one the second, and none the third."""
    weights = [torch.ones(2, requires_grad=True) for _ in range(3)]
    for weight in weights[: 2 - rank]:
        (weight * (rank + 1)).sum().backward()
    all_reduce_gradients(weights)
    assert [None if weight.grad is None else weight.grad.tolist() for weight in weights] == [[3.0, 3.0], [1.0, 1.0], None]


def learn_and_write(rank: int, folder: Path, tied: bool) -> None:
    """Passes of its own and idle ones, twice, then a file of all weights, and one that cannot be written."""
    policy = make_policy(tied)
    for layer in policy.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    fsdp2.settle(policy, layerwise=True)
    seen = []
    for layer in policy.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: seen.append(whole_layers(policy)))
    for _ in range(2):
        with sharding.whole(policy), torch.no_grad():
            assert whole_layers(policy) == 2
            policy(inputs(3), loss)
            assert whole_layers(policy) == 2
        assert seen[-1] == 2 and whole_layers(policy) == 0
        del seen[:]
        for length in LENGTHS:
            if rank == 0:
                policy(inputs(length), loss).backward()
            else:
                sharding.idle(policy, last=False)
        assert set(seen) == {1}, seen  # never two of them
    gradients = {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()}
    if rank == 0:
        torch.save(gradients, folder / f"gradients_{tied}.pt")
    mixed = {**{name: parameter.detach() for name, parameter in policy.named_parameters()}, "step": torch.tensor(7.0)}
    assert sharding.write_full(mixed, folder / f"all_{tied}.safetensors" if rank == 0 else None) is None
    failure = sharding.write_full(mixed, folder / "nowhere" / "file" if rank == 0 else None)
    assert isinstance(failure, OSError) == (rank == 0)


@pytest.mark.slow
def test_layers_are_gathered_in_turn_and_a_process_without_passes_keeps_up(tmp_path):
    """Tied weights with activation checkpointing, too: gradients add up over passes and processes to those of one process."""
    multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    for tied in (False, True):
        policy = make_policy(tied)
        for length in LENGTHS + LENGTHS:
            policy(inputs(length), loss).backward()
        found = torch.load(tmp_path / f"gradients_{tied}.pt")
        expected = dict(policy.named_parameters())
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.allclose(found[name], parameter.grad, rtol=1e-5, atol=1e-5), name
        written = load_file(tmp_path / f"all_{tied}.safetensors")
        assert written.pop("step") == 7
        assert all(torch.equal(written[name], parameter) for name, parameter in expected.items())


def test_one_process_writes_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.int64), "b": torch.randn(2, 3).bfloat16(), "c": torch.tensor(True), "d": torch.zeros(0, 2)}
    assert sharding.write_full(tensors, tmp_path / "file") is None
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert found.keys() == tensors.keys()


def test_without_shards_there_is_nothing_to_gather():
    with sharding.whole(nn.Linear(2, 2)) as nothing:
        assert nothing is None


def test_each_process_takes_its_share_of_a_tensor_that_does_not_divide_evenly(monkeypatch):
    shares = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        shares.append(zero.own_share(torch.arange(1.0, 5.0).view(2, 2), 2).tolist())
    assert shares == [[1, 2], [3, 4], [0, 0]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_stage: 1 is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param_device: cpu is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer_device: nvme is not supported"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16 of DeepSpeed is not supported"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "DeepSpeed's optimizer is not supported"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}, "fp16": {"enabled": "auto"}}, None),
    ],
)
def test_what_deepspeed_is_asked_for_and_does_not_work_is_refused(settings, said):
    found = zero.check_settings(settings)
    assert found is None if said is None else said in (found or "")
