"""FSDP2 on two processes (gloo): gradients computed layer by layer, gathered weights, and the settings that are refused."""

import os
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from conftest import random_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opd.data.rollouts import Inputs
from opd.errors import USAGE, ConfigError
from opd.models.accelerator import check_distributed_type
from opd.models.distributed import Fsdp2, Strategy, all_reduce_gradients, gather_tensors, shard_like, unsharded
from opd.models.policy import Policy
from opd.objective import Head
from opd.train import main

LENGTHS = (5, 9, 4)  # of the sequences that the first process trains on; the second has none


def loss(hidden_NH: Tensor, head: Head) -> Tensor:
    return head.logits(hidden_NH).log_softmax(-1)[:, 3].sum()


def inputs(length: int) -> Inputs:
    return Inputs(torch.arange(length)[None] % 23, torch.arange(length - 1))


def make_policy(tied: bool) -> Policy:
    return Policy(random_model(tie_word_embeddings=tied), 23, checkpointing=tied)


def gathered_layers(policy: Policy) -> int:
    layers = policy.model.model.layers
    return sum(any(not isinstance(parameter, DTensor) for parameter in layer.parameters()) for layer in layers)


def work(rank: int, folder: Path) -> None:
    """One of two processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    for tied in (False, True):
        compute_sharded(rank, folder, tied)
    reduce_unevenly(rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def reduce_unevenly(rank: int) -> None:
    """Both processes use the first of three weights, one the second, and none the third."""
    weights = [torch.ones(2, requires_grad=True) for _ in range(3)]
    for weight in weights[: 2 - rank]:
        (weight * (rank + 1)).sum().backward()
    all_reduce_gradients(weights)
    assert [None if weight.grad is None else weight.grad.tolist() for weight in weights] == [[3.0, 3.0], [1.0, 1.0], None]


def compute_sharded(rank: int, folder: Path, tied: bool) -> None:
    """Twice: a pass with gathered weights, then passes of the first process and empty ones of the second. Then all tensors in full."""
    policy = make_policy(tied)
    for layer in policy.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    strategy = Fsdp2(None, policy, None)
    counts: list[int] = []
    for layer in policy.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: counts.append(gathered_layers(policy)))
    for _ in range(2):
        with strategy.gathered_weights(), torch.no_grad():
            assert gathered_layers(policy) == 2
            policy(inputs(3), loss)
            assert gathered_layers(policy) == 2
        assert counts[-1] == 2 and gathered_layers(policy) == 0
        counts.clear()
        for length in LENGTHS:
            if rank == 0:
                policy(inputs(length), loss).backward()
            else:
                strategy.empty_pass()
        assert set(counts) == {1}, counts  # never two of them at a time
    parameters = dict(policy.named_parameters())
    for name, parameter in make_policy(tied).named_parameters():
        assert torch.equal(shard_like(parameter.detach(), parameters[name]).to_local(), parameters[name].to_local())
    gradients = gather_tensors({name: parameter.grad for name, parameter in parameters.items()}, keep=rank == 0)
    weights = gather_tensors(
        {**{name: parameter.detach() for name, parameter in parameters.items()}, "step": torch.tensor(7.0)}, keep=rank == 0
    )
    if rank == 0:
        torch.save((gradients, weights), folder / f"{tied}.pt")
    else:
        assert gradients == weights == {}


@pytest.mark.slow
def test_fsdp2_gathers_layers_in_turn_and_a_process_without_passes_keeps_up(tmp_path):
    """The sum of gradients over passes and processes is that of one process, also with tied weights and activation checkpointing."""
    forked.work_in_two(work, tmp_path)
    for tied in (False, True):
        policy = make_policy(tied)
        for length in LENGTHS + LENGTHS:
            policy(inputs(length), loss).backward()
        expected = dict(policy.named_parameters())
        gradients, weights = torch.load(tmp_path / f"{tied}.pt")
        assert weights.pop("step") == 7
        assert gradients.keys() == weights.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5), name
            assert torch.equal(weights[name], parameter), name


def test_without_shards_nothing_is_gathered():
    layer = nn.Linear(2, 2)
    with unsharded(layer):
        assert not isinstance(layer.weight, DTensor)
    weights = dict(layer.named_parameters())
    assert gather_tensors(weights, keep=True) == weights and gather_tensors(weights, keep=False) == {}
    assert shard_like(layer.bias, layer.bias) is layer.bias


def test_one_process_makes_as_many_passes_as_it_has_micro_batches():
    strategy = Strategy(SimpleNamespace(num_processes=1), nn.Linear(2, 3), None)
    assert strategy.passes(5) == 5 and not strategy.is_sharded and strategy.held_parameters() == 9
    with strategy.gathered_weights():
        strategy.empty_pass()


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("fsdp_version", "1", "fsdp_version: 2"),
        ("fsdp_offload_params", "true", "false"),
        ("fsdp_reshard_after_forward", "false", "true"),
    ],
)
def test_unsupported_settings_of_fsdp_are_refused_with_a_remedy(monkeypatch, setting, value, remedy):
    settings = {"fsdp_version": "2", "fsdp_cpu_ram_efficient_loading": "false", "fsdp_reshard_after_forward": "true", setting: value}
    for name, word in settings.items():
        monkeypatch.setenv(name.upper(), word)
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin())
    with pytest.raises(ConfigError) as refused:
        check_distributed_type(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))
    message = str(refused.value)
    assert refused.value.exit_code == USAGE == 64
    assert message.startswith(f"{setting}: {value} is not supported") and remedy in message.partition(";")[2]


def test_supported_settings_of_fsdp_are_accepted(monkeypatch):
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("FSDP_VERSION", "2")
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin())
    check_distributed_type(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))


def test_deepspeed_is_refused_with_exit_code_64_and_the_config_file_for_fsdp2(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["experiment=debug", "device=cpu", "name=run"]) == USAGE == 64
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "DEEPSPEED is not supported" in line and "launch.config_file=scripts/accelerate/fsdp2_gpu8.yaml" in line


def test_other_strategies_are_refused_with_the_supported_ones():
    with pytest.raises(ConfigError, match=r"distributed_type: MEGATRON_LM is not supported; use MULTI_GPU .*fsdp2_gpu8\.yaml"):
        check_distributed_type(SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM))
