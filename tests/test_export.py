"""Model cards, generation configs, and exported models: the trained weights, in the requested dtype and folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.cli.main import main as opd
from opd.config.compose import PACKAGE, to_config
from opd.config.schema import Config
from opd.data import hub
from opd.train import main
from opd.training.export import generation_config
from opd.training.model_card import base_licence, front_matter, model_card

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


def test_the_model_card_names_base_method_and_result():
    card = model_card(config(teacher__revision="abc123", name="mine", optim__lr=3e-5), SUMMARY, "bfloat16")
    front = front_matter(card)
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct" and front["datasets"] == ["openai/gsm8k"]
    assert front["library_name"] == "transformers" and "license" not in front and "Unknown here" in card
    for part in (
        "# mine", "`Qwen/Qwen2.5-1.5B-Instruct` at revision `abc123`", "| reward | 50.0% [40.0, 60.0] | 75.0% [70.0, 80.0] | 100.0% [",
        "| KL(student‖teacher), nats/token | 2.000 | 1.000 | 0 |", "50.0% of the gap", "7 steps, 1,234 trained tokens",
        "sampled, reverse_kl", "3e-05, cosine", "opd 9.9, torch 8.8", "weights in bfloat16", "greedy decoding, at most 512 new tokens",
        "generation_config.json", "max_new_tokens",
    ):  # fmt: skip
        assert part in card, part


def test_the_model_card_names_adapters_given_completions_and_the_anchor():
    options = {"model__adapter": "runs/a", "lora__rank": 4, "teacher__adapter": "b", "data__completion": "text"}
    card = model_card(config(**options, train__given_share={0: 1.0, 5: 0}, ppo__reference_coef=0.1), SUMMARY, "bfloat16")
    for part in (
        "- student: `Qwen/Qwen2.5-0.5B-Instruct` at revision `main` with the adapter `runs/a`",
        "the adapter `b`",
        "{0: 1.0, 5: 0",
        "0.1 |",
    ):
        assert part in card, part


def test_the_front_matter_of_a_card_is_yaml_for_any_names(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: 'a: b\"'\nlicense_link: https://x.y/z\n---\n# Base\n")
    card = model_card(config(model__path=str(tmp_path / "base"), teacher__system="a: '`#\n---\n", teacher__path="o/t"), {})
    front = front_matter(card)
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", 'a: b"', "https://x.y/z")
    assert "base_model" not in front and yaml.safe_load(card.split("---\n")[1]) == front
    assert "| reward | – | – | – |" in card and "– steps" in card


@pytest.mark.parametrize(
    "card", ["", "# no head", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n", "---\nlicense: mit\n"]
)
def test_a_base_model_without_a_readable_licence_has_none(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert base_licence(config(model__path=str(tmp_path)).model) == {}


def test_the_licence_of_a_hub_model_is_read_from_its_card_and_unknown_offline(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "model_card", lambda *what: asked.append(what) or "---\nlicense: apache-2.0\ntags: [a]\n---\n")
    assert base_licence(config(model__revision="r1").model) == {"license": "apache-2.0"} and asked == [("Qwen/Qwen2.5-0.5B-Instruct", "r1")]
    monkeypatch.undo()
    assert hub.model_card("no/such", None) == ""  # tests are offline


def test_the_generation_config_decodes_like_the_evaluation_without_its_limit():
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    greedy = generation_config(config(eval__max_new_tokens=9), (1, 2), tokenizer)
    assert (greedy.do_sample, greedy.max_new_tokens, greedy.eos_token_id) == (False, None, [1, 2])
    assert greedy.pad_token_id == tokenizer.pad_token_id
    drawn = generation_config(config(eval__temperature=0.5), (1,), tokenizer)
    assert (drawn.do_sample, drawn.temperature, drawn.top_k, drawn.top_p, drawn.repetition_penalty or 1.0) == (True, 0.5, 0, 1.0, 1.0)


def test_a_finished_run_has_a_model_card_and_no_limit_of_new_tokens(debug_run):
    card = (debug_run / "final" / "README.md").read_text(encoding="utf-8")
    summary = json.loads((debug_run / "summary.json").read_text())
    assert front_matter(card)["license"] == "apache-2.0" and f"{summary['reward_after']:.1%} [" in card
    assert f"torch {torch.__version__}" in card and "weights in float32" in card
    decoding = json.loads((debug_run / "final" / "generation_config.json").read_text())
    assert {"do_sample", "eos_token_id", "pad_token_id"} <= set(decoding) and not {"max_new_tokens", "max_length"} & set(decoding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_of_a_run_in_each_dtype(debug_run, tmp_path, capfd, dtype):
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


def test_export_of_checkpoints_has_their_own_weights_and_card(debug_run, tmp_path):
    for step in (4, 6):
        assert opd(["export", str(debug_run / f"checkpoints/step_00000{step}"), "--out", str(tmp_path / str(step))]) == 0
    final = weights(debug_run / "final")
    assert same(weights(tmp_path / "6"), final) and not same(weights(tmp_path / "4"), final)
    summary = json.loads((debug_run / "summary.json").read_text())
    cards = {step: (tmp_path / str(step) / "README.md").read_text(encoding="utf-8") for step in (4, 6)}
    assert f"| {summary['reward_after']:.1%} [" in cards[6] and "6 steps" in cards[6]
    assert "4 steps" in cards[4] and "checkpoint `step_000004`" in cards[4] and "| – |" in cards[4]  # there was no evaluation after step 4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that transformers is leaving
def test_export_of_a_checkpoint_merges_its_adapters(tmp_path, monkeypatch):
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


def test_export_overwrites_nothing_and_refuses_unfinished_runs_and_damaged_checkpoints(debug_run, tmp_path, capfd):
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
        (str(debug_run), "--out", str(full)): (74, "--out"),
        (str(half), "--out", new): (65, "checkpoints instead"),
        (str(damaged), "--out", new): (65, "nor an intact checkpoint"),
        (str(tmp_path / "nowhere"), "--out", new): (65, "there is no such folder"),
        (str(debug_run), "--out", "/proc/new"): (74, "--out /proc/new: no folder can be made in /proc"),
        (str(half), "--best", "--out", new): (65, "no evaluation after step 0 has a checkpoint"),
        (str(debug_run),): (64, "--out"),
        (str(debug_run), "--out", new, "--dtype", "int4"): (64, "int4"),
        (str(debug_run), "--out", new, "--push", "mine"): (64, "OWNER/NAME"),
    }
    for words, (code, part) in mistakes.items():
        assert opd(["export", *words]) == code, words
        message = capfd.readouterr().err
        assert part in message and len(message.splitlines()) == 1 and "drop" not in message, message
    assert not Path(new).exists() and [file.name for file in full.iterdir()] == ["mine.txt"]


class FakeHub:
    """Records the requests to the hub's client."""

    requests: tuple = ()
    refuses = False

    def create_repo(self, repository, **options):
        if FakeHub.refuses:
            raise OSError("401 Client Error\nmore")
        FakeHub.requests += (("create", repository, options["private"]),)
        return f"https://hub.example/{repository}"

    def upload_folder(self, repo_id, folder_path, **_):
        FakeHub.requests += (("upload", repo_id, sorted(file.name for file in Path(folder_path).iterdir())),)


def test_export_uploads_only_when_asked(debug_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    assert opd(["export", str(debug_run), "--out", str(tmp_path / "kept")]) == 0
    assert FakeHub.requests == ()
    assert opd(["export", str(debug_run), "--out", str(tmp_path / "out"), "--push", "me/small"]) == 0
    created, uploaded = FakeHub.requests
    assert created == ("create", "me/small", True) and uploaded[:2] == ("upload", "me/small")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(uploaded[2])
    assert capfd.readouterr().out.endswith("https://hub.example/me/small\n")
    monkeypatch.setattr(FakeHub, "refuses", True)
    assert opd(["export", str(debug_run), "--out", str(tmp_path / "refused"), "--push", "me/small"]) == 74
    assert "401 Client Error; log in" in capfd.readouterr().err and (tmp_path / "refused" / "config.json").is_file()
