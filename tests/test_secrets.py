"""No secret reaches a file: an option is refused by its name, or its value by its format, before any file exists."""

from pathlib import Path

import pytest

from opd.cli import hydra_app
from opd.config import secrets
from opd.errors import ConfigError

TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "word",
    [
        f"model.path={TOKEN}",
        "+data.options.api_key=abc",
        "data.options.password='hunter2'",
        "hydra.job.env_set.HF_TOKEN=abc",
        "model.path=https://me:hunter2@example.org/model",
        f"name=sk-{'x1' * 12}",
        TOKEN,
    ],
)
def test_secret_on_the_command_line_is_refused_without_showing_or_storing_it(word, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert hydra_app.run_verb(lambda *_: None, ["experiment=debug", word]) == 64
    complaint = capfd.readouterr().err
    assert "looks like a secret" in complaint and "HF_TOKEN" in complaint
    assert not any(part in complaint for part in (TOKEN, "abc", "hunter2", "x1x1"))
    assert not list(tmp_path.rglob("*"))


def test_secret_from_the_environment_is_refused(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_VARIABLE", TOKEN)
    assert hydra_app.run_verb(lambda *_: None, ["experiment=debug", "model.path=${oc.env:MY_VARIABLE}"]) == 64
    assert "model.path: looks like a secret" in capfd.readouterr().err
    assert not any(TOKEN in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "word",
    ["sampling.max_new_tokens=8", "data.options.token=null", "model.path=Qwen/Qwen2.5-0.5B", "sampling.vllm.url=http://localhost:8000"],
)
def test_ordinary_values_are_not_refused_as_secrets(word):
    secrets.refuse_in_words([word])


def test_secret_in_a_list_is_refused():
    with pytest.raises(ConfigError, match="targets"):
        secrets.refuse_in_config({"lora": {"targets": ["q_proj", TOKEN]}})
