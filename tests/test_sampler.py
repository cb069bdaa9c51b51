"""Sampling: exactly the configured distribution, the same tokens in any batch, every way of ending."""

import math

import pytest
import torch
from transformers import GenerationConfig

from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, collate
from opd.errors import ConfigError
from opd.models.policy import completion_hidden, output_head
from opd.objective import behaviour_logp, chunked_stats, draw
from opd.objective.losses import token_logp
from opd.samplers import Decoding, GenerateSampler

PROMPTS = [(5, 7, 9), (4,), (11, 12, 13, 14, 15, 3), (5, 7, 9), (8, 2), (20, 21, 22, 19)]
DECODING = Decoding(temperature=0.8, max_new_tokens=12)


def sampler_of(model, eos=(1,), vocabulary=23, seed=0, static=False):
    return GenerateSampler(model, eos, pad_id=0, vocabulary=vocabulary, seed=seed, bf16=False, static=static)


def requests(n=2):
    return [Request(Prompt(i, ids, ""), attempt=attempt) for i, ids in enumerate(PROMPTS) for attempt in range(n)]


def completions(rollouts):
    return [rollout.completion for rollout in rollouts]


def test_a_sample_does_not_depend_on_its_batch_or_on_padding(make_model):
    sampler = sampler_of(make_model())
    together = sampler.sample(requests(), DECODING, "train")
    alone = [sampler.sample([request], DECODING, "train")[0] for request in requests()]
    shuffled = sampler.sample(requests()[::-1], Decoding(0.8, 12, batch_size=5), "train")[::-1]
    assert completions(together) == completions(alone) == completions(shuffled)
    assert len({len(completion) for completion in completions(together)}) > 2  # rows did end at different times
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one.behaviour_logp, other.behaviour_logp, atol=1e-5)


def test_random_numbers_come_from_seed_epoch_sample_and_attempt(make_model):
    model = make_model()
    base = Request(Prompt(3, (5, 7, 9), ""), epoch=0, attempt=0)
    variants = [base, Request(base.prompt, 1, 0), Request(base.prompt, 0, 1), Request(Prompt(4, (5, 7, 9), ""), 0, 0)]
    drawn = completions(sampler_of(model, eos=(999,)).sample(variants, DECODING, "train"))
    drawn += completions(sampler_of(model, eos=(999,), seed=1).sample([base], DECODING, "train"))
    drawn += completions(sampler_of(model, eos=(999,)).sample([base], DECODING, "evaluation"))
    assert len(set(drawn)) == len(drawn)
    torch.manual_seed(123)  # the global generator has no say
    assert completions(sampler_of(model, eos=(999,)).sample([base], DECODING, "train")) == drawn[:1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_changes_no_sample(make_model, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    growing, fixed = (
        sampler_of(model, static=static).sample(requests(4), Decoding(0.8, 40, batch_size=9), "train") for static in (False, True)
    )
    assert completions(growing) == completions(fixed)
    assert len({len(completion) for completion in completions(fixed)}) > 5  # batches were rebuilt on the way
    for one, other in zip(growing, fixed, strict=True):
        assert torch.allclose(one.behaviour_logp, other.behaviour_logp, atol=1e-5)


def test_a_step_with_a_static_cache_computes_where_the_step_before_did(make_model):
    """What a CUDA graph replays are addresses."""
    model, places = make_model(), []

    def look(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            inputs = [kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")]
            held = [tensor for layer in kwargs["past_key_values"].layers for tensor in (layer.keys, layer.values)]
            places.append([tensor.data_ptr() for tensor in (*inputs, *held)])

    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    sampler_of(model, eos=(999,), static=True).sample(requests(), DECODING, "train")
    assert len(places) == 11 and all(place == places[0] for place in places)


def test_a_static_cache_is_refused_where_layers_see_a_part_of_the_past(make_model):
    model = make_model(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ConfigError, match=r"static_cache=true: some layers .* set it to false"):
        sampler_of(model, static=True).sample(requests(), DECODING, "train")


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7)])
@pytest.mark.parametrize("static", [False, True])
def test_log_probs_are_those_of_the_distribution_drawn_from(make_model, top_k, top_p, static):
    model = make_model()
    rollouts = sampler_of(model, static=static).sample(requests(), Decoding(0.8, 12, top_p, top_k), "train")
    for rollout in rollouts:
        batch = collate([rollout], [0], pad_id=0)
        with torch.no_grad():
            logits = output_head(model).logits(completion_hidden(model.base_model, batch.inputs))
        expected = behaviour_logp(logits, 0.8, top_k, top_p).gather(-1, batch.target_N[:, None])[:, 0]
        assert torch.isfinite(expected).all()
        assert torch.allclose(rollout.behaviour_logp, expected, atol=1e-4)


def test_sampled_and_scored_log_probs_agree_at_the_temperature(make_model):
    """Temperature in the sampler and not in the scores, or dropout in either, would show as a gap."""
    model = make_model(attention_dropout=0.5)
    rollouts = sampler_of(model).sample(requests(), DECODING, "train")
    batch = collate(rollouts, range(len(rollouts)), pad_id=0)
    with torch.no_grad():
        hidden = completion_hidden(model.base_model, batch.inputs)
    logp = chunked_stats(hidden, output_head(model), lambda logits, part: {"logp": token_logp(logits, batch.target_N[part], 0.8)[0]})[
        "logp"
    ]
    assert torch.allclose(logp, batch.behaviour_logp_N, atol=1e-4)


def test_nothing_is_inherited_from_generation_config(make_model):
    model = make_model()
    before = completions(sampler_of(model).sample(requests(), DECODING, "train"))
    model.generation_config = GenerationConfig(repetition_penalty=5.0, top_k=1, top_p=0.1, temperature=9.0, suppress_tokens=[2, 3, 4])
    assert completions(sampler_of(model).sample(requests(), DECODING, "train")) == before


def test_samples_follow_the_models_distribution(make_model):
    """Chi-square of 4,000 first tokens against the model's own probabilities; the bound is 8 standard deviations away."""
    model = make_model()
    drawn = sampler_of(model).sample(
        [Request(Prompt(i, (5, 7, 9), "")) for i in range(4000)], Decoding(1.3, 1, top_p=0.9, batch_size=4000), "train"
    )
    with torch.no_grad():
        logp = behaviour_logp(model(torch.tensor([[5, 7, 9]])).logits[:, -1], 1.3, top_p=0.9)[0]
    expected = logp.double().exp() * len(drawn)
    counts = torch.bincount(torch.tensor([rollout.completion[0] for rollout in drawn]), minlength=23).double()
    kept = expected > 0
    assert not counts[~kept].any() and 3 < int(kept.sum()) < 23
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 23 + 8 * math.sqrt(2 * 23)


def test_greedy_is_transformers_greedy(make_model):
    model = make_model()
    rollouts = sampler_of(model).sample(requests(1), Decoding(0.0, 12), "evaluation")
    for rollout in rollouts:
        prompt = torch.tensor([rollout.request.prompt.ids])
        config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0, prompt.shape[1] :]
        assert list(rollout.completion) == expected.tolist()


def test_every_end_of_sequence_token_stops_and_is_kept(make_model):
    model = make_model()
    rollouts = sampler_of(model, eos=(1, 6, 17)).sample(requests(4), Decoding(1.0, 40), "train")
    ends = {rollout.completion[-1] for rollout in rollouts if rollout.finish_reason is FinishReason.stop}
    assert ends == {1, 6, 17}
    for rollout in rollouts:
        assert not set(rollout.completion[:-1]) & {1, 6, 17}
        assert (rollout.finish_reason is FinishReason.stop) == (rollout.completion[-1] in (1, 6, 17))
        assert len(rollout.behaviour_logp) == len(rollout.completion)


def test_a_completion_that_ends_at_once_is_that_one_token(make_model):
    model = make_model()
    (rollout,) = sampler_of(model, eos=range(23)).sample(requests(1)[:1], DECODING, "train")
    assert len(rollout.completion) == 1 and rollout.finish_reason is FinishReason.stop


def test_a_completion_without_end_is_cut_and_says_so(make_model):
    rollouts = sampler_of(make_model(), eos=(999,)).sample(requests(), DECODING, "train")
    assert {len(rollout.completion) for rollout in rollouts} == {12}
    assert {rollout.finish_reason for rollout in rollouts} == {FinishReason.length}


def test_ids_beyond_the_shared_vocabulary_are_never_drawn(make_model):
    model = make_model()
    drawn = completions(sampler_of(model, vocabulary=9, eos=(1,)).sample(requests(8), Decoding(2.0, 12), "train"))
    assert max(max(completion) for completion in drawn) < 9


def test_each_prompt_is_prefilled_once(make_model):
    model = make_model()
    seen = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    sampler_of(model, eos=(999,)).sample(
        [Request(Prompt(i, (5, 6 + i), ""), attempt=a) for i in range(3) for a in range(4)], Decoding(1.0, 3), "train"
    )
    handle.remove()
    assert seen == [(3, 2), (12, 1), (12, 1)]


@pytest.mark.parametrize("vocabulary", [3, 512, 1300])
def test_drawing_inverts_the_running_sum_and_never_finds_a_token_without_mass(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.6] = -torch.inf
    logits[:, -1], logits[:, 0] = -torch.inf, 0.0
    logp = logits.log_softmax(-1)
    ends = logp.double().exp().cumsum(-1)
    for uniform in (torch.zeros(40).double(), torch.full((40,), 1 - 2**-53).double(), torch.rand(40, generator=generator).double()):
        ids = draw(logp, uniform)
        found = logp.gather(-1, ids[:, None])
        assert bool(found.isfinite().all())
        below = ends.gather(-1, ids[:, None]) - found.double().exp()
        target = uniform[:, None] * ends[:, -1:]
        assert bool((below <= target + 1e-6).all() and (target <= ends.gather(-1, ids[:, None]) + 1e-6).all())
    assert torch.equal(draw(logp, uniform)[7:9], draw(logp[7:9], uniform[7:9]))
