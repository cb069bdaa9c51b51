"""The recipes on GSM8K, on small stand-ins for models and data of the same columns."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_config import compose
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.runs.reader import find_runs

RECIPES = {"qwen05b_gsm8k": ("Qwen2.5-0.5B", "Qwen2.5-1.5B"), "qwen15b_gsm8k": ("Qwen2.5-1.5B", "Qwen2.5-3B")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_evaluates_on_all_test_rows_of_gsm8k(recipe: str) -> None:
    config = compose(f"experiment={recipe}")
    assert (config.model.path, config.teacher.path) == tuple(f"Qwen/{name}-Instruct" for name in RECIPES[recipe])
    assert (config.data.path, config.data.eval_split, config.eval.limit, config.eval.reward) == ("openai/gsm8k", "test", None, "number")
    assert config.train.max_steps % config.eval.steps == 0


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_with_controls_and_seeds_and_says_what_the_teacher_accounts_for(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny-student")
    for role in ("student", "teacher"):
        AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / f"tiny-{role}").save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 12), ("test", 510)):  # more than eval.limit is by default
        rows = [{"question": f"{i}+3=", "answer": f"{i}+3=<<{i}+3={i + 3}>>{i + 3}\n#### {i + 3:,}"} for i in range(count)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small: dict[str, Any] = {
        "model.path": "student",
        "teacher.path": "teacher",
        "data.path": "gsm8k",
        "data.subset": "null",
        "device": "cpu",
        "train.max_steps": 2,
        "sampling.max_new_tokens": 6,
        "eval.max_new_tokens": 6,
        "eval.kl_max_new_tokens": 4,
    }
    words = [f"experiment={recipe}", "control=none,constant,shuffled", "seed=0,1,2", *(f"{name}={value}" for name, value in small.items())]
    assert cli.main(["train", "-m", *words]) == 0
    capfd.readouterr()
    assert cli.main(["compare", "sweeps"]) == 0
    sentences = [line for line in capfd.readouterr().out.splitlines() if "accounts for" in line]
    assert len(sentences) == 2 and all("510 prompts and 3 seeds" in line for line in sentences)
    assert len(find_runs([tmp_path / "sweeps"])) == 9
