"""Loading, output heads, shared vocabularies, end-of-sequence tokens, and what is refused."""

import json
import shutil
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.qwen2 import modeling_qwen2

from opd.config.compose import PACKAGE
from opd.config.options import Device, Dtype, ModelConfig
from opd.data.prompts import Prompt
from opd.errors import ConfigError, DataError
from opd.models import load as models
from opd.models import policy

TINY = PACKAGE / "assets" / "tiny-student"
SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        lambda: GraniteForCausalLM(GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=4.0)),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_output_head_gives_the_logits_of_the_model(model):
    torch.manual_seed(0)
    model = model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        ids = torch.randint(3, 31, (2, 9))
        logits = policy.output_head(model).logits(policy.last_hidden(model.base_model, ids).flatten(0, 1)).view(2, 9, -1)
        assert torch.allclose(logits, model(ids).logits, atol=1e-5)
    policy.check_head(model, "model")


def test_architecture_with_other_logits_is_refused(make_model):
    model = make_model()
    original = model.forward
    model.forward = lambda *args, **kwargs: shifted(original(*args, **kwargs))
    with pytest.raises(ConfigError, match="in a way that opd does not know"):
        policy.check_head(model, "model")


def shifted(output):
    output.logits = output.logits + 1
    return output


def test_heads_padded_to_different_widths_are_cut_to_the_narrower(make_model):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    size = len(tokenizer)
    assert models.shared_vocabulary(tokenizer, make_model(size + 3), make_model(size + 11)) == size + 3
    with pytest.raises(ConfigError, match="does not belong to its tokenizer"):
        models.shared_vocabulary(tokenizer, make_model(size - 6), make_model(size))


def test_added_tokens_may_be_without_a_row_but_not_in_a_prompt(make_model):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert models.shared_vocabulary(tokenizer, make_model(size), make_model(size)) == size
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "padding has a row"
    models.check_known([Prompt(0, (1,), "")], tokenizer, size)
    for prompt in (Prompt(3, (1, size), ""), Prompt(3, (1,), "", teacher_ids=(size,))):
        with pytest.raises(DataError, match=rf"row 3: .*'<image>' \({size}\)"):
            models.check_known([prompt], tokenizer, size)


def test_permuted_token_ids_are_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    text = file.read_text().replace('"A": 32', '"A": X').replace('"B": 33', '"B": 32').replace('"A": X', '"A": 33')
    assert text != file.read_text()
    file.write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "swapped")
    assert len(theirs) == len(AutoTokenizer.from_pretrained(TINY))
    with pytest.raises(ConfigError, match=r"maps 2 tokens to other ids than the student's: 'A' \(student 32, teacher 33\), 'B'"):
        models.check_same_ids(AutoTokenizer.from_pretrained(TINY), theirs)


def test_end_of_sequence_ids_of_config_generation_config_and_tokenizer_are_used(make_model):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = make_model(300)
    model.generation_config.eos_token_id = [5, 7]
    assert models.eos_ids(model, tokenizer) == tuple(sorted({1, 5, 7, tokenizer.eos_token_id}))


def test_differences_between_student_and_teacher_are_listed():
    ours, theirs = AutoTokenizer.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    assert models.pair_differences(ours, theirs, ((1,), (1,))) == []
    theirs.chat_template, theirs.pad_token = "{{ messages }}", "<|end|>"
    template, end, padding = models.pair_differences(ours, theirs, ((1,), (2,)))
    assert "chat templates" in template and "end-of-sequence" in end and "'<|pad|>', teacher '<|end|>'" in padding


def test_model_that_cannot_be_loaded_is_one_line_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.path=~no-such-user/x: there is no such folder"):
        models.load_tokenizer(ModelConfig(path="~no-such-user/x"), "model")
    with pytest.raises(ConfigError, match=r"model\.path=\./nowhere: there is no such folder"):
        models.load_tokenizer(ModelConfig(path="./nowhere"), "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    # not a hub id: there is a folder around it
    with pytest.raises(ConfigError, match=r"runs/nam: there is no such folder"):
        models.load_tokenizer(ModelConfig(path="runs/nam"), "model")
    with pytest.raises(ConfigError, match="experiment=tiny needs no download") as caught:
        models.load_tokenizer(ModelConfig(path="no-such-owner/no-such-model"), "teacher")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("teacher.path=")
    with pytest.raises(ConfigError, match="check the folder"):
        models.load_model(ModelConfig(path=str(tmp_path)), "model", torch.device("cpu"))
    with pytest.raises(ConfigError, match="bundled are bundled:tiny-pairs, bundled:tiny-student, bundled:tiny-teacher"):
        models.load_tokenizer(ModelConfig(path="bundled:huge"), "model")


def without(key):
    """Return a function that removes a tensor from a model folder."""

    def change(folder):
        weights = load_file(folder / "model.safetensors")
        del weights[key]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return change


def with_tensors(**tensors):
    def change(folder):
        save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors", {"format": "pt"})

    return change


def with_config(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def saved(kind, config):
    def change(folder):
        (folder / "model.safetensors").unlink()
        kind(config()).save_pretrained(folder)

    return change


def left_over_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def adapter_alone(folder):
    left_over_adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


SIZES = {"vocab_size": 261, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = partial(BertConfig, **SIZES)
QWEN = partial(Qwen2Config, **SIZES, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False)
T5 = partial(T5Config, vocab_size=261, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
BAD_FOLDERS = {
    "an encoder": saved(BertLMHeadModel, BERT),
    "masked words": saved(BertForMaskedLM, BERT),
    "an encoder and a decoder": saved(T5ForConditionalGeneration, T5),
    "a classifier": saved(Qwen2ForSequenceClassification, QWEN),
    "no output head": saved(Qwen2Model, QWEN),
    "a left-over adapter": left_over_adapter,
    "an adapter alone": adapter_alone,
    "a tokenizer alone": lambda folder: [(folder / name).unlink() for name in ("config.json", "model.safetensors")],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half of the weights": cut("model.safetensors", 1000),
    "an empty file of weights": cut("model.safetensors", 0),
    "half of a config": cut("config.json", 20),
    "half of a tokenizer": cut("tokenizer.json", 20),
    "a missing matrix": without("model.layers.0.mlp.up_proj.weight"),
    "a missing bias": without("model.layers.1.self_attn.q_proj.bias"),
    "scales of quantised weights": with_tensors(**{"model.layers.0.mlp.up_proj.SCB": torch.ones(1)}),
    "weights that are not numbers": with_tensors(**{"model.norm.weight": torch.full((64,), torch.nan)}),
    "fewer layers in config.json": with_config(num_hidden_layers=1, layer_types=["full_attention"]),
    "more layers in config.json": with_config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
    "another vocabulary in config.json": with_config(vocab_size=300),
    "quantised weights": with_config(quantization_config={"quant_method": "unheard-of"}),
}


def load_student(folder):
    config, cpu = ModelConfig(path=str(folder)), torch.device("cpu")
    models.load_tokenizer(config, "model")
    policy.prepare_student(models.load_model(config, "model", cpu), cpu)


@pytest.mark.parametrize("change", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folder_without_a_whole_causal_model_is_refused_in_one_short_line(change, tmp_path):
    folder = shutil.copytree(PACKAGE / "assets" / "tiny-student", tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError, match=r"^model(\.path=|: )") as caught:
        load_student(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_second_head_beside_the_weights_is_left_out(tmp_path):
    folder = shutil.copytree(PACKAGE / "assets" / "tiny-student", tmp_path / "model")
    with_tensors(**{"v_head.summary.weight": torch.zeros(1, 64)})(folder)
    load_student(folder)


def test_path_of_a_file_or_of_a_run_names_the_folder_instead(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(PACKAGE / "assets" / "tiny-student", run / "final")
    for path, remedy in ((run, "model.path=.*/run/final"), (run / "final" / "model.safetensors", "name its folder")):
        with pytest.raises(ConfigError, match=remedy):
            models.load_tokenizer(ModelConfig(path=str(path)), "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_device_is_refused():
    with pytest.raises(ConfigError, match=r"device=cuda: torch .* sees no such device"):
        models.find_device(Device.cuda)
    assert models.find_device(Device.cpu).type == "cpu"


def test_student_weights_are_float32_and_teacher_weights_follow_dtype(monkeypatch):
    cpu = torch.device("cpu")
    bundled = ModelConfig(path="bundled:tiny-student", dtype=Dtype.bfloat16)
    assert models.load_model(bundled, "model", cpu).dtype == torch.float32
    assert models.load_model(bundled, "teacher", cpu).dtype == torch.bfloat16
    under_adapters = models.load_model(bundled, "model", cpu, frozen=True)
    assert under_adapters.dtype == torch.bfloat16  # float32 would need twice the memory of the run
    weights, buffers = under_adapters.named_parameters(), dict(policy.prepare_student(under_adapters, cpu, True, True).named_buffers())
    assert {weight.dtype for _, weight in weights} == {torch.bfloat16}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}  # rotary frequencies
    assert models.computes_in_bf16(Dtype.bfloat16, cpu) and not models.computes_in_bf16(Dtype.float32, cpu)
    for is_fast in (True, False):
        monkeypatch.setattr(models, "is_fast_in_bf16", lambda device, is_fast=is_fast: is_fast)
        assert models.computes_in_bf16(Dtype.auto, cpu) is is_fast


def test_liger_changes_the_model_and_no_other_one_of_its_family(monkeypatch):
    """Which may be on a CPU, or without storage."""

    def not_here(*args):
        raise AssertionError("a kernel without a GPU")

    class FusedNorm(nn.Module):
        forward = not_here

    def apply(model, rope, rms_norm, **others):
        modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2RMSNorm = not_here, FusedNorm
        model.model.norm.eps = "fused"

    package = ModuleType("liger_kernel.transformers")
    package.monkey_patch = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen2": apply}, _apply_liger_kernel_to_instance=apply)
    monkeypatch.setattr(policy, "find_spec", lambda name: object())
    for name, module in (("liger_kernel", ModuleType("liger_kernel")), (package.__name__, package)):
        monkeypatch.setitem(sys.modules, name, module)
    before = {name: getattr(modeling_qwen2, name) for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm")}
    ids = torch.arange(5)[None]
    expected = random_model()(ids).logits
    model = random_model()
    try:
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setattr(Qwen2ForCausalLM, "device", torch.device("cuda"))
                assert policy.fuse_layers(model)
        assert model.model.norm.eps == "fused"
        assert torch.equal(random_model()(ids).logits, expected)
        rotary = modeling_qwen2.apply_rotary_pos_emb
        with pytest.raises(AssertionError, match="a kernel"):
            rotary(SimpleNamespace(is_cuda=True))
        assert rotary.plain is before["apply_rotary_pos_emb"]
    finally:
        vars(modeling_qwen2).update(before)
