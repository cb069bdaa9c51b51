"""From rows to prompts: columns, templates, answers, prompts that are dropped, and errors for what is missing."""

import copy
import json

import pytest
from tokenizers import normalizers, processors

from opd.config.schema import DataConfig, ModelConfig, Source
from opd.data.prompts import encode_rows, extract_answer, text_warnings
from opd.data.sources import load_rows
from opd.errors import ConfigError, DataError
from opd.models.load import load_tokenizer
from opd.training.identity import digest
from opd.training.identity import rows as identifying_parts


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig(path="bundled:tiny-student"), "model")


def files(tmp_path, rows, **options) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=Source.jsonl, path=None, train_path=str(path), prompt="prompt", **{"answer_after": None, **options})


def test_gsm8k_is_read_from_a_local_copy_of_the_same_columns(tmp_path, tokenizer):
    (tmp_path / "main").mkdir()
    for split, count in (("train", 5), ("test", 3)):
        rows = [
            {"question": f"What is {i} + {i}?", "answer": f"{i} + {i} is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {1000 * i:,}"}
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, evaluation = load_rows(DataConfig(path=str(tmp_path), subset=None))
    assert (len(train), len(evaluation)) == (5, 3)
    prompts = encode_rows(evaluation, tokenizer, DataConfig(), "evaluation")
    assert [prompt.answer for prompt in prompts] == ["0", "1,000", "2,000"]
    assert tokenizer.decode(prompts[1].ids) == "<|user|>What is 1 + 1?<|end|><|assistant|>"


def test_messages_system_column_and_template_arguments_reach_the_template(tmp_path, tokenizer):
    rows = [
        {
            "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "who": "sys",
        },
        {"prompt": "d", "who": None},
    ]
    prompts = encode_rows(rows, tokenizer, DataConfig(prompt="prompt", answer=None, system="who"), "training")
    assert tokenizer.decode(prompts[0].ids) == "<|system|>sys<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert tokenizer.decode(prompts[1].ids) == "<|user|>d<|end|><|assistant|>"
    tokenizer_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
        config = DataConfig(prompt="prompt", answer=None, chat_template_kwargs={"enable_thinking": True})
        assert tokenizer.decode(encode_rows(rows[1:], tokenizer, config, "training")[0].ids) == "d<think>"
        tokenizer.chat_template = None
        assert tokenizer.decode(encode_rows(rows[1:], tokenizer, DataConfig(prompt="prompt", answer=None), "training")[0].ids) == "d"
    finally:
        tokenizer.chat_template = tokenizer_template


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def begun(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture
def changed(tokenizer):
    """Return a copy of the tokenizer with another chat template, normalizer or post-processor, and what that makes of prompts."""

    def change(template=tokenizer.chat_template, **backend):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        for name, part in backend.items():
            setattr(other.backend_tokenizer, name, part)
        return other

    return change


def encode(tokenizer, *prompts, teacher_system=None, **options):
    rows = [{"prompt": prompt, "who": "theirs"} for prompt in prompts]
    config = DataConfig(**{"source": Source.jsonl, "train_path": "rows.jsonl", "prompt": "prompt", "answer": None, **options})
    return encode_rows(rows, tokenizer, config, "training", teacher_system)


def encoded_text(tokenizer, *prompts, **options):
    return [tokenizer.decode(prompt.ids) for prompt in encode(tokenizer, *prompts, **options)]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("a", name="n"), begun(None, tool_calls=[{"x": None}], reasoning_content="r"), user("b")], 'a n .r.[{"x": null}] b  .>'),
        ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "ab  .>"),
        ([user("a"), begun("b")], "a  .b"),
        ([user("a"), begun("")], "a  ."),
    ],
    ids=["fields", "text parts", "begun answer", "empty answer"],
)
def test_every_field_that_the_template_renders_reaches_it_and_a_begun_answer_stays_open(changed, messages, text):
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} {{ m.name }} .{% endif %}{{ m.reasoning_content }}"
        "{% if m.tool_calls %}.{{ m.tool_calls | tojson }} {% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert encoded_text(changed(template), messages) == [text]


def test_only_tables_have_fields_of_other_records_removed(changed):
    template = "{{ messages[0].tool_calls | tojson }}"
    messages = [begun("a", tool_calls=[{"x": 1, "y": None}]), user("b")]
    assert encoded_text(changed(template), messages) == ['[{"x": 1, "y": null}]']
    assert encoded_text(changed(template), messages, source=Source.parquet) == ['[{"x": 1}]']


def test_a_system_message_of_an_option_replaces_that_of_the_chat(tokenizer):
    chat = [{"role": "system", "content": "own"}, user("a")]
    (prompt,) = encode(tokenizer, chat, system="who", teacher_system="hint")
    assert tokenizer.decode(prompt.ids) == "<|system|>theirs<|end|><|user|>a<|end|><|assistant|>"
    assert tokenizer.decode(prompt.teacher_ids) == "<|system|>hint<|end|><|user|>a<|end|><|assistant|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ raise_exception('roles\nmust alternate') }}",
        "{% if %}",
        "{{ messages[0].content.__class__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now(1) }}",
        "{{ [] | first }}",
    ],
)
def test_a_template_that_fails_is_one_line_with_the_row(changed, template):
    with pytest.raises(DataError) as refused:
        encode(changed(template), "a")
    assert str(refused.value).startswith("row 0: data.prompt=prompt: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("prompt", [[user("a"), begun(None, tool_calls=[1])], "a\ud800", [user([{"type": "image"}])]])
def test_a_prompt_that_cannot_be_continued_or_encoded_is_one_line_with_the_row(tokenizer, prompt):
    with pytest.raises(DataError, match=r"^row 0: data\.prompt=prompt: .*$"):
        encode(tokenizer, prompt)


def test_a_template_is_chosen_by_name(changed):
    several = changed({"chat": "c{{ messages[0].content }}", "tool_use": "t"})
    options = {"chat_template_kwargs": {"chat_template": "chat"}}
    assert encoded_text(several, "a", **options) == ["ca"]
    for tokenizer, kwargs in ((several, {}), (several, {"chat_template": "other"}), (changed(), {"chat_template": "chat"})):
        with pytest.raises(ConfigError, match=r"^data\.chat_template_kwargs\.chat_template=.* (chat or tool_use|default)$"):
            encode(tokenizer, "a", chat_template_kwargs=kwargs)
    assert encoded_text(changed(None), "a", chat_template_kwargs={"chat_template": "{{ messages[0].content }}!"}) == ["a!"]


def test_plain_text_begins_as_the_tokenizer_begins_texts_but_once_and_does_not_end(changed):
    special = [("<|user|>", 259), ("<|end|>", 256)]
    both = processors.TemplateProcessing(single="<|user|> $A <|end|>", pair="$A $B", special_tokens=special)
    prompts = ["a", "<|user|>a", "a<|end|>"]
    assert encoded_text(changed(None, post_processor=both), *prompts) == ["<|user|>a", "<|user|>a", "<|user|>a<|end|>"]


@pytest.mark.parametrize(
    ("normalizer", "text", "lost"),
    [
        (normalizers.Lowercase(), "aB", "'aB' becomes 'ab'"),
        (normalizers.NFKC(), "\u00b2", "'\u00b2' becomes '2'"),
        (normalizers.Replace("\n", " "), "a\nb", "'a\\nb' becomes 'a b'"),
        (normalizers.NFD(), "\u00e9\u2026", ""),
        (normalizers.Strip(), " a\n", ""),
    ],
)
@pytest.mark.parametrize("template", [None, "<|user|> {{ messages[0].content }}<|end|>\n<|assistant|>"])
def test_text_that_the_tokenizer_loses_is_told(changed, template, normalizer, text, lost):
    tokenizer = changed(template, normalizer=normalizer)
    warnings = text_warnings(encode(tokenizer, "a", text), tokenizer, ())
    assert len(warnings) == bool(lost)
    assert template is not None or lost in "".join(warnings)


def test_a_long_prompt_of_which_the_tokenizer_drops_most_is_tokenized_whole(changed):
    (prompt,) = encode(changed(None, normalizer=normalizers.Replace("x", "")), "x" * 10_000 + "ab", max_prompt_tokens=20)
    assert len(prompt.ids) == 2 and prompt.lost


def test_special_tokens_in_texts_are_told(tokenizer):
    prompts = encode(tokenizer, "1+1=")
    assert text_warnings(prompts, tokenizer, (256,)) == []
    assert "'1' (16), which ends a completion" in text_warnings(prompts, tokenizer, (256, 16))[0]


def test_a_prompt_with_the_date_is_identified_by_its_messages(changed):
    def identified(text, template="{{ strftime_now('%f') }}{{ messages[0].content }}"):
        return digest(identifying_parts(encode(changed(template), text)))

    assert identified("a") == identified("a") != identified("b")
    assert identified("a", "{{ messages[0].content }}") != identified("a", "{{ messages[0].content }}.")


def test_long_prompts_are_dropped_and_counted_and_never_truncated(tokenizer, caplog):
    caplog.set_level("WARNING")
    rows = [{"prompt": "x" * length} for length in (5, 500, 6)]
    config = DataConfig(prompt="prompt", answer=None, max_prompt_tokens=20)
    prompts = encode_rows(rows, tokenizer, config, "training")
    assert [prompt.sample_id for prompt in prompts] == [0, 2]
    assert "1 of 3 training prompts" in caplog.text
    with pytest.raises(DataError, match="the shortest has 8 tokens"):
        encode_rows(rows, tokenizer, DataConfig(prompt="prompt", answer=None, max_prompt_tokens=3), "training")


@pytest.mark.parametrize(
    ("value", "after", "expected"),
    [
        ("a #### 42", "####", "42"),
        ("a #### 1 #### 7 ", "####", "7"),
        ("none", "####", None),
        (18, None, "18"),
        (None, None, None),
        ("  ", None, None),
    ],
)
def test_the_reference_answer_follows_the_last_mark(value, after, expected):
    assert extract_answer(value, after) == expected


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (3, "int"),
        (None, "NoneType"),
        ([], "list"),
        (["text"], "list"),
        ([{"role": "user"}], "list"),
        ([{"role": "user", "content": 3}], "list"),
        ({"role": "user", "content": "a"}, "dict"),
    ],
)
def test_a_prompt_that_is_neither_text_nor_messages_is_named_by_row_and_column(tokenizer, prompt, kind):
    with pytest.raises(DataError, match=rf"row 1: data\.prompt=prompt: .*not {kind}"):
        encode_rows([{"prompt": "fine"}, {"prompt": prompt}], tokenizer, DataConfig(prompt="prompt", answer=None), "training")


def test_jsonl_and_parquet_hold_out_a_tenth(tmp_path):
    import datasets

    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(40)]
    train, evaluation = load_rows(files(tmp_path, rows))
    assert [row["prompt"] for row in evaluation] == ["p36", "p37", "p38", "p39"] and len(train) == 36
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    parquet = DataConfig(source=Source.parquet, path=None, train_path=str(tmp_path / "rows.parquet"), prompt="prompt", answer_after=None)
    assert list(load_rows(parquet)[1]) == list(evaluation)


@pytest.mark.parametrize(
    ("rows", "options", "option", "remedy"),
    [
        ([{"text": "a"}] * 20, {}, "data.prompt=prompt: the training set", "it has text: set data.prompt=COLUMN"),
        ([{"prompt": "a"}] * 20, {}, "data.answer=answer: the training set", "data.answer=COLUMN, or data.answer=null"),
        ([{"prompt": "a"}] * 20, {"answer": None, "system": "who"}, "data.system=who: the training set", "data.system=null"),
        ([], {"answer": None}, "data.train_path=", "the file is empty"),
        ([{"prompt": "a"}] * 5, {"answer": None}, "data.train_path=", "data.eval_path=FILE"),
    ],
)
def test_a_column_or_rows_that_are_missing_in_a_file_are_named(tmp_path, rows, options, option, remedy):
    with pytest.raises(DataError) as refused:
        load_rows(files(tmp_path, rows, **options))
    assert str(refused.value).startswith(option) and remedy in str(refused.value)


def test_errors_of_missing_or_broken_files_and_of_unknown_datasets_name_the_option(tmp_path):
    with pytest.raises(DataError, match=r"data\.train_path=no\.jsonl: there is no such file"):
        load_rows(DataConfig(source=Source.jsonl, train_path="no.jsonl"))
    with pytest.raises(DataError, match=r"data\.path=openai/gsm8k .*data\.path=FOLDER.*data=jsonl.*experiment=tiny"):
        load_rows(DataConfig())
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(DataError, match=r"data\.train_path=.*broken\.jsonl: cannot be read as jsonl"):
        load_rows(DataConfig(source=Source.jsonl, train_path=str(tmp_path / "broken.jsonl")))
    with pytest.raises(ConfigError, match=r"data\.source=python: .*data=jsonl"):
        load_rows(DataConfig(source=Source.python))


def test_reasoning_gym_questions_depend_on_the_seed_and_the_sets_are_disjoint():
    pytest.importorskip("reasoning_gym")
    config = DataConfig(
        source=Source.gym, path="chain_sum", size=60, options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    )
    train, evaluation = load_rows(config)
    assert load_rows(config)[0] == train
    assert not {row["question"] for row in train} & {row["question"] for row in evaluation}
    assert evaluation and all(row["answer"] for row in evaluation)
    with pytest.raises(ConfigError, match="reasoning-gym says"):
        load_rows(DataConfig(source=Source.gym, path="no_such_task"))
