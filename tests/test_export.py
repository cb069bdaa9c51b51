"""The model card, and models as folders of their own: the weights that were trained, in the dtype asked for, where they were asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.cli import main as opd
from opd.config.compose import PACKAGE, to_config
from opd.config.schema import Config
from opd.data import hub
from opd.train import main
from opd.training.card import base_licence, front_matter, model_card
from opd.training.final import generation_config

DEBUG = ("experiment=debug", "device=cpu")
SUMMARY = {
    "reward_before": 0.5, "reward_before_interval": [0.4, 0.6], "reward_after": 0.75, "reward_after_interval": [0.7, 0.8],
    "reward_teacher": 1.0, "reward_teacher_interval": [0.9, 1.0], "gap_closed": 0.5, "eval_kl_before": 2.0, "eval_kl_after": 1.0,
    "steps": 7, "graded_tokens": 1234, "versions": {"opd": "9.9", "torch": "8.8"},
}  # fmt: skip


def config(**options) -> Config:
    base = OmegaConf.structured(Config)
    for key, value in options.items():
        OmegaConf.update(base, key.replace("__", "."), value)
    return to_config(base)


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "model_card", lambda repository, revision: "")


def test_the_card_tells_what_from_how_and_how_good():
    card = model_card(config(teacher__revision="abc123", name="mine", optim__lr=3e-5), SUMMARY, "bfloat16")
    front = front_matter(card)
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct" and front["datasets"] == ["openai/gsm8k"]
    assert front["library_name"] == "transformers" and "license" not in front and "licence is not known" in card
    for part in (
        "# mine", "`Qwen/Qwen2.5-1.5B-Instruct` at revision `abc123`", "| reward | 0.500 [0.400, 0.600] | 0.750 [0.700, 0.800] | 1.000 [",
        "| KL(student‖teacher), nats a token | 2.000 | 1.000 | 0 |", "50.0% of the gap", "7 steps, 1,234 graded tokens",
        "sampled, reverse_kl", "3e-05, cosine", "opd 9.9, torch 8.8", "weights in bfloat16", "greedy decoding, at most 512 new tokens",
    ):  # fmt: skip
        assert part in card, part


def test_the_cards_head_is_yaml_whatever_the_names_are(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: 'a: b\"'\nlicense_link: https://x.y/z\n---\n# Base\n")
    card = model_card(config(model__path=str(tmp_path / "base"), teacher__system="a: '`#\n---\n", teacher__path="o/t"), {})
    front = front_matter(card)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", 'a: b"', "https://x.y/z")
    assert "base_model" not in front and yaml.safe_load(card.split("---\n")[1]) == front
    assert "| reward | – | – | – |" in card and "an unknown number of steps" in card


@pytest.mark.parametrize(
    "card", ["", "# no head", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n", "---\nlicense: mit\n"]
)
def test_a_base_without_a_licence_that_can_be_read_has_none(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert base_licence(config(model__path=str(tmp_path))) == {}


def test_the_licence_of_a_hub_model_is_what_its_card_says_and_unknown_without_a_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "model_card", lambda *what: asked.append(what) or "---\nlicense: apache-2.0\ntags: [a]\n---\n")
    assert base_licence(config(model__revision="r1")) == {"license": "apache-2.0"} and asked == [("Qwen/Qwen2.5-0.5B-Instruct", "r1")]
    monkeypatch.undo()
    assert hub.model_card("no/such", None) == ""  # tests are offline


def test_the_generation_config_decodes_as_the_evaluation_did(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    greedy = generation_config(config(eval__max_new_tokens=9), (1, 2), tokenizer)
    assert (greedy.do_sample, greedy.max_new_tokens, greedy.eos_token_id) == (False, 9, [1, 2])
    drawn = generation_config(config(eval__temperature=0.5), (1,), tokenizer)
    assert (drawn.do_sample, drawn.temperature, drawn.top_k, drawn.top_p, drawn.repetition_penalty or 1.0) == (True, 0.5, 0, 1.0, 1.0)


def test_a_run_ends_with_a_card(debug_run):
    card = (debug_run / "final" / "README.md").read_text(encoding="utf-8")
    summary = json.loads((debug_run / "summary.json").read_text())
    assert front_matter(card)["license"] == "apache-2.0" and f"{summary['reward_after']:.3f} [" in card
    assert f"torch {torch.__version__}" in card and "weights in float32" in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_is_exported_in_the_dtype_asked_for(debug_run, tmp_path, capfd, dtype):
    out = tmp_path / "out"
    assert opd(["export", str(debug_run), "--out", str(out), "--dtype", dtype]) == 0
    assert capfd.readouterr().out == f"{out}\n"
    kind = getattr(torch, dtype)
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {kind} and json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert same(weights(out, kind), {name: tensor.to(kind) for name, tensor in weights(debug_run / "final").items()})
    assert (out / "generation_config.json").read_text() == (debug_run / "final" / "generation_config.json").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(debug_run / "final").chat_template
    assert f"weights in {dtype}" in (out / "README.md").read_text(encoding="utf-8")


def test_the_last_checkpoint_is_the_final_model_and_the_one_before_is_not(debug_run, tmp_path):
    for step in (4, 6):
        assert opd(["export", str(debug_run / f"checkpoints/step_00000{step}"), "--out", str(tmp_path / str(step))]) == 0
    final = weights(debug_run / "final")
    assert same(weights(tmp_path / "6"), final) and not same(weights(tmp_path / "4"), final)
    summary = json.loads((debug_run / "summary.json").read_text())
    cards = {step: (tmp_path / str(step) / "README.md").read_text(encoding="utf-8") for step in (4, 6)}
    assert f"| {summary['reward_after']:.3f} [" in cards[6] and "6 steps" in cards[6]
    assert "4 steps" in cards[4] and "checkpoint `step_000004`" in cards[4] and "| – |" in cards[4]  # there was no evaluation after step 4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that transformers is leaving
def test_adapters_of_a_checkpoint_are_merged(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    options = ["lora=default", "lora.rank=4", "optim.lr=1e-2", "train.max_steps=2"]
    assert main([*DEBUG, "name=run", *options]) == 0
    folder = tmp_path / "runs" / "run"
    assert opd(["export", str(folder / "checkpoints/step_000002"), "--out", "out"]) == 0
    one, other = weights(tmp_path / "out"), weights(folder / "final")
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    base = weights(PACKAGE / "assets" / "tiny-student")
    assert any(not torch.equal(one[name], base[name]) for name in one)


def test_nothing_is_overwritten_or_exported_from_what_is_not_whole(debug_run, tmp_path, capfd):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    half = tmp_path / "half"
    shutil.copytree(debug_run, half, ignore=shutil.ignore_patterns("checkpoints", "final"))
    damaged = tmp_path / "step_000006"
    shutil.copytree(debug_run / "checkpoints/step_000006", damaged)
    (damaged / "model.safetensors").write_bytes(b"no")
    new = str(tmp_path / "new")
    mistakes = {
        (str(debug_run), "--out", str(full)): (74, "there is something already"),
        (str(half), "--out", new): (65, "checkpoints instead"),
        (str(damaged), "--out", new): (65, "nor a whole checkpoint"),
        (str(tmp_path / "nowhere"), "--out", new): (65, "there is no such folder"),
        (str(debug_run),): (64, "--out"),
        (str(debug_run), "--out", new, "--dtype", "int4"): (64, "int4"),
        (str(debug_run), "--out", new, "--push", "mine"): (64, "OWNER/NAME"),
    }
    for words, (code, part) in mistakes.items():
        assert opd(["export", *words]) == code, words
        said = capfd.readouterr().err
        assert part in said and len(said.splitlines()) == 1, said
    assert not Path(new).exists() and [file.name for file in full.iterdir()] == ["mine.txt"]


class StandIn:
    """In the place of the hub's client: notes what it is asked."""

    asked: tuple = ()
    refuses = False

    def create_repo(self, repository, **options):
        if StandIn.refuses:
            raise OSError("401 Client Error\nmore")
        StandIn.asked += (("create", repository, options["private"]),)
        return f"https://hub.example/{repository}"

    def upload_folder(self, repo_id, folder_path, **_):
        StandIn.asked += (("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())),)


def test_only_what_is_asked_for_is_pushed(debug_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hub, "HfApi", StandIn)
    assert opd(["export", str(debug_run), "--out", str(tmp_path / "kept")]) == 0
    assert StandIn.asked == ()
    assert opd(["export", str(debug_run), "--out", str(tmp_path / "out"), "--push", "me/small"]) == 0
    created, uploaded = StandIn.asked
    assert created == ("create", "me/small", True) and uploaded[:2] == ("upload", "me/small")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded[2])
    assert capfd.readouterr().out.endswith("https://hub.example/me/small\n")
    monkeypatch.setattr(StandIn, "refuses", True)
    assert opd(["export", str(debug_run), "--out", str(tmp_path / "refused"), "--push", "me/small"]) == 74
    assert "401 Client Error; log in" in capfd.readouterr().err and (tmp_path / "refused" / "config.json").is_file()
