"""The bundled tiny models: small, loaded like any other model, a teacher that is right and a student that is half right."""

import functools
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd.data.arithmetic import rows

ASSETS = Path(__file__).resolve().parents[1] / "opd" / "assets"
TEACHER, STUDENT, PAIRS = "tiny-teacher", "tiny-student", "tiny-pairs"
BOTH = pytest.mark.parametrize("name", [TEACHER, STUDENT])


@functools.cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32).eval()


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS / name)


def render(name: str, *messages: tuple[str, str]) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    return load_tokenizer(name).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def generated_accuracy(name: str, count: int = 600) -> float:
    """Return the share of `count` eval questions for which the model generates the answer and nothing after it."""
    model, tokenizer, questions = load_model(name), load_tokenizer(name), rows("eval")[:count]
    batch = tokenizer([render(name, ("user", row["prompt"])) for row in questions], padding=True, return_tensors="pt")
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    texts = [text.replace(tokenizer.pad_token, "") for text in tokenizer.batch_decode(tokens)]
    return sum(text == row["answer"] + tokenizer.eos_token for text, row in zip(texts, questions, strict=True)) / count


def test_answers_are_the_reversed_sums_of_two_digit_numbers():
    for row in rows("train") + rows("eval"):
        a, b = row["prompt"].removesuffix("=").split("+")
        assert len(a) == len(b) == 2
        assert row["prompt"] == f"{int(a)}+{int(b)}="
        assert int(row["answer"][::-1]) == int(a) + int(b)
    assert {"prompt": "27+85=", "answer": "211"} in rows("train") + rows("eval")
    assert {"prompt": "10+10=", "answer": "02"} in rows("train") + rows("eval")


def test_splits_are_disjoint_and_together_every_question():
    train, held_out = ({row["prompt"] for row in rows(split)} for split in ("train", "eval"))
    assert (len(rows("train")), len(rows("eval"))) == (len(train), len(held_out)) == (7100, 1000)
    assert not train & held_out
    for split in ("train", "eval"):
        few = rows(split, size=405)
        assert few == rows(split)[: len(few)]
    assert (len(rows("train", size=405)), len(rows("eval", size=405))) == (355, 50)


def test_rows_depend_on_the_seed_alone():
    assert rows("train", seed=3) == rows("train", seed=3)
    assert rows("eval", seed=3) != rows("eval", seed=4)


def test_rows_are_the_same_as_when_the_models_were_trained():
    """The eval questions must stay the ones the bundled models have not seen."""
    assert [row["prompt"] for row in rows("eval")[:3]] == ["93+48=", "11+88=", "64+75="]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        rows("test")


def test_the_models_together_take_at_most_three_megabytes():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 3_000_000


def test_weights_are_safetensors_only():
    weights = {
        str(file.relative_to(ASSETS)) for file in ASSETS.rglob("*") if file.is_file() and file.suffix not in {".json", ".jinja", ".md"}
    }
    assert weights == {f"{name}/model.safetensors" for name in (STUDENT, TEACHER, PAIRS)}


def test_readme_has_the_parameter_counts_of_the_models():
    counts = {name: load_model(name).num_parameters() for name in (TEACHER, STUDENT, PAIRS)}
    assert 600_000 <= counts[TEACHER] <= 1_000_000
    assert 80_000 <= counts[STUDENT] <= 150_000
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    for name, count in counts.items():
        assert any(f"`{name}`" in line and f"{count:,}" in line for line in readme.splitlines())


@BOTH
def test_model_is_a_small_tied_qwen2_that_knows_its_special_tokens(name):
    config, generation, tokenizer = load_model(name).config, load_model(name).generation_config, load_tokenizer(name)
    assert (config.model_type, config.tie_word_embeddings, config.max_position_embeddings) == ("qwen2", True, 512)
    assert config.vocab_size == len(tokenizer) == 261
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    for holder in (config, generation):
        assert (holder.eos_token_id, holder.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 512)


def test_student_and_teacher_have_the_same_tokenizer():
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all((ASSETS / TEACHER / file).read_bytes() == (ASSETS / STUDENT / file).read_bytes() for file in files)


@BOTH
@pytest.mark.parametrize(
    "text", ["27+85=", "", " two  spaces , it 's", "\t\r\n\x00\x7f", "naïve 漢字 한글 مرحبا", "🦊👩\u200d👩\u200d👧", "\U0010ffff"]
)
def test_any_text_in_normal_form_round_trips_one_token_a_byte(name, text):
    tokens = load_tokenizer(name).encode(text)
    assert len(tokens) == len(text.encode())
    assert load_tokenizer(name).decode(tokens) == text


@BOTH
def test_every_character_round_trips_in_its_normal_form(name):
    characters = map(chr, range(0x3000))
    normal = [character for character in characters if unicodedata.is_normalized("NFC", character)]
    tokenizer = load_tokenizer(name)
    assert [tokenizer.decode(tokens) for tokens in tokenizer(normal)["input_ids"]] == normal
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


@BOTH
def test_chat_renders_each_message_in_its_role_and_opens_the_answer(name):
    assert render(name, ("user", "27+85=")) == "<|user|>27+85=<|end|><|assistant|>"
    assert render(name, ("system", "add"), ("user", "1+2=")) == "<|system|>add<|end|><|user|>1+2=<|end|><|assistant|>"
    tokens = load_tokenizer(name).encode(render(name, ("user", "27+85=")))
    assert load_tokenizer(name).convert_ids_to_tokens(tokens) == ["<|user|>", *"27+85=", "<|end|>", "<|assistant|>"]


@BOTH
def test_finished_chat_ends_with_the_answer_and_its_end(name):
    chat = [{"role": "user", "content": "27+85="}, {"role": "assistant", "content": "211"}]
    text = load_tokenizer(name).apply_chat_template(chat, tokenize=False)
    assert text == "<|user|>27+85=<|end|><|assistant|>211<|end|>"


def test_teacher_answers_held_out_questions_correctly():
    assert generated_accuracy(TEACHER) >= 0.99


def test_the_teacher_with_other_tokens_answers_correctly_in_pairs_of_digits():
    tokenizer = load_tokenizer(PAIRS)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("135")) == ["13", "5"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(render(PAIRS, ("user", "27+85=")))[6:]) == [
        *"27+85=",
        "<turn>",
        *"assistant:",
        "Ġ",
    ]
    assert generated_accuracy(PAIRS) >= 0.98


def test_student_answers_about_half_of_the_held_out_questions_correctly():
    assert 0.40 <= generated_accuracy(STUDENT) <= 0.70
