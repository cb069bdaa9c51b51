"""The guarantees of every sampling engine in one suite; then tests of `generate`, and of the rule that picks an engine."""

import gc
import math
import signal
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import Waits
from fake_vllm import ModelServer, running
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from opd import signals
from opd.api import from_options
from opd.config.options import LoraConfig, SamplingDtype
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, collate
from opd.errors import Preempted
from opd.models.load import uses_bf16_copy
from opd.models.policy import add_adapters, output_head, predicting_hidden
from opd.objective import behaviour_logp, chunked_stats, draw
from opd.objective.logp import token_logp
from opd.samplers import Decoding, GenerateSampler, SamplerSpec, make_sampler
from opd.samplers.bf16_copy import Bf16Copy, PackedLinear, can_pack
from opd.samplers.line import LOOK, DecodeLines, can_capture
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_server import VllmServerSampler

V = 23
PROMPTS = [(5, 7, 9), (4,), (11, 12, 13, 14, 15, 3), (5, 7, 9), (8, 2), (20, 21, 22, 19)]
DECODING = Decoding(temperature=0.8, max_new_tokens=12)
ROUNDING = 0.1  # largest mean gap of a bf16 copy, in nats; weights of the step before are several nats off
NO_END = ()


def spec_of(model, eos=(1,), vocabulary=V, seed=0, **kwargs):
    return SamplerSpec(model=model, eos=eos, pad_id=0, vocabulary=vocabulary, seed=seed, **{"bf16": False, **kwargs})


def requests(n=2):
    return [Request(Prompt(i, ids, ""), attempt=attempt) for i, ids in enumerate(PROMPTS) for attempt in range(n)]


def long_requests(n=2, vocabulary=V, tokens=160):
    """Requests with prompts longer than a block of a prefix cache."""
    generator = torch.Generator().manual_seed(5)
    prompts = [Prompt(i, tuple(torch.randint(2, vocabulary, (tokens,), generator=generator).tolist()), "") for i in range(4)]
    return [Request(prompt, attempt=attempt) for prompt in prompts for attempt in range(n)]


def completions(rollouts):
    return [rollout.completion for rollout in rollouts]


def gaps(model, rollouts, decoding, vocabulary=None, masked=None):
    """Return |behaviour_logp - that of a forward pass of the model| of each token; infinite for one that this pass would not draw."""
    batch = collate(rollouts, range(len(rollouts)), pad_id=0).to(model.device)
    with torch.no_grad():
        logits_NV = output_head(model, vocabulary, masked=masked).logits(predicting_hidden(model.base_model, batch.inputs))
    logp_NV = behaviour_logp(logits_NV, decoding.temperature, decoding.top_k, decoding.top_p)
    expected_N = logp_NV.gather(-1, batch.ids_N[:, None])[:, 0].cpu()
    return (expected_N - torch.cat([rollout.behaviour_logp for rollout in rollouts])).abs()


def change_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)), alpha=0.2)


class Engine:
    """An engine under test. `rounds`: it computes in bf16, while the model is float32. `draws`: completions for a test of frequencies."""

    def __init__(self, name, stack):
        self.name = name
        self.stack = stack
        self.rounds = name == "generate bf16 copy"
        self.draws = 400 if name == "vllm server" else 4000

    def sampler(self, model, **kwargs):
        spec = spec_of(model, **{"longest": 200, "batch_size": 16, **kwargs})
        match self.name:
            case "generate" | "generate captured":
                sampler = GenerateSampler(spec)
                sampler.captures = self.name == "generate captured"
                return sampler
            case "generate bf16 copy":
                return GenerateSampler(spec, bf16_copy=True)
            case "vllm":
                return VllmSampler(spec, bf16=False, memory_share=0.1)
            case "vllm server":
                server = self.stack.enter_context(running(ModelServer(model)))
                return VllmServerSampler(spec, False, server.url, timeout=60.0)

    def drawn_from(self, model):
        """Return a context with the model in the precision that the engine draws from."""
        return Bf16Copy(model) if self.rounds else nullcontext(model)

    def assert_log_probs_of(self, model, rollouts, decoding, vocabulary=None, masked=None):
        gaps_N = gaps(model, rollouts, decoding, vocabulary, masked)
        if not self.rounds:
            assert gaps_N.max() < 1e-4
            return
        possible_N = gaps_N.isfinite()  # rounding moves a few tokens into or out of top-p and top-k
        assert possible_N.float().mean() > 0.95
        assert 1e-5 < gaps_N[possible_N].mean() < ROUNDING


needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: scripts/environment_vllm"),
]


@pytest.fixture(params=["generate", "generate captured", "generate bf16 copy", pytest.param("vllm", marks=needs_vllm), "vllm server"])
def engine(request):
    with ExitStack() as stack:
        yield Engine(request.param, stack)


@pytest.fixture
def model(make_model):
    return make_model(hidden=64)  # vLLM's attention on a CPU needs heads of at least 32


# Every engine.


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.8, 1.0, 0), (0.8, 1.0, 4), (0.8, 0.7, 0), (1.5, 0.9, 8)])
def test_log_probs_are_those_of_the_distribution_drawn_from(engine, model, temperature, top_p, top_k):
    decoding = Decoding(temperature, 12, top_p, top_k)
    rollouts = engine.sampler(model).sample(requests(4), decoding, "train")
    assert [rollout.request for rollout in rollouts] == requests(4)
    assert all(len(rollout.behaviour_logp) == len(rollout.completion) for rollout in rollouts)
    engine.assert_log_probs_of(model, rollouts, decoding)


def test_each_finished_rollout_is_returned_as_it_was_prepared(engine, model):
    prepared = []

    def prepare(done):
        prepared.extend(replace(rollout, given=True) for rollout in done)
        return prepared[-len(done) :]

    rollouts = engine.sampler(model).sample(requests(4), Decoding(1.0, 12, batch_size=3), "train", prepare)
    assert {id(rollout) for rollout in rollouts} == {id(rollout) for rollout in prepared} and len(rollouts) == len(requests(4))
    assert [rollout.request for rollout in rollouts] == requests(4)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (1.6, 0.9, 0), (0.6, 1.0, 5)])
def test_samples_follow_the_configured_distribution(engine, model, temperature, top_p, top_k):
    """Chi-square of pairs of tokens against the model's probabilities; the bound is 8 standard deviations away."""
    decoding = Decoding(temperature, 2, top_p, top_k, batch_size=4000)
    prompt = (5, 7, 9)
    asked = [Request(Prompt(0, prompt, ""), attempt=attempt) for attempt in range(engine.draws)]
    rollouts = engine.sampler(model, eos=NO_END).sample(asked, decoding, "train")
    with torch.no_grad(), engine.drawn_from(model) as drawn_from:
        logits_VTV = drawn_from(torch.tensor([[*prompt, first] for first in range(V)])).logits[:, -2:]
    logp_VTV = behaviour_logp(logits_VTV.flatten(0, 1), temperature, top_k, top_p).view(V, 2, V).double()
    expected = (logp_VTV[0, 0][:, None] + logp_VTV[:, 1]).exp().flatten() * engine.draws
    counts = torch.bincount(torch.tensor([V * first + second for first, second in completions(rollouts)]), minlength=V * V).double()
    often = expected >= 5
    assert 5 < int(often.sum()) < V * V
    rare = (counts[~often].sum() - expected[~often].sum()).square() / expected[~often].sum().clamp_min(1)
    degrees = int(often.sum())
    assert float(((counts - expected)[often] ** 2 / expected[often]).sum() + rare) < degrees + 8 * math.sqrt(2 * degrees)


def test_greedy_decoding_equals_that_of_transformers(engine, model):
    rollouts = engine.sampler(model).sample(requests(1), Decoding(0.0, 12), "evaluation")
    for rollout in rollouts:
        assert not rollout.behaviour_logp.any()
        prompt = torch.tensor([rollout.request.prompt.ids])
        if engine.rounds:  # where two logits are close, rounding decides
            batch = collate([rollout], [0], pad_id=0)
            with torch.no_grad():
                logits_NV = output_head(model).logits(predicting_hidden(model.base_model, batch.inputs))
            assert (logits_NV.amax(-1) - logits_NV.gather(-1, batch.ids_N[:, None])[:, 0]).max() < 0.3
            continue
        config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0, prompt.shape[1] :]
        assert list(rollout.completion) == expected.tolist()


def test_end_of_sequence_token_is_kept_and_sets_the_finish_reason(engine, model):
    rollouts = engine.sampler(model, eos=(1, 6, 17)).sample(requests(6), Decoding(1.5, 30), "train")
    assert {rollout.completion[-1] for rollout in rollouts if rollout.finish_reason is FinishReason.stop} == {1, 6, 17}
    for rollout in rollouts:
        assert not set(rollout.completion[:-1]) & {1, 6, 17}
        assert (rollout.finish_reason is FinishReason.stop) == (rollout.completion[-1] in (1, 6, 17))
        assert len(rollout.completion) == 30 or rollout.finish_reason is FinishReason.stop


def test_completion_can_be_a_single_end_of_sequence_token(engine, model):
    rollouts = engine.sampler(model, eos=tuple(range(V))).sample(requests(1), DECODING, "train")
    assert {(len(rollout.completion), rollout.finish_reason) for rollout in rollouts} == {(1, FinishReason.stop)}


def test_completion_without_end_of_sequence_is_truncated_at_max_new_tokens(engine, model):
    rollouts = engine.sampler(model, eos=NO_END).sample(requests(), DECODING, "train")
    assert {(len(rollout.completion), rollout.finish_reason) for rollout in rollouts} == {(12, FinishReason.length)}


@pytest.mark.parametrize("tied", [True, False])
def test_ids_beyond_the_vocabulary_are_never_drawn(engine, make_model, tied):
    model = make_model(hidden=64, tie_word_embeddings=tied)
    narrow = [Request(Prompt(i, (3, 2 + i), ""), attempt=attempt) for i in range(4) for attempt in range(4)]
    unrestricted = engine.sampler(model).sample(narrow, Decoding(2.0, 12), "train")
    assert max(map(max, completions(unrestricted))) >= 9
    sampler = engine.sampler(model, vocabulary=9)
    for temperature in (2.0, 0.0):
        assert max(map(max, completions(sampler.sample(narrow, Decoding(temperature, 12), "train")))) < 9
    engine.assert_log_probs_of(model, sampler.sample(narrow, DECODING, "train"), DECODING, vocabulary=9)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 22)])
def test_masked_ids_are_never_drawn_and_the_others_share_their_probability(engine, model, top_p, top_k):
    masked = torch.tensor([3, 7, 8, 20, 22])
    unrestricted = engine.sampler(model).sample(requests(8), Decoding(2.0, 12), "train")
    assert set(masked.tolist()) & set().union(*completions(unrestricted))
    sampler = engine.sampler(model, masked=masked)
    for temperature in (2.0, 0.0):
        drawn = set().union(*completions(sampler.sample(requests(8), Decoding(temperature, 12, top_p, top_k), "train")))
        assert drawn <= set(range(V)) - set(masked.tolist())
    decoding = Decoding(0.8, 12, top_p, top_k)
    engine.assert_log_probs_of(model, sampler.sample(requests(), decoding, "train"), decoding, masked=masked)


def test_random_numbers_come_from_seed_epoch_sample_attempt_and_stream(engine, model):
    base = Request(Prompt(3, (5, 7, 9), ""), epoch=0, attempt=0)
    variants = [base, replace(base, epoch=1), replace(base, attempt=1), Request(Prompt(4, (5, 7, 9), ""))]
    sampler = engine.sampler(model, eos=NO_END)
    first = completions(sampler.sample(variants, DECODING, "train"))
    torch.manual_seed(123)  # the global generator must not matter
    assert completions(sampler.sample(variants[::-1], DECODING, "train"))[::-1] == first
    drawn = first + completions(sampler.sample([base], DECODING, "evaluation"))
    drawn += completions(engine.sampler(model, eos=NO_END, seed=1).sample([base], DECODING, "train"))
    assert len(set(drawn)) == len(drawn)
    assert completions(engine.sampler(model, eos=NO_END).sample([base], DECODING, "train")) == first[:1]


def test_generation_config_of_the_model_is_ignored(engine, model):
    before = completions(engine.sampler(model).sample(requests(), DECODING, "train"))
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, top_k=1, top_p=0.1, temperature=9.0, suppress_tokens=[2, 3], eos_token_id=4
    )
    assert completions(engine.sampler(model).sample(requests(), DECODING, "train")) == before


def test_weights_after_an_update_are_used(engine, model):
    """With long prompts, so that keys and values cached for the old weights would show."""
    decoding = Decoding(0.8, 6)
    sampler = engine.sampler(model)
    old = sampler.sample(long_requests(), decoding, "train")
    engine.assert_log_probs_of(model, old, decoding)
    change_weights(model)
    assert gaps(model, old, decoding).max() > 1
    sampler.refresh()
    sampler.sync_weights()
    engine.assert_log_probs_of(model, sampler.sample(long_requests(), decoding, "train"), decoding)


def test_no_requests_give_no_rollouts(engine, model):
    assert engine.sampler(model).sample([], DECODING, "train") == []


def test_stop_signal_raises_preempted_and_the_sampler_stays_usable(engine, model, monkeypatch):
    sampler = engine.sampler(model, eos=NO_END)
    undisturbed = completions(sampler.sample(requests(), DECODING, "train"))
    with monkeypatch.context() as patch:
        patch.setattr(signals, "pending", [signal.SIGTERM])
        with pytest.raises(Preempted, match="SIGTERM"):
            sampler.sample(requests(), DECODING, "train")
    assert completions(sampler.sample(requests(), DECODING, "train")) == undisturbed


# The rule that picks an engine.


@pytest.mark.parametrize(
    ("dtype", "is_fast", "expected"),
    [("auto", True, True), ("auto", False, False), ("trainer", True, False), ("bfloat16", False, True)],
)
def test_bf16_copy_is_used_as_configured_or_where_the_device_is_fast_in_bf16(monkeypatch, dtype, is_fast, expected):
    monkeypatch.setattr("opd.models.load.is_fast_in_bf16", lambda device: is_fast)
    rule = SamplingDtype[dtype]
    assert uses_bf16_copy(rule, torch.device("cpu"), is_bf16=False) is expected
    # A captured step reads bf16 weights where they are.
    assert uses_bf16_copy(rule, torch.device("cuda"), is_bf16=True) is (expected and dtype == "bfloat16")


@pytest.mark.parametrize("engine_name", ["auto", "generate"])
def test_auto_is_generate(model, engine_name):
    config = from_options({"sampling.engine": engine_name})
    for bf16_copy in (False, True):
        sampler = make_sampler(config, spec_of(model), bf16_copy)
        assert isinstance(sampler, GenerateSampler) and (sampler.copy is not None) == bf16_copy


def test_engine_vllm_with_a_url_is_the_client_of_that_server(model):
    with running(ModelServer(model)) as server:
        config = from_options({"sampling.engine": "vllm", "sampling.vllm.url": server.url, "sampling.dtype": "bfloat16"})
        sampler = make_sampler(config, spec_of(model, longest=32), bf16_copy=False)
        assert isinstance(sampler, VllmServerSampler) and sampler.dtype == torch.bfloat16


# `generate`.


def test_sample_does_not_depend_on_its_batch_or_on_padding(model):
    sampler = GenerateSampler(spec_of(model))
    together = sampler.sample(requests(), DECODING, "train")
    alone = [sampler.sample([request], DECODING, "train")[0] for request in requests()]
    shuffled = sampler.sample(requests()[::-1], Decoding(0.8, 12, batch_size=5), "train")[::-1]
    assert completions(together) == completions(alone) == completions(shuffled)
    assert len({len(completion) for completion in completions(together)}) > 2  # rows did end at different times
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.behaviour_logp, other.behaviour_logp, atol=1e-4)


def test_each_prompt_is_prefilled_once(model):
    shapes = []
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    asked = [Request(Prompt(i, (5, 6 + i), ""), attempt=attempt) for i in range(3) for attempt in range(4)]
    GenerateSampler(spec_of(model, eos=NO_END)).sample(asked, Decoding(1.0, 3), "train")
    assert shapes == [(3, 2), (12, 1), (12, 1)]


def test_behaviour_logp_equals_the_score_at_the_temperature(make_model):
    """Temperature in one of the two only, or dropout in either, would be a gap."""
    model = make_model(attention_dropout=0.5)
    rollouts = GenerateSampler(spec_of(model)).sample(requests(), DECODING, "train")
    batch = collate(rollouts, range(len(rollouts)), pad_id=0)
    with torch.no_grad():
        hidden = predicting_hidden(model.base_model, batch.inputs)
    scored = chunked_stats(hidden, output_head(model), lambda logits, part: {"logp": token_logp(logits, batch.ids_N[part], 0.8)[0]})
    assert torch.allclose(scored["logp"], torch.cat([rollout.behaviour_logp for rollout in rollouts]), atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_decode_line_gives_the_samples_of_the_growing_cache(model, attention):
    model.set_attn_implementation(attention)
    growing, captured = GenerateSampler(spec_of(model)), GenerateSampler(spec_of(model))
    captured.captures = True
    decoding = Decoding(1.2, 40, batch_size=9)
    expected, rollouts = (sampler.sample(requests(4), decoding, "train") for sampler in (growing, captured))
    assert completions(rollouts) == completions(expected)
    assert len({len(completion) for completion in completions(rollouts)}) > 5  # batches shrank several times
    for one, other in zip(expected, rollouts, strict=True):
        assert torch.allclose(one.behaviour_logp, other.behaviour_logp, atol=1e-4)


def test_steps_of_the_line_compute_at_the_same_addresses(model):
    """A CUDA graph replays addresses."""
    addresses = []

    def note(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            inputs = [kwargs[name] for name in ("attention_mask", "position_ids")]
            cached = [tensor for layer in kwargs["past_key_values"].layers for tensor in (layer.keys, layer.values)]
            addresses.append([tensor.data_ptr() for tensor in (*inputs, *cached)])

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    sampler = GenerateSampler(spec_of(model, eos=NO_END))
    sampler.captures = True
    sampler.sample(requests(), DECODING, "train")
    assert len(addresses) == 12 and all(step == addresses[0] for step in addresses)


def test_steps_of_the_line_wait_for_the_device_only_at_a_look(model):
    counts = []
    for tokens in (LOOK, 2 * LOOK, 3 * LOOK):
        sampler = GenerateSampler(spec_of(model, eos=NO_END))
        sampler.captures = True
        with Waits() as waits:
            sampler.sample(requests(), Decoding(1.0, tokens), "train")
        counts.append(waits.count)
    assert counts[1] - counts[0] == counts[2] - counts[1] == 1


def test_lines_of_an_evaluation_serve_all_its_batches_and_free_their_memory_after_it(model, monkeypatch):
    """Without waiting for Python to look for garbage: on a GPU that is the cache of all rows."""
    made = []

    class Noted(DecodeLines):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((weakref.ref(self), weakref.ref(self.buffers.logits)))

    monkeypatch.setattr("opd.samplers.generate.DecodeLines", Noted)
    growing, captured = GenerateSampler(spec_of(model)), GenerateSampler(spec_of(model))
    captured.captures = True
    gc.disable()
    try:
        for stream in ("evaluation", "other"):
            expected, rollouts = (sampler.sample(requests(4), replace(DECODING, batch_size=5), stream) for sampler in (growing, captured))
            assert completions(rollouts) == completions(expected)
        assert len(made) == 2 and not any(reference() for references in made for reference in references)
    finally:
        gc.enable()


def test_rows_of_the_line_that_are_dead_stay_within_a_table_of_positions():
    settings = GPT2Config(vocab_size=V, n_positions=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    sampler = GenerateSampler(spec_of(GPT2LMHeadModel(settings).eval(), eos=NO_END))
    sampler.captures = True
    for _ in range(3):
        sampler.sample(requests(1)[:3], replace(DECODING, batch_size=8), "train")  # five rows are dead


def test_decode_step_is_captured_on_a_gpu_where_all_layers_attend_to_the_whole_past(model, make_model):
    gpu, sliding = torch.device("cuda"), make_model(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert can_capture(SimpleNamespace(device=gpu, config=model.config))
    assert not can_capture(SimpleNamespace(device=gpu, config=sliding.config))
    assert not can_capture(model)  # on a CPU


def test_sharded_weights_are_not_captured(model, monkeypatch):
    monkeypatch.setattr("opd.samplers.generate.can_capture", lambda model: True)
    assert GenerateSampler(spec_of(model)).captures and not GenerateSampler(spec_of(model, sharded=True)).captures


# The bf16 copy of `generate`.


def test_bf16_copy_keeps_tied_weights_and_buffers_and_frees_its_memory(make_model):
    model = make_model(tie_word_embeddings=True)
    copy = Bf16Copy(model)
    with copy as inside:
        assert inside.lm_head.weight is inside.model.embed_tokens.weight and inside.lm_head.weight.dtype == torch.bfloat16
        assert {buffer.dtype for buffer in inside.buffers()} == {buffer.dtype for buffer in model.buffers()}
        assert inside.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert sum(parameter.numel() for parameter in inside.parameters()) == 0
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft
def test_bf16_copy_includes_the_adapters(make_model):
    pytest.importorskip("peft")
    model = make_model()
    add_adapters(model, LoraConfig(rank=4))
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    sampler = GenerateSampler(spec_of(model), bf16_copy=True)
    for scale in (0.5, -0.5):
        with torch.no_grad():
            for parameter in adapters:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        assert gaps(model, sampler.sample(requests(), DECODING, "train"), DECODING).mean() < ROUNDING


def test_dropped_bf16_copy_samples_with_the_weights_of_the_trainer(model):
    sampler = GenerateSampler(spec_of(model), bf16_copy=True)
    sampler.drop_copy()
    assert gaps(model, sampler.sample(requests(), DECODING, "train"), DECODING).max() < 1e-4


@pytest.mark.skipif(not can_pack(), reason="this torch has no kernels for packed weights")
@pytest.mark.parametrize("shape", [(3, 1, 64), (2, 7, 64), (5, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_give_the_products_of_plain_ones(shape, bias):
    layer = torch.nn.Linear(64, 48, bias=bias).bfloat16().requires_grad_(False)
    inputs = torch.randn(shape).bfloat16()
    expected = layer(inputs)
    layer.__class__ = PackedLinear
    layer.pack()
    assert layer.weight.numel() == 0 and torch.allclose(layer(inputs), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.skipif(not can_pack(), reason="this torch has no kernels for packed weights")
def test_output_head_of_the_copy_is_packed_once_for_each_use(make_model):
    model = make_model(tie_word_embeddings=True)
    copy = Bf16Copy(model)
    hidden = torch.eye(16, dtype=torch.bfloat16)
    with copy as inside:
        assert copy.packed_head.packed is None and all(layer.packed is not None for layer in copy.packed)
        head = output_head(inside)
        expected, first = head.logits(hidden), copy.head(head).logits(hidden)
        packed = copy.packed_head.packed
        assert torch.allclose(first, expected, atol=2e-2, rtol=1e-2) and copy.head(head).product.packed is packed
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    with copy as inside:
        assert torch.allclose(copy.head(output_head(inside)).logits(hidden), 2 * first)  # the current weights


# Drawing.


@pytest.mark.parametrize("vocabulary", [3, 512, 1300])
def test_draw_inverts_the_cumulative_distribution_and_never_returns_an_impossible_token(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.6] = -torch.inf
    logits[:, -1], logits[:, 0] = -torch.inf, 0.0
    logp = logits.log_softmax(-1)
    cumulative = logp.double().exp().cumsum(-1)
    for uniform in (torch.zeros(40).double(), torch.full((40,), 1 - 2**-53).double(), torch.rand(40, generator=generator).double()):
        ids = draw(logp, uniform)
        drawn_logp = logp.gather(-1, ids[:, None])
        assert bool(drawn_logp.isfinite().all())
        end = cumulative.gather(-1, ids[:, None])
        target = uniform[:, None] * cumulative[:, -1:]
        assert bool((end - drawn_logp.double().exp() <= target + 1e-6).all() and (target <= end + 1e-6).all())
    assert torch.equal(draw(logp, uniform)[7:9], draw(logp[7:9], uniform[7:9]))
