"""Sampling with a bf16 copy, and the choice that `sampling.engine=auto sampling.dtype=auto` make."""

import math
from types import SimpleNamespace

import pytest
import torch

from opd.config.schema import Engine, LoraConfig, SamplingConfig, SamplingDtype
from opd.data.prompts import Prompt
from opd.data.rollouts import Request, collate
from opd.models.policy import add_adapters, completion_hidden, output_head
from opd.objective import behaviour_logp
from opd.samplers import Choice, Decoding, GenerateSampler, Material, choose, make_sampler
from opd.samplers.bf16_copy import PackedLinear, Twin, can_pack
from opd.samplers.trial import candidates

PROMPTS = [(5, 7, 9), (4,), (11, 12, 13, 14, 15, 3), (8, 2)]
DECODING = Decoding(temperature=0.8, max_new_tokens=12)
V = 23


def twin_sampler(model, eos=(1,)):
    return GenerateSampler(model, eos, 0, V, seed=0, bf16=False, twin=True)


def requests(n=2):
    return [Request(Prompt(i, ids, ""), attempt=attempt) for i, ids in enumerate(PROMPTS) for attempt in range(n)]


def gaps(model, rollouts, decoding):
    """|behaviour_logp − that of a plain forward pass|, all tokens."""
    found = []
    for rollout in rollouts:
        batch = collate([rollout], [0], pad_id=0)
        with torch.no_grad():
            logits = output_head(model).logits(completion_hidden(model.base_model, batch.inputs))
        logp = behaviour_logp(logits, decoding.temperature, decoding.top_k, decoding.top_p).gather(-1, batch.target_N[:, None])[:, 0]
        found.append((logp - rollout.behaviour_logp).abs())
    return torch.cat(found)


def test_the_bf16_copy_follows_the_weights_and_says_what_it_drew_from(make_model):
    model = make_model(tie_word_embeddings=True)
    sampler = twin_sampler(model)
    first = gaps(model, sampler.sample(requests(), DECODING, "train"), DECODING)
    assert 1e-5 < first.mean() < 0.05  # it rounds, and no more than that
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert gaps(model, sampler.sample(requests(), DECODING, "train"), DECODING).mean() < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_bf16_copy_keeps_ties_and_buffers_and_lets_go_of_its_weights(make_model):
    model = make_model(tie_word_embeddings=True)
    twin = Twin(model)
    with twin as copy:
        assert copy.lm_head.weight is copy.model.embed_tokens.weight and copy.lm_head.weight.dtype == torch.bfloat16
        assert {buffer.dtype for buffer in copy.buffers()} == {buffer.dtype for buffer in model.buffers()}
        assert copy.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert sum(parameter.numel() for parameter in copy.parameters()) == 0


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.3, 0.9, 0), (0.7, 1.0, 6), (1.0, 1.0, 0)])
def test_samples_follow_the_configured_distribution(make_model, temperature, top_p, top_k):
    """Chi-square of first tokens against the model's own probabilities; the bound is 8 standard deviations away."""
    model = make_model()
    decoding = Decoding(temperature, 1, top_p, top_k, batch_size=2000)
    drawn = twin_sampler(model).sample([Request(Prompt(0, (5, 7, 9), ""), attempt=i) for i in range(2000)], decoding, "train")
    with torch.no_grad(), Twin(model) as drawn_from:
        logp = behaviour_logp(drawn_from(torch.tensor([[5, 7, 9]])).logits[:, -1], temperature, top_k, top_p)[0]
    expected = logp.double().exp() * len(drawn)
    counts = torch.bincount(torch.tensor([rollout.completion[0] for rollout in drawn]), minlength=V).double()
    kept = expected > 0
    assert not counts[~kept].any() and 3 < int(kept.sum()) <= V
    often = expected >= 5
    rest = (counts[~often].sum() - expected[~often].sum()).square() / expected[~often].sum().clamp_min(1)
    degrees = int(often.sum())
    assert float(((counts - expected)[often] ** 2 / expected[often]).sum() + rest) < degrees + 8 * math.sqrt(2 * degrees)


def material(model):
    return Material(config=SimpleNamespace(seed=0), model=model, eos=(1,), pad_id=0, vocabulary=V, bf16=False, longest=40)


def test_auto_takes_what_is_faster_unless_its_log_probs_are_off(make_model, monkeypatch):
    """The clock is made up: what is decided by it is not."""
    model = make_model()
    monkeypatch.setattr("opd.samplers.trial.is_fast_in_bf16", lambda device: True)

    def chosen(seconds, **options):
        ticks = iter([0.0, seconds[0], 100.0, 100.0 + seconds[1]])
        monkeypatch.setattr("opd.samplers.trial.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        return choose(SamplingConfig(**options), material(model), requests())

    assert chosen((2.0, 1.0)) == Choice(Engine.generate, True, why=chosen((2.0, 1.0)).why)
    assert "gap" in chosen((2.0, 1.0)).why and "tokens/s" in chosen((2.0, 1.0)).why
    assert not chosen((1.0, 2.0)).twin
    assert not chosen((1.1, 1.0)).twin  # too little to tell from noise
    assert not chosen((2.0, 1.0), max_gap=1e-7).twin


def test_what_the_config_fixes_is_not_tried(make_model, monkeypatch):
    monkeypatch.setattr("opd.samplers.trial.is_fast_in_bf16", lambda device: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert candidates(SamplingConfig(engine=Engine.generate, dtype=SamplingDtype.bfloat16), cpu) == [Choice(Engine.generate, True)]
    assert candidates(SamplingConfig(engine=Engine.vllm), cuda) == [Choice(Engine.vllm, False)]
    assert candidates(SamplingConfig(), cpu) == [Choice(Engine.generate, False), Choice(Engine.generate, True)]
    assert len(candidates(SamplingConfig(), cuda)) == 4
    assert not any(choice.static for choice in candidates(SamplingConfig(), cuda, sharded=True))  # no graph holds the hooks that gather
    assert isinstance(make_sampler(Choice(Engine.generate, True), material(make_model())), GenerateSampler)
    assert Choice.from_dict(Choice(Engine.generate, True, why="x").to_dict()) == Choice(Engine.generate, True, why="x")


@pytest.mark.skipif(not can_pack(), reason="this torch has no such kernels")
@pytest.mark.parametrize("shape", [(3, 1, 64), (2, 7, 64), (5, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_give_the_products_of_plain_ones(shape, bias):
    layer = torch.nn.Linear(64, 48, bias=bias).bfloat16().requires_grad_(False)
    given = torch.randn(shape).bfloat16()
    expected = layer(given)
    layer.__class__ = PackedLinear
    layer.pack()
    assert layer.weight.numel() == 0 and torch.allclose(layer(given), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.skipif(not can_pack(), reason="this torch has no such kernels")
def test_the_copys_head_is_packed_once_and_for_who_asks(make_model):
    model = make_model(tie_word_embeddings=True)
    twin = Twin(model)
    with twin as copy:
        assert twin.packed_head.packed is None and all(layer.packed is not None for layer in twin.packed)
        head, given = output_head(copy), torch.eye(16, dtype=torch.bfloat16)
        expected = head.logits(given)
        first = twin.head(head).logits(given)
        packed = twin.packed_head.packed
        assert torch.allclose(first, expected, atol=2e-2, rtol=1e-2) and twin.head(head).product.packed is packed
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    with twin as copy:
        assert torch.allclose(twin.head(output_head(copy)).logits(given), 2 * first)  # weights of now


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks in transformers' old words
def test_the_bf16_copy_has_the_adapters_of_the_student(make_model):
    pytest.importorskip("peft")
    model = make_model()
    add_adapters(model, LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    sampler = twin_sampler(model)
    assert gaps(model, sampler.sample(requests(), DECODING, "train"), DECODING).mean() < 0.1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.0)
    assert gaps(model, sampler.sample(requests(), DECODING, "train"), DECODING).mean() < 0.1
