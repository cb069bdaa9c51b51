"""Adapters as inputs: trained further, merged, or refused in one line."""

import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.api import from_options
from opd.config.compose import PACKAGE
from opd.config.options import TeacherWeights
from opd.errors import ConfigError
from opd.models import load as models
from opd.models.adapters import load_adapter, lora_options, trained_adapters
from opd.models.memory import estimate
from opd.train import main

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that transformers is leaving

CPU = torch.device("cpu")
BASE = PACKAGE / "assets" / "tiny-student"
IDS = torch.arange(3, 40)[None]
DEBUG = ("experiment=debug", "device=cpu", "name=run")


def save_adapter(folder, base=BASE, **settings):
    """Save an adapter with weights that change the model, and return the logits of the adapted model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() if not isinstance(base, torch.nn.Module) else base
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    torch.manual_seed(0)  # before the adapter is made: its first matrix is random too
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return adapted.eval()(IDS).logits


def options(**values):
    values = {"lora.alpha": 8, "lora.rank": 4, **{name.replace("__", "."): value for name, value in values.items()}}
    if values["lora.rank"] == 0:
        del values["lora.alpha"]  # which nothing reads
    return from_options({"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher", **values})


def change_settings(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("role", ["model", "teacher"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_merged_adapter_has_the_logits_of_the_adapted_model(tmp_path, role, settings):
    expected = save_adapter(tmp_path, **settings)
    config = options(lora__rank=0, model__adapter=str(tmp_path), teacher__path="bundled:tiny-student", teacher__adapter=str(tmp_path))
    merged = models.load_model(getattr(config, role), role, CPU).eval()
    plain = models.load_model(options().model, "model", CPU).eval()
    assert merged.state_dict().keys() == plain.state_dict().keys()  # as a plain model, all of whose weights can be trained
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits.float(), expected, atol=1e-4 if merged.dtype == torch.float32 else 0.5)
        assert float((plain(IDS).logits - expected).abs().mean()) > 0.5


def test_adapter_is_trained_further_from_its_own_weights(tmp_path):
    expected = save_adapter(tmp_path)
    config = options(model__adapter=str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).requires_grad_(False)
    trained_adapters(model, config)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    all_linear = estimate(options(), 1, CPU).resident["optimizer"]
    assert (
        estimate(config, 1, CPU).resident["optimizer"] == 2 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) < all_linear
    )


def test_run_continues_an_adapter_resumes_and_exports_it(tmp_path, monkeypatch):
    from opd.cli.main import main as opd

    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "adapter")
    trained = ["model.adapter=adapter", "lora.rank=4", "lora.alpha=8", "train.max_steps=2", "optim.lr=1e-5", "eval=kl", "eval.kl_prompts=0"]
    assert main([*DEBUG, *trained]) == 0
    run = tmp_path / "runs" / "run"
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = load_file(run / "checkpoints" / "step_000002" / "model.safetensors")
    assert len(saved) == len(start)
    for name, tensor in start.items():
        stored = saved[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
        assert torch.allclose(stored, tensor, atol=1e-4) and not (torch.equal(stored, tensor) and "lora_B" in name)
    assert opd(["export", str(run / "checkpoints" / "step_000002"), "--out", "out"]) == 0
    exported, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "final"))
    assert all(torch.allclose(exported[name], final[name], atol=1e-6) for name in final)
    before = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).state_dict()
    assert any(float((final[name] - before[name]).abs().max()) > 0.01 for name in final)  # the adapter that was loaded is in it
    assert main([*DEBUG, *trained, "model.adapter=null"]) == 64  # another run


def test_teacher_with_an_adapter_is_not_the_base_of_the_student(tmp_path):
    save_adapter(tmp_path)
    shared = {"teacher__path": "bundled:tiny-student", "teacher__system": "s"}
    assert options(**shared).teacher_weights is TeacherWeights.base
    assert options(**shared, model__adapter=str(tmp_path)).teacher_weights is TeacherWeights.base
    assert options(**shared, teacher__adapter=str(tmp_path)).teacher_weights is TeacherWeights.own


def missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def not_numbers(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"no")


def another_kind(folder):
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(folder)


def more_tensors(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name.replace("layers.0", "layers.9"): tensors[name].clone()}, file)


def fewer_tensors(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)


BAD = {
    "no adapter": (missing, "adapter_model.safetensors is missing"),
    "damaged weights": (not_numbers, "does not fit"),
    "damaged settings": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    "no kind": (lambda folder: change_settings(folder, peft_type=None), "cannot be read"),
    "another kind": (another_kind, "only LoRA"),
    "names no module": (lambda folder: change_settings(folder, target_modules=["c_attn"]), "c_attn"),
    "another rank": (lambda folder: change_settings(folder, r=2), "does not fit"),
    "a layer more": (more_tensors, "do not match"),
    "a tensor less": (fewer_tensors, "do not match"),
}


@pytest.mark.parametrize(("change", "part"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("role", ["model", "teacher"])
def test_folder_that_is_no_adapter_of_the_model_is_refused_in_one_line(tmp_path, change, part, role):
    save_adapter(tmp_path)
    change(tmp_path)
    config = options(lora__rank=0, model__adapter=str(tmp_path), teacher__path="bundled:tiny-student", teacher__adapter=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^{role}\.adapter=") as caught:
        models.load_model(getattr(config, role), role, CPU)
    assert part in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 64


def test_adapter_of_another_shape_is_refused(tmp_path):
    save_adapter(tmp_path, random_model(64, hidden=32))
    with pytest.raises(ConfigError, match=r"^model\.adapter=.*does not fit Qwen2ForCausalLM.*name an adapter of model\.path"):
        models.load_model(options(lora__rank=0, model__adapter=str(tmp_path)).model, "model", CPU)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"lora__rank": 16}, r"^lora\.rank=16: .*set lora\.rank=4 lora\.alpha=8"),
        ({"lora__alpha": 32}, r"^lora\.rank=4: .*lora\.alpha=8"),
        ({"lora__targets": ["q_proj"]}, r"^lora\.rank=4: .*lora\.targets=\[q_proj,v_proj\]"),
    ],
)
def test_lora_options_that_are_not_the_adapters_are_refused_with_the_right_ones(tmp_path, asked, said):
    save_adapter(tmp_path)
    with pytest.raises(ConfigError, match=said):
        lora_options(options(model__adapter=str(tmp_path), **asked))
    assert lora_options(options(model__adapter=str(tmp_path), lora__targets=["v_proj", "q_proj"])).rank == 4


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_parts_that_are_not_trained_here_are_refused_unless_the_adapter_is_merged(tmp_path, settings):
    save_adapter(tmp_path)
    change_settings(tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"^model\.adapter=.*" + next(iter(settings)) + r".*lora\.rank=0"):
        lora_options(options(model__adapter=str(tmp_path)))


def test_model_folder_with_an_adapter_is_refused_with_the_option_to_use(tmp_path):
    save_adapter(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.path=.*contains an adapter.*model\.adapter="):
        models.load_model(options(model__path=str(tmp_path)).model, "model", CPU)


def test_adapter_without_peft_is_refused_with_the_extra_to_install(tmp_path, monkeypatch):
    from opd.models import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^teacher\.adapter=.*pip install 'opd\[lora\]'"):
        models.load_model(options(teacher__adapter=str(tmp_path)).teacher, "teacher", CPU)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # from peft, before the refusal
def test_adapters_on_the_output_head_are_refused_where_they_would_not_be_trained_or_change_a_tied_embedding(tmp_path):
    for tied in (False, True):
        folder = tmp_path / str(tied)
        save_adapter(folder, random_model(64, tie_word_embeddings=tied), target_modules=["q_proj", "lm_head"])
        with pytest.raises(ConfigError, match=r"^model\.adapter=.*output head"):
            trained_adapters(random_model(64, tie_word_embeddings=tied), options(model__adapter=str(folder)))
        with pytest.raises(ConfigError, match=r"^lora\.targets=.*output head"):
            trained_adapters(random_model(64, tie_word_embeddings=tied), options(lora__targets=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match=r"^model\.adapter=.*output head"):
        load_adapter(random_model(64, tie_word_embeddings=True), options(model__adapter=str(folder)).model, "model")
    load_adapter(random_model(64), options(model__adapter=str(tmp_path / "False")).model, "model")
