"""Real weights: SmolLM2-135M-Instruct, downloaded by scripts/fetch_smollm2 (93 MB, once; models/ is kept). Run with -m long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd.config.options import ModelConfig
from opd.models import load as models
from opd.train import main

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def weights() -> Path:
    pytest.importorskip("gguf")
    folder = ROOT / "models"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(Path(sys.executable).parent.parent)}
    subprocess.run([str(ROOT / "scripts" / "fetch_smollm2"), str(folder)], check=True, env=environment)
    return folder


def test_gguf_file_has_the_logits_and_tokens_of_its_model(weights):
    gguf = ModelConfig(path=str(weights / "gguf"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    plain = ModelConfig(path=str(weights / "teacher"))
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        logits = [models.load_model(config, "model", torch.device("cpu"))(ids).logits for config in (gguf, plain)]
    assert torch.allclose(*logits, atol=1e-4)
    tokens = [models.load_tokenizer(config, "model").get_vocab() for config in (gguf, plain)]
    assert tokens[0] == tokens[1]


def test_three_steps_on_real_weights_lower_the_kl(weights, tmp_path, monkeypatch, capfd):
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    options = [f"model.path={weights / 'student'}", f"teacher.path={weights / 'teacher'}", "name=run", "device=cpu"]
    short = ["train.max_steps=3", "train.batch_size=4", "sampling.max_new_tokens=16", "eval.kl_prompts=8", "eval.kl_max_new_tokens=16"]
    # Exact, because three steps of the sampled estimator are too noisy to be sure of a lower KL.
    fast = ["ppo.estimator=exact", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup_steps=0"]
    assert main(["experiment=smollm2", *options, *short, *fast]) == 0, capfd.readouterr().err
    folder = tmp_path / "runs" / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert 0.3 < summary["eval_kl_before"] < 3  # the student lacks three of thirty layers
    assert summary["eval_kl_after"] < 0.9 * summary["eval_kl_before"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["engine_gap"] for line in metrics) < 1e-3
