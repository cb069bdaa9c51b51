"""No secret reaches a file: it is refused, by its name or by its look, before anything is written."""

from pathlib import Path

import pytest

from opd.cli import hydra_app as entry
from opd.config import secrets
from opd.errors import ConfigError

LOOK = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "word",
    [
        f"model.path={LOOK}",
        "+data.options.api_key=abc",
        "data.options.password='hunter2'",
        "hydra.job.env_set.HF_TOKEN=abc",
        "model.path=https://me:hunter2@example.org/model",
        f"name=sk-{'x1' * 12}",
        LOOK,
    ],
)
def test_a_secret_on_the_command_line_is_refused_unseen_and_unwritten(word, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert entry.launch(lambda *_: None, ["experiment=debug", word]) == 64
    said = capfd.readouterr().err
    assert "looks like a secret" in said
    assert not any(part in said for part in (LOOK, "abc", "hunter2", "x1x1"))
    assert not list(tmp_path.rglob("*"))


def test_a_secret_from_the_environment_is_refused_too(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", LOOK)
    assert entry.launch(lambda *_: None, ["experiment=debug", "model.path=${oc.env:MY_TOKEN}"]) == 64
    assert "model.path: looks like a secret" in capfd.readouterr().err
    assert not any(LOOK in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "word",
    ["sampling.max_new_tokens=8", "data.options.token=null", "model.path=Qwen/Qwen2.5-0.5B", "sampling.vllm.url=http://localhost:8000"],
)
def test_what_is_none_is_not_taken_for_one(word):
    secrets.refuse_in_words([word])


def test_texts_in_lists_are_looked_at():
    with pytest.raises(ConfigError, match="targets"):
        secrets.refuse_in_config({"lora": {"targets": ["q_proj", LOOK]}})
