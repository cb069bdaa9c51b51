"""The other engines of this process and the choice among them: the same rollouts in kind, with honest log-probs."""

import logging
import math
import os
import signal
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from torch.distributed.fsdp import fully_shard
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus, ContinuousBatchingManager

from opd import signals
from opd.config.schema import Config, Engine, LoraConfig, SamplingConfig, SamplingDtype
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, collate
from opd.errors import ConfigError, EngineError, Preempted
from opd.models import fsdp2, sharding
from opd.models.policy import Policy, add_adapters, completion_hidden, output_head
from opd.objective import behaviour_logp
from opd.samplers import Choice, Decoding, GenerateSampler, Material, choose, make_sampler
from opd.samplers.bf16_copy import PackedLinear, Twin, can_pack
from opd.samplers.continuous import ContinuousSampler
from opd.samplers.trial import candidates

PROMPTS = [(5, 7, 9), (4,), (11, 12, 13, 14, 15, 3), (8, 2)]
DECODING = Decoding(temperature=0.8, max_new_tokens=12)
V = 23


def continuous(model, eos=(1,), twin=False):
    return ContinuousSampler(model, eos, 0, V, seed=0, twin=twin, memory_share=0.05)


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


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5)])
def test_log_probs_are_those_of_a_plain_forward_pass(make_model, top_p, top_k):
    model, decoding = make_model(), Decoding(0.8, 12, top_p, top_k)
    sampler = continuous(model)
    assert gaps(model, sampler.sample(requests(), decoding, "train"), decoding).max() < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    sampler.refresh()
    assert gaps(model, sampler.sample(requests(), decoding, "train"), decoding).max() < 1e-4  # weights of now, no stale cache


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


@pytest.mark.parametrize("make", [continuous, twin_sampler])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.3, 0.9, 0), (0.7, 1.0, 6), (1.0, 1.0, 0)])
def test_samples_follow_the_configured_distribution(make_model, make, temperature, top_p, top_k):
    """Chi-square of first tokens against the model's own probabilities; the bound is 8 standard deviations away."""
    model = make_model()
    decoding = Decoding(temperature, 1, top_p, top_k, batch_size=2000)
    drawn = make(model).sample([Request(Prompt(0, (5, 7, 9), ""), attempt=i) for i in range(2000)], decoding, "train")
    with torch.no_grad(), Twin(model) if make is twin_sampler else nullcontext(model) as drawn_from:
        logp = behaviour_logp(drawn_from(torch.tensor([[5, 7, 9]])).logits[:, -1], temperature, top_k, top_p)[0]
    expected = logp.double().exp() * len(drawn)
    counts = torch.bincount(torch.tensor([rollout.completion[0] for rollout in drawn]), minlength=V).double()
    kept = expected > 0
    assert not counts[~kept].any() and 3 < int(kept.sum()) <= V
    often = expected >= 5
    rest = (counts[~often].sum() - expected[~often].sum()).square() / expected[~often].sum().clamp_min(1)
    degrees = int(often.sum())
    assert float(((counts - expected)[often] ** 2 / expected[often]).sum() + rest) < degrees + 8 * math.sqrt(2 * degrees)


def test_continuous_batching_is_reproducible_and_leaves_random_numbers_and_attention_alone(make_model):
    model = make_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = model.config._attn_implementation
    once = continuous(model).sample(requests(), DECODING, "train")
    assert torch.equal(torch.rand(3), expected) and model.config._attn_implementation == before
    again = continuous(model).sample(requests(), DECODING, "train")
    other = continuous(model).sample(requests(), DECODING, "evaluation")
    assert [r.completion for r in once] == [r.completion for r in again] != [r.completion for r in other]
    assert len({r.completion for r in once}) > len(PROMPTS)  # the completions of a prompt differ


def test_continuous_batching_is_greedy_at_temperature_zero(make_model):
    model, decoding = make_model(), Decoding(0.0, 12)
    expected = GenerateSampler(model, (1,), 0, V, 0, bf16=False).sample(requests(1), decoding, "evaluation")
    found = continuous(model).sample(requests(1), decoding, "evaluation")
    assert [r.completion for r in found] == [r.completion for r in expected]
    assert all(not rollout.behaviour_logp.any() for rollout in found)


def test_the_engine_says_nothing_of_itself(make_model, caplog):
    logger = logging.getLogger("ContinuousBatchingLogger")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        continuous(make_model()).sample(requests(1), DECODING, "train")
        assert not caplog.records
        logger.info("heard")
    logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == ["heard"]


def test_continuous_batching_keeps_the_end_and_says_how_it_ended(make_model):
    rollouts = continuous(make_model(), eos=(1, 6, 17)).sample(requests(6), Decoding(1.2, 30), "train")
    assert {r.completion[-1] for r in rollouts if r.finish_reason is FinishReason.stop} == {1, 6, 17}
    for rollout in rollouts:
        assert not set(rollout.completion[:-1]) & {1, 6, 17} and len(rollout.behaviour_logp) == len(rollout.completion)
        assert (rollout.finish_reason is FinishReason.stop) == (rollout.completion[-1] in (1, 6, 17))
    assert {len(r.completion) for r in continuous(make_model(), eos=(999,)).sample(requests(), DECODING, "train")} == {12}
    assert continuous(make_model()).sample([], DECODING, "train") == []


def test_continuous_batching_refuses_a_student_with_ids_of_its_own(make_model):
    with pytest.raises(ConfigError, match=r"all 23 ids of the student, of which only 20.*engine=generate"):
        ContinuousSampler(make_model(), (1,), 0, 20, seed=0, twin=False, memory_share=0.05)


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
    assert candidates(SamplingConfig(engine=Engine.continuous, dtype=SamplingDtype.trainer), cpu) == [Choice(Engine.continuous, False)]
    assert candidates(SamplingConfig(engine=Engine.generate, dtype=SamplingDtype.bfloat16), cpu) == [Choice(Engine.generate, True)]
    assert candidates(SamplingConfig(engine=Engine.vllm), cuda) == [Choice(Engine.vllm, False)]
    assert candidates(SamplingConfig(), cpu) == [Choice(Engine.generate, False), Choice(Engine.generate, True)]
    tried = candidates(SamplingConfig(), cuda)
    assert len(tried) == 6 and {choice.engine for choice in tried if choice.static} == {Engine.generate}
    assert not any(choice.static for choice in candidates(SamplingConfig(), cuda, sharded=True))  # no graph holds the hooks that gather
    assert not any(choice.static for choice in candidates(SamplingConfig(static_cache=False), cuda))
    assert candidates(SamplingConfig(static_cache=True, dtype=SamplingDtype.trainer), cpu) == [Choice(Engine.generate, False, True)]
    assert isinstance(make_sampler(Choice(Engine.generate, True), material(make_model())), GenerateSampler)
    assert Choice.from_dict(Choice(Engine.continuous, True, why="x").to_dict()) == Choice(Engine.continuous, True, why="x")


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


def test_an_engine_that_runs_no_candidate_is_refused_in_its_own_words(make_model, monkeypatch):
    monkeypatch.setattr("opd.samplers.trial.is_fast_in_bf16", lambda device: True)
    narrow = replace(material(make_model()), vocabulary=20, config=Config())
    with pytest.raises(ConfigError, match=r"all 23 ids of the student, of which only 20"):
        choose(SamplingConfig(engine=Engine.continuous), narrow, requests())


def test_a_cache_without_room_is_an_engine_error_that_leaves_the_model_as_it_was(make_model):
    model = make_model()
    model.set_attn_implementation("eager")  # which the engine replaces
    with pytest.raises(EngineError, match=r"raise sampling\.memory_share"):
        ContinuousSampler(model, (1,), 0, V, seed=0, twin=False, memory_share=1e-6).sample(requests(), DECODING, "train")
    assert model.config._attn_implementation == "eager"


def test_an_engine_that_breaks_off_is_an_engine_error(make_model, monkeypatch):
    monkeypatch.setattr(ContinuousBatchingManager, "_run_generation_loop", lambda self: None)
    with pytest.raises(EngineError, match=r"gave 0 of 8 completions \(the engine stopped\).*engine=generate"):
        continuous(make_model()).sample(requests(), DECODING, "train")


def test_what_the_engine_stumbles_over_is_named(make_model, monkeypatch):
    def stumble(self):
        raise RuntimeError("no room")

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", stumble)
    with pytest.raises(EngineError, match=r"gave 0 of 8 completions \(no room\)"):
        continuous(make_model()).sample(requests(), DECODING, "train")


def test_a_signal_ends_the_engine_after_the_step_it_is_at_and_leaves_nothing_behind(make_model, monkeypatch):
    """The third step waits until the engine is told to end: machines on which a step takes long need no other test."""
    model = make_model()
    undisturbed = continuous(model, eos=()).sample(requests(), DECODING, "train")
    steps, told = [], threading.Event()
    generation_step, request_stop = ContinuousBatchingManager._generation_step, BackgroundThreadStatus.request_stop

    def step(self):
        generation_step(self)
        steps.append(threading.current_thread())
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            told.wait(10)

    def stop(self, *args, **kwargs):
        request_stop(self, *args, **kwargs)
        told.set()

    state = torch.get_rng_state()
    sampler = continuous(model, eos=())
    with monkeypatch.context() as patch, signals.deferred():
        patch.setattr(ContinuousBatchingManager, "_generation_step", step)
        patch.setattr(BackgroundThreadStatus, "request_stop", stop)
        with pytest.raises(Preempted, match="SIGTERM"):
            sampler.sample(requests(), DECODING, "train")
    assert len(steps) == 3 and not steps[0].is_alive()
    assert torch.equal(torch.get_rng_state(), state) and model.config._attn_implementation == "sdpa"
    again = sampler.sample(requests(), DECODING, "train")
    assert [rollout.completion for rollout in again] == [rollout.completion for rollout in undisturbed]


def asked(rank):
    """What one of two processes asks for: as many requests and tokens as the other never, and in the last call one of them nothing."""
    return [
        (requests(3 - 2 * rank), Decoding(0.8, 12 + 20 * rank)),
        (requests(1)[: 3 - rank], Decoding(0.0, 9)),
        (requests()[: 8 * rank], DECODING),
    ]


def work(rank, folder):
    """One of two processes: what it asks for with weights of its own, then with weights that the two share and have gathered."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    model = random_model()
    sampler = continuous(model, eos=())
    written = [[sampler.sample(*call, "train") for call in asked(rank)]]
    policy = Policy(model, V)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    fsdp2.settle(policy, layerwise=True)
    with sharding.whole(policy):
        written.append([sampler.sample(*call, "train") for call in asked(rank)])
    torch.save([[rollout.completion for call in calls for rollout in call] for calls in written], folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_each_of_two_processes_samples_by_itself_what_it_would_alone_also_with_sharded_weights(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    for rank in range(2):
        alone = [rollout.completion for call in asked(rank) for rollout in continuous(random_model(), eos=()).sample(*call, "train")]
        assert torch.load(tmp_path / f"{rank}.pt") == [alone, alone]


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
