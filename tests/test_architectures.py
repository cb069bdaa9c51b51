"""The checks of a model before a run, on tiny random models of many architectures: samples, packed sequences, positions, memory."""

import pytest
import torch
from architectures import ARCHITECTURES, POSITIONS, random_architecture, settings
from test_samplers import gaps
from transformers import AutoTokenizer

from opd.api import OnPolicyDistillationTrainer, from_options
from opd.config.compose import PACKAGE
from opd.data.prompts import Prompt
from opd.data.rollouts import Inputs, Request
from opd.errors import ConfigError
from opd.evaluation.sample_score import LoadedModel
from opd.models import measured, memory
from opd.models.policy import Policy, check_head, check_packing, position_limit
from opd.models.shared_ids import SharedIds
from opd.samplers import Decoding, GenerateSampler, SamplerSpec, generate, make_sampler

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' about kernels that are not installed

CPU = torch.device("cpu")
REFUSED = {
    "deepseek_v32": "nats",
    "recurrent_gemma": "nats",
    "rwkv": "nats",
    "minimax": "cache of its own",
    "xlstm": "computes logits",
    "bert": "computes logits",
}
TABLES = {"gpt2", "gpt_neo", "gptj", "opt", "mpt", "ctrl", "bert", "xglm"}
PACKED = {"llama", "qwen3_moe", "gemma2", "gpt2", "deepseek_v3", "cohere2"}
NOT_PACKED = {"opt", "bloom", "mpt", "falcon", "mamba", "lfm2", "qwen3_5_text", "falcon_h1"}
TOKENIZER = PACKAGE / "assets" / "tiny-student"


def sampler_of(name, bf16_copy=False, **options):
    model = random_architecture(name, **options)
    spec = SamplerSpec(model=model, eos=(256,), pad_id=257, vocabulary=261, seed=0, bf16=False)
    return GenerateSampler(spec, bf16_copy)


def trainer_of(student, teacher, folder, rows=4, **options):
    data = [{"prompt": f"{i}+27=", "answer": str(i + 27)[::-1]} for i in range(10, 10 + rows)]
    options = {"device": "cpu", "eval.kl_prompts": 2, "model.dtype": "float32", "sampling.dtype": "trainer", **options}
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = {"eval_steps": 0, "max_steps": 2, "batch_size": 2, "max_new_tokens": options.pop("sampling.max_new_tokens", 8)}
    return OnPolicyDistillationTrainer(
        student, teacher, data, data, processing_class=tokenizer, output_dir=folder / "out", **size, options=options
    )


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - REFUSED.keys()))
def test_samples_of_an_architecture_have_the_log_probs_of_a_forward_pass(name):
    sampler = sampler_of(name)
    before = torch.random.get_rng_state()
    check_head(sampler.spec.model, "model")
    sampler.check("model")
    assert torch.equal(torch.random.get_rng_state(), before)
    sampler.eos = torch.arange(0, 261, 9)
    lengths = (3, 17, 9)
    prompts = [Prompt(row, tuple((row * 31 + 7 * i) % 250 for i in range(length)), "") for row, length in enumerate(lengths)]
    rollouts = sampler.sample([Request(prompt, attempt=attempt) for prompt in prompts for attempt in range(2)], Decoding(0.8, 16), "train")
    assert len({len(rollout.completion) for rollout in rollouts}) > 2  # rows were removed
    for rollout in rollouts:
        assert float(gaps(sampler.spec.model, [rollout], Decoding(0.8, 16)).max()) < 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_that_cannot_be_sampled_is_refused(name):
    sampler = sampler_of(name)

    def check():
        check_head(sampler.spec.model, "model")
        sampler.check("model")

    with pytest.raises(ConfigError, match=rf"^model: .*{REFUSED[name]}.*; .*another architecture") as refused:
        check()
    assert refused.value.exit_code == 64


@pytest.mark.parametrize("fault", ["rows", "mask", "positions"])
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_check_of_the_sampler_finds_faults(name, fault, monkeypatch):
    sampler = sampler_of(name)
    forward = sampler.next_logits
    if fault == "rows":
        monkeypatch.setattr(generate, "select_rows", lambda cache, rows: cache.reorder_cache(rows.flip(0)))
    elif fault == "mask":
        monkeypatch.setattr(sampler, "next_logits", lambda ids, mask, positions, cache: forward(ids, mask | 1, positions, cache))
    else:
        monkeypatch.setattr(sampler, "next_logits", lambda ids, mask, positions, cache: forward(ids, mask, 3 * positions, cache))
    with pytest.raises(ConfigError, match="nats"):
        sampler.check("model")


@pytest.mark.parametrize(("name", "keeps"), [("llama", True), ("deepseek_v3", True), ("bloom", False), ("gpt_neo", False)])
def test_decode_line_is_given_up_where_only_it_is_wrong(name, keeps):
    sampler = sampler_of(name)
    sampler.captures = True
    sampler.check("model")
    assert sampler.captures == keeps


def test_bf16_copy_that_cannot_be_sampled_is_dropped_if_it_was_not_asked_for():
    spec = sampler_of("jamba").spec
    automatic, asked = (from_options({"sampling.dtype": dtype}) for dtype in ("auto", "bfloat16"))
    assert make_sampler(automatic, spec, bf16_copy=True).copy is None
    with pytest.raises(ConfigError, match=r"sampling\.dtype=trainer"):
        make_sampler(asked, spec, bf16_copy=True)


def test_dropout_inside_checkpointed_layers_stays_off():
    model = random_architecture("opt", dropout=0.5)
    ids = torch.arange(8)[None]
    policy = Policy(model, 261, checkpointing=True)
    inputs = Inputs(ids, torch.arange(8))
    hidden = [policy(inputs, lambda hidden_NH, head: hidden_NH) for policy in (policy, Policy(model, 261))]
    assert torch.equal(*hidden)
    hidden[0].sum().backward()


def test_teacher_is_checked_where_it_is_sampled(tmp_path):
    student, teacher = random_architecture("llama"), random_architecture("rwkv")
    with pytest.raises(ConfigError, match=r"^teacher: .*reward_funcs=None"):
        trainer_of(student, teacher, tmp_path).train()
    assert trainer_of(student, teacher, tmp_path, **{"eval.reward": None}).train()["steps"] == 2
    with pytest.raises(ConfigError, match=r"^teacher: "):
        LoadedModel("teacher", teacher, AutoTokenizer.from_pretrained(TOKENIZER), (256,), False).sampler(257, SharedIds(261), 0)


@pytest.mark.parametrize("name", sorted(PACKED | NOT_PACKED))
def test_packed_sequences_that_see_each_other_are_refused(name):
    model = random_architecture(name)
    if name in PACKED:
        check_packing(model, "model")
        return
    with pytest.raises(ConfigError, match=r"^train\.packing: .*train\.packing=false"):
        check_packing(model, "model")


def test_packing_is_checked_for_student_and_teacher(tmp_path):
    for roles in (("lfm2", "llama"), ("llama", "lfm2")):
        with pytest.raises(ConfigError, match=r"^train\.packing: "):
            trainer_of(*map(random_architecture, roles), tmp_path, **{"train.packing": True}).train()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_limit_of_positions_is_that_of_a_table(name):
    assert position_limit(random_architecture(name)) == (POSITIONS if name in TABLES else None)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("sampling.max_new_tokens", "max_new_tokens"),
        ("eval.max_new_tokens", "eval.max_new_tokens"),
        ("eval.kl_max_new_tokens", "eval.kl_max_new_tokens"),
    ],
)
def test_positions_beyond_the_table_are_refused_before_the_run(option, named, tmp_path):
    for roles in (("gpt2", "llama"), ("llama", "gpt2")):
        with pytest.raises(ConfigError, match=rf"{named}.*600.*: .* positions; lower {named} "):
            trainer_of(*map(random_architecture, roles), tmp_path, **{option: 600}).train()


@pytest.mark.parametrize("name", ["gemma4_text", "mamba", "rwkv", "qwen3_5_text", "falcon_h1", "mixtral", "xlstm", "bloom"])
def test_memory_of_any_architecture_is_estimated(name, monkeypatch):
    monkeypatch.setattr(memory, "load_config", lambda *_: settings(name))
    prompts = [Prompt(index, (1,) * 5, "") for index in range(4)]
    config = from_options({"model.path": "m", "teacher.path": "t", "lora.rank": 2 if name == "mixtral" else 0})
    assert memory.estimate(config, 1, CPU, prompts=(prompts, prompts)).peak > 0


def test_cache_of_each_kind_of_layer_is_measured():
    def cache(name, **options):
        with torch.device("meta"):
            model = random_architecture(name, **options)
        return measured.cache_bytes(model.to(torch.bfloat16), 2)

    assert cache("llama") == (2 * 2 * 2 * 2 * 8, 0.0)  # bytes, keys and values, layers, heads, their size
    assert cache("gemma4_text", global_head_dim=16, sliding_window=512)[0] == 2 * 2 * 2 * (8 + 16)
    per_token, states = cache("qwen3_5_text")
    assert per_token == 2 * 2 * 2 * 8 and states > 3 * 2 * 4 * 8 * 8  # one layer of four attends
    assert cache("mamba")[0] == 0 and cache("mamba")[1] > 0
