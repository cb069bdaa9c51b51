"""A quantised base under adapters, and an optimizer with states in 8 bits; most of it needs bitsandbytes (extra `quantized`)."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.api import from_options
from opd.cli.main import main as opd
from opd.config.compose import PACKAGE
from opd.config.options import TeacherWeights
from opd.errors import ConfigError
from opd.models import load as models
from opd.models.masters import MasterWeights
from opd.models.memory import estimate, optimizer_bytes
from opd.models.policy import add_adapters, prepare_student
from opd.samplers.weights import merged_copy
from opd.train import main
from opd.training.build import make_optimizer
from opd.training.checkpoint import Checkpoints
from opd.training.inputs import Given
from opd.training.pair import check_sharding, load_student
from opd.training.tensors import model_tensors, restore, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that transformers is leaving

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]
DEBUG = ("experiment=debug", "device=cpu", "train.max_steps=4", "eval=kl", "eval.kl_prompts=0")
QUANTISED = ("lora=default", "lora.rank=64", "optim.lr=1e-3")  # 64 x 64 numbers are enough for states in 8 bits


@pytest.fixture
def bitsandbytes():
    pytest.importorskip("peft")
    return pytest.importorskip("bitsandbytes")


def options(**values):
    values = {"lora.rank": 4, "model.dtype": "float32", **{name.replace("__", "."): value for name, value in values.items()}}
    return from_options({"model.path": "bundled:tiny-teacher", "teacher.path": "bundled:tiny-student", **values})


def student(**values):
    """Return a quantised student with adapters that change it."""
    config = options(**values)
    model = prepare_student(models.load_model(config.model, "model", CPU), CPU, frozen=True)
    add_adapters(model, config.lora)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def adapter_gradients(model):
    model.zero_grad()
    model(IDS).logits.log_softmax(-1)[..., 5].mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merged_copy_is_the_quantised_model_up_to_rounding(bitsandbytes, quantization):
    model = student(model__quantization=quantization)
    with torch.no_grad():
        expected = model(IDS).logits.log_softmax(-1)
        merged = merged_copy(model, torch.float32)
        assert torch.equal(model(IDS).logits.log_softmax(-1), expected)  # nothing was dequantized in place
        gap = (merged(IDS).logits.log_softmax(-1) - expected).abs().mean()
    assert merged.state_dict().keys() == AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / "tiny-teacher").state_dict().keys()
    assert not hasattr(merged.config, "quantization_config")
    assert gap < (1e-4 if quantization == "nf4" else 0.1)  # int8 rounds activations too


def test_adapters_on_4_bit_weights_have_the_gradients_of_those_on_the_dequantized_weights(bitsandbytes):
    """After a pass without gradients, at which bitsandbytes repacks the weights where the CPU multiplies bf16."""
    model = student(model__quantization="nf4")
    with torch.no_grad():
        model(IDS)
    plain = student(model__quantization="nf4")
    adapters = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            if ".lora_" in name:
                tensor.zero_()
    dequantized = merged_copy(plain, torch.float32).requires_grad_(False)
    add_adapters(dequantized, options().lora)
    dequantized.load_state_dict(adapters, strict=False)
    expected = adapter_gradients(dequantized)
    assert expected.abs().max() > 0
    assert torch.allclose(adapter_gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_masters_leave_quantised_weights_alone(bitsandbytes):
    model = student(model__quantization="nf4", model__dtype="bfloat16")
    packed = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.is_floating_point()}
    masters = MasterWeights(model)
    kept = dict(model.named_parameters())
    assert packed and all(torch.equal(kept[name], tensor) for name, tensor in packed.items())
    assert all("lora_" in name for name in masters.names) and {tensor.dtype for tensor in kept.values()} == {torch.bfloat16, torch.uint8}


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_quantised_run_resumes_bitwise_with_adapters_alone_and_measures_its_merge(bitsandbytes, quantization, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run = [*DEBUG, *QUANTISED, f"model.quantization={quantization}", "optim.name=adamw8bit"]
    assert main([*run, "name=run"]) == 0
    folder = tmp_path / "runs" / "run"
    half = folder / "checkpoints" / "step_000002"
    assert main([*run, "name=again", f"resume={half}"]) == 0
    again = tmp_path / "runs" / "again"
    for name in ("model", "optimizer"):
        one, other = (load_file(path / "checkpoints/step_000004" / f"{name}.safetensors") for path in (folder, again))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert name == "optimizer" or all(".lora_" in key for key in one)
    final, repeated = (load_file(path / "final" / "model.safetensors") for path in (folder, again))
    assert all(torch.equal(final[name], repeated[name]) for name in final)
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}  # as in the folder of the bundled student
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["merge_gap"] < 0.1 and f"{summary['merge_gap']:.1e} nats" in (folder / "final/README.md").read_text()
    assert "quantization_config" not in json.loads((folder / "final" / "config.json").read_text())
    capfd.readouterr()
    assert opd(["export", str(folder / "checkpoints/step_000004"), "--out", "out"]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name].bfloat16(), final[name]) for name in final)
    assert main([*DEBUG, *QUANTISED, "name=run", "optim.name=adamw8bit"]) == 64  # another run
    assert "model.quantization" in capfd.readouterr().err


def test_quantised_base_is_its_own_teacher_in_one_copy(bitsandbytes):
    config = options(model__quantization="nf4", teacher__path="bundled:tiny-teacher", teacher__system="s")
    assert config.teacher_weights is TeacherWeights.base and estimate(config, 1, CPU).resident["teacher"] == 0


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_estimate_of_a_quantised_student_is_its_size(bitsandbytes, quantization):
    config = options(model__quantization=quantization)
    model = student(model__quantization=quantization)
    resident = estimate(config, 1, CPU).resident
    assert resident["student"] == pytest.approx(model.get_memory_footprint(), rel=0.1)
    plain = AutoModelForCausalLM.from_pretrained(PACKAGE / "assets/tiny-teacher")
    matrices = sum(weight.numel() for name, weight in plain.named_parameters() if "layers" in name and weight.ndim == 2)
    assert resident["mapped files"] == 2 * matrices  # of bf16
    assert "mapped files" not in estimate(config, 1, torch.device("cuda")).resident


def test_quantised_weights_are_refused_where_they_cannot_be(bitsandbytes):
    quantised, small = options(model__quantization="nf4"), options(optim__name="adamw8bit")
    for config, option in ((quantised, r"model\.quantization=nf4"), (small, r"optim\.name=adamw8bit")):
        check_sharding(config, sharded=False)
        with pytest.raises(ConfigError, match=rf"^{option}: FSDP2.*launch\.config_file=null"):
            check_sharding(config, sharded=True)
    with pytest.raises(ConfigError, match=r"^model\.quantization=nf4: .*pass the model's path"):
        load_student(quantised, Given(student=random_model()), CPU, False)


@pytest.mark.parametrize("option", ["model.quantization=nf4", "optim.name=adamw8bit"])
def test_missing_bitsandbytes_is_refused_with_the_extra_to_install(monkeypatch, option):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    name, _, value = option.partition("=")
    config = options(optim__lr=1e-3, **{name.replace(".", "__"): value})

    def load():
        models.load_model(config.model, "model", CPU)
        make_optimizer(config, [torch.zeros(2, requires_grad=True)])

    with pytest.raises(ConfigError, match=rf"^{option} .*pip install 'opd\[quantized\]'"):
        load()


# AdamW with states in 8 bits.


def step_on(model, optimizer):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_8_bit_states_are_small_and_step_nearly_as_far(bitsandbytes):
    exact, small = (random_model(vocabulary=300, hidden=64) for _ in range(2))
    optimizers = [make_optimizer(options(optim__name=name, optim__lr=1e-2), list(model.parameters())) for name, model in
                  (("adamw", exact), ("adamw8bit", small))]  # fmt: skip
    start = {name: tensor.detach().clone() for name, tensor in small.named_parameters()}
    for _ in range(3):
        for model, optimizer in zip((exact, small), optimizers, strict=True):
            step_on(model, optimizer)
    moved = []
    for model in (exact, small):
        moved.append(torch.cat([(weight.detach() - start[name]).flatten() for name, weight in model.named_parameters()]))
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.1
    states = [tensor for state in optimizers[1].state.values() for name, tensor in state.items() if name not in ("step", "qmap1", "qmap2")]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in states)
    assert kept == pytest.approx(optimizer_bytes(small, options(optim__name="adamw8bit").optim.name), rel=0.01)
    assert kept < 0.35 * optimizer_bytes(exact, options().optim.name)


def test_restored_8_bit_optimizer_continues_bitwise(bitsandbytes, tmp_path):
    checkpoints, model = Checkpoints(tmp_path, 2, True), random_model(vocabulary=300, hidden=64)
    optimizer = make_optimizer(options(optim__name="adamw8bit"), list(model.parameters()))
    for _ in range(2):
        step_on(model, optimizer)
    checkpoints.save(snapshot(model_tensors(model), optimizer, {"step": 2, "inner": 0}))
    other = random_model(vocabulary=300, hidden=64, seed=1)
    fresh = make_optimizer(options(optim__name="adamw8bit"), list(other.parameters()))
    restore(checkpoints.newest(), model_tensors(other), fresh)
    for pair in ((model, optimizer), (other, fresh)):
        step_on(*pair)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    one, two = (
        snapshot(model_tensors(m), o, {"step": 3, "inner": 0}).files["optimizer.safetensors"]
        for m, o in ((model, optimizer), (other, fresh))
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.uint8, torch.float32, torch.int64}
