"""From rows to prompts: columns, templates, answers, prompts that are dropped, and errors for what is missing."""

import copy
import gzip
import json
import lzma
import os
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import normalizers, processors

from opd.api import from_options
from opd.config.options import DataConfig, ModelConfig, Source, TeacherConfig
from opd.config.schema import Config
from opd.data.prompts import Encoder, Prompt, encode_rows, text_warnings
from opd.data.python_rows import as_rows
from opd.data.rewards import make_grader
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.data.rows import extract_answers
from opd.data.sources import check_rows, load_rows
from opd.doctor.findings import Status
from opd.doctor.rows import check_columns
from opd.errors import ConfigError, DataError
from opd.models.load import load_tokenizer
from opd.training.evaluator import Evaluator
from opd.training.identity import check_same, digest, digest_files, identity
from opd.training.identity import rows as identifying_parts
from opd.training.inputs import Given, encode_dataset


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
    prompts = encode_rows(evaluation, Encoder(tokenizer, DataConfig()), "evaluation")
    assert [prompt.answers for prompt in prompts] == [("0",), ("1,000",), ("2,000",)]
    assert tokenizer.decode(prompts[1].ids) == "<|user|>What is 1 + 1?<|end|><|assistant|>"


def test_messages_system_column_and_template_arguments_reach_the_template(tmp_path, tokenizer):
    rows = [
        {
            "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "who": "sys",
        },
        {"prompt": "d", "who": None},
    ]
    prompts = encode_rows(rows, Encoder(tokenizer, DataConfig(prompt="prompt", answer=None, system="who")), "training")
    assert tokenizer.decode(prompts[0].ids) == "<|system|>sys<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert tokenizer.decode(prompts[1].ids) == "<|user|>d<|end|><|assistant|>"
    tokenizer_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
        config = DataConfig(prompt="prompt", answer=None, chat_template_kwargs={"enable_thinking": True})
        assert tokenizer.decode(encode_rows(rows[1:], Encoder(tokenizer, config), "training")[0].ids) == "d<think>"
        tokenizer.chat_template = None
        assert (
            tokenizer.decode(encode_rows(rows[1:], Encoder(tokenizer, DataConfig(prompt="prompt", answer=None)), "training")[0].ids) == "d"
        )
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


def encode(tokenizer, *prompts, teacher=None, **options):
    rows = [{"prompt": prompt, "who": "theirs"} for prompt in prompts]
    config = DataConfig(**{"source": Source.jsonl, "train_path": "rows.jsonl", "prompt": "prompt", "answer": None, **options})
    return encode_rows(rows, Encoder(tokenizer, config, teacher), "training")


def encoded_text(tokenizer, *prompts, **options):
    return [tokenizer.decode(prompt.ids) for prompt in encode(tokenizer, *prompts, **options)]


CONTINUED = {"continue_final_message": True}


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
    assert encoded_text(changed(template), messages, chat_template_kwargs=CONTINUED) == [text]


def test_the_assistants_message_at_the_end_is_cut_off_and_may_be_the_answer_or_the_completion(tokenizer, caplog):
    chat = [user("a"), begun("b"), user("c"), begun("#### 7")]
    (prompt,) = encode(tokenizer, chat, answer="prompt", completion="prompt", answer_after="####")
    assert tokenizer.decode(prompt.ids) == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert prompt.text == "c" and prompt.answers == ("7",) and tokenizer.decode(prompt.given[0]) == "#### 7<|end|>"
    assert encode(tokenizer, chat)[0].answers == ()
    with pytest.raises(DataError, match=r"^row 0: data\.prompt=prompt: .*continue_final_message=true"):
        encode(tokenizer, [begun("b")])


def test_the_number_of_cut_chats_is_said_once(tokenizer, caplog):
    rows = [{"chat": [user("a"), begun("b")]}, {"chat": [user("c")]}, {"chat": "d"}]
    config = Config(data=DataConfig(source=Source.jsonl, train_path="x", prompt="chat", answer="chat"))
    encode_dataset(config, tokenizer, (rows, rows[:1]))
    (note,) = (record.getMessage() for record in caplog.records)
    assert note.startswith("data.prompt=chat: 2 of 4 chats end with") and "is the answer (data.answer)" in note
    assert [finding.status for finding in check_columns(rows, rows[:1], config)] == [Status.ok, Status.ok]
    config.data.answer = None
    found = check_columns(rows, rows[:1], config)[1]
    assert found.status is Status.warn and "data.answer=chat" in found.remedy
    caplog.clear()
    config.data.chat_template_kwargs = CONTINUED
    encode_dataset(config, tokenizer, (rows, rows[:1]))
    assert not caplog.records


def test_a_chat_in_the_form_of_sharegpt_is_read_and_other_keys_are_named(tokenizer):
    chat = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (prompt,) = encode(tokenizer, chat, answer="prompt", answer_after=None)
    assert tokenizer.decode(prompt.ids) == "<|system|>s<|end|><|user|>a<|end|><|assistant|>" and prompt.answers == ("b",)
    with pytest.raises(DataError, match=r"^row 0: data\.prompt=prompt: .*with the keys speaker, text$"):
        encode(tokenizer, [{"speaker": "human", "text": "a"}])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": "{prompt} Put it in \\boxed{}, {{{who}}}."}, "<|user|>a Put it in \\boxed{}, {theirs}."),
        ({"system": "Be brief."}, "<|system|>Be brief.<|end|><|user|>a"),
        ({"system": "Be {who}."}, "<|system|>Be theirs.<|end|><|user|>a"),
        ({"system": "{who}"}, "<|system|>theirs<|end|><|user|>a"),
        ({"system": "who"}, "<|system|>theirs<|end|><|user|>a"),
    ],
)
def test_prompt_and_system_message_may_be_texts_with_columns(tokenizer, options, text):
    check_rows([{"prompt": "a", "who": "theirs"}], [], DataConfig(**{"prompt": "prompt", "answer": None, **options}))
    assert encoded_text(tokenizer, "a", **options) == [f"{text}<|end|><|assistant|>"]


def test_the_data_that_are_evaluated_on_are_named_by_their_source():
    files = {"train_path": "a.jsonl", "path": "a/b"}
    assert DataConfig(**files, source=Source.arithmetic).evaluated == "arithmetic"
    assert DataConfig(**files, source=Source.hub).evaluated == "a/b"
    assert DataConfig(**files, source=Source.jsonl).evaluated == "a.jsonl"
    assert DataConfig(**files, source=Source.jsonl, eval_path="b.jsonl").evaluated == "b.jsonl"


@pytest.mark.parametrize(
    ("options", "start", "hint"),
    [
        ({"prompt": "{promt} now"}, "data.prompt={promt}: ", "did you mean prompt?"),
        ({"prompt": "promt"}, "data.prompt=promt: ", "did you mean prompt?"),
        ({"prompt": "Be brief now"}, "data.prompt=Be brief now: ", "{COLUMN}"),
        ({"system": "wh0"}, "data.system=wh0: ", "did you mean who?"),
        ({"system": "pro mpt"}, "data.system=pro mpt: ", "did you mean prompt?"),
        ({"system": "{whom}"}, "data.system={whom}: ", "did you mean who?"),
    ],
)
def test_a_mistyped_column_is_not_taken_for_a_text(options, start, hint):
    with pytest.raises(DataError) as refused:
        check_rows([{"prompt": "a", "who": "theirs"}], [], DataConfig(**{"prompt": "prompt", "answer": None, **options}))
    assert str(refused.value).startswith(start) and hint in str(refused.value)


def test_only_tables_have_fields_of_other_records_removed(changed):
    template = "{{ messages[0].tool_calls | tojson }}"
    messages = [begun("a", tool_calls=[{"x": 1, "y": None}]), user("b")]
    assert encoded_text(changed(template), messages) == ['[{"x": 1, "y": null}]']
    assert encoded_text(changed(template), messages, source=Source.parquet) == ['[{"x": 1}]']


def test_a_system_message_of_an_option_replaces_that_of_the_chat(tokenizer):
    chat = [{"role": "system", "content": "own"}, user("a")]
    (prompt,) = encode(tokenizer, chat, system="who", teacher=TeacherConfig(system="hint"))
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
        encode(tokenizer, prompt, chat_template_kwargs=CONTINUED)


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
    prompts = encode_rows(rows, Encoder(tokenizer, config), "training")
    assert [prompt.sample_id for prompt in prompts] == [0, 2]
    assert "1 of 3 training prompts" in caplog.text
    with pytest.raises(DataError, match="the shortest has 8 tokens"):
        encode_rows(rows, Encoder(tokenizer, DataConfig(prompt="prompt", answer=None, max_prompt_tokens=3)), "training")


@pytest.mark.parametrize(
    ("value", "after", "expected"),
    [
        ("a #### 42", "####", ("42",)),
        ("a #### 1 #### 7 ", "####", ("7",)),
        ("none", "####", ()),
        (18, None, ("18",)),
        (None, None, ()),
        ("  ", None, ()),
        (True, None, ("true",)),
        (date(2024, 5, 1), None, ("2024-05-01",)),
        (["a #### 4", "b", None, "c #### four"], "####", ("4", "four")),
        ([], None, ()),
    ],
)
def test_the_reference_answers_follow_the_last_mark(value, after, expected):
    assert extract_answers(value, after, "here") == expected


@pytest.mark.parametrize("value", [{"value": 1}, [{"value": 1}], [["a"]], b"1"])
def test_an_answer_without_one_text_is_refused(tokenizer, value):
    with pytest.raises(DataError, match=r"^row 0: data\.answer=answer: .*data\.answer=null"):
        encode_rows([{"prompt": "a", "answer": value}], Encoder(tokenizer, DataConfig(prompt="prompt", answer_after=None)), "training")


def test_any_accepted_answer_counts():
    prompts = [Prompt(0, (3,), "a", answers=("four", "4")), Prompt(1, (3,), "b", answers=("5",)), Prompt(2, (3,), "c")]
    rollouts = [Rollout(Request(prompt), (1,), torch.zeros(1), FinishReason.stop) for prompt in prompts]
    with make_grader("exact") as grader:
        judge = SimpleNamespace(grader=grader, text=lambda rollout: "4", grade=lambda items: Evaluator.grade(judge, items))
        assert Evaluator.judge(judge, rollouts) == [1.0, 0.0, None]
    row = as_rows([{"prompt": "a", "answer": ["four", "4"]}], [lambda completion, answer: float(completion == answer)])[0]
    assert row["get_reward"]("4") == 1.0 and row["get_reward"]("5") == 0.0


LITERALS = st.one_of(
    st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "true", "false", "-0", "1e400"]),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    ["2024-05-01", "007", "1.50", "1e3", "12:30", "true"]
)


@settings(deadline=None, max_examples=60)
@given(
    answers=st.lists(LITERALS | TEXTS.map(json.dumps) | st.lists(LITERALS, min_size=1, max_size=2), min_size=1, max_size=8),
    layout=st.sampled_from(["lines", "crlf", "list", "field"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_values_of_a_json_file_keep_their_text(tmp_path_factory, answers, layout, encoding):
    path = tmp_path_factory.getbasetemp() / "values[*]::.jsonl"
    written = [answer if isinstance(answer, str) else f"[{', '.join(answer)}]" for answer in answers]
    rows = [f'{{"prompt": "p{index}", "answer": {answer}}}' for index, answer in enumerate(written)]
    end = "\r\n\r\n" if layout == "crlf" else "\n"
    listed = f"[{', '.join(rows)}]"
    text = {"list": listed, "field": f'{{"version": 1, "data": {listed}}}'}.get(layout, "".join(row + end for row in rows))
    path.write_bytes(text.encode(encoding))
    config = DataConfig(source=Source.jsonl, path=None, train_path=str(path), eval_path=str(path), prompt="prompt")
    found = [extract_answers(row["answer"], None, "") for row in load_rows(config)[0]]
    texts = [answer if isinstance(answer, list) else [json.loads(answer) if answer[0] == '"' else answer] for answer in answers]
    assert found == [tuple(text for text in row if text.strip()) for row in texts]


def test_columns_change_their_kind_and_appear_late(tmp_path):
    long = "a" * 2**20  # `datasets` decides on types within the first 10 MB
    rows = [{"prompt": "a"}, *({"prompt": long, "answer": number} for number in range(11)), {"prompt": "a", "answer": [0.5, "x"]}]
    train, evaluation = load_rows(files(tmp_path, rows))
    assert len(train) + len(evaluation) == 13 and extract_answers(evaluation[-1]["answer"], None, "") == ("0.5", "x")


def test_parquet_values_keep_their_text(tmp_path):
    folder = tmp_path / "part=1"  # pyarrow would make a column of it
    folder.mkdir()
    answers = {
        pyarrow.float32(): ([0.1, 2.5], ["0.1", "2.5"]),
        pyarrow.date32(): ([date(2024, 5, 1)], ["2024-05-01"]),
        pyarrow.decimal128(9, 2): ([Decimal("1.50")], ["1.50"]),
        pyarrow.uint64(): ([2**64 - 1], [str(2**64 - 1)]),
    }
    for kind, (values, expected) in answers.items():
        parquet.write_table(pyarrow.table({"prompt": ["a"] * len(values), "answer": pyarrow.array(values, kind)}), folder / "x.parquet")
        path = str(folder / "x.parquet")
        rows, _ = load_rows(DataConfig(source=Source.parquet, path=None, train_path=path, eval_path=path, prompt="prompt"))
        assert [extract_answers(row["answer"], None, "")[0] for row in rows] == expected and set(rows[0]) == {"prompt", "answer"}


LINE = b'{"prompt": "a", "answer": "2024-05-01"}\n'


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "a::b.jsonl", "~a.jsonl", "{a}, b=\u00e4.jsonl", "a.jsonl.gz", "a.jsonl.xz"]
)
def test_exactly_the_named_file_is_read_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home[1]"))
    (tmp_path / "home[1]").mkdir()
    (tmp_path / "a1.jsonl").write_bytes(LINE * 2)
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    for path in (name, f"~/{name}"):
        Path(path.replace("~/", "home[1]/")).write_bytes(pack(LINE))
        rows, _ = load_rows(DataConfig(source=Source.jsonl, path=None, train_path=path, eval_path=path, prompt="prompt"))
        assert rows == [{"prompt": "a", "answer": "2024-05-01"}]


def test_a_file_replaced_under_the_same_name_size_and_time_is_read_again(tmp_path):
    path = tmp_path / "train.jsonl"
    (tmp_path / "test.jsonl").write_bytes(LINE)
    for text in ("2024-05-01", "2024-05-02"):
        path.write_bytes(LINE.replace(b"2024-05-01", text.encode()))
        os.utime(path, (1e9, 1e9))
        by_file = DataConfig(source=Source.jsonl, path=None, train_path=str(path), eval_path=str(path), prompt="prompt")
        for config in (by_file, DataConfig(path=str(tmp_path), subset=None, prompt="prompt")):
            assert load_rows(config)[0] == [{"prompt": "a", "answer": text}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "caf\u00e9"}'.encode("latin-1"), "UTF-8"),
        (LINE + b'{"prompt": "a", "answer": 007}', "line 2"),
        (LINE + b'{"prompt": "a"', "line 2"),
        (LINE + b"5", "row 1"),
        (b"PK\x05\x06" + bytes(18), "one file"),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}', "prompt, answer, answer"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / ("x.zip" if content.startswith(b"PK") else "x.jsonl")
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_rows(DataConfig(source=Source.jsonl, path=None, train_path=str(path), prompt="prompt"))
    assert str(refused.value).startswith("data.train_path=") and reason in str(refused.value) and "\n" not in str(refused.value)


def test_half_a_surrogate_pair_and_a_system_record_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"row 0: data\.prompt=prompt: "):
        encode_rows([{"prompt": "a\ud83d"}], Encoder(tokenizer, DataConfig(prompt="prompt", answer=None)), "training")
    with pytest.raises(DataError, match=r"row 0: data\.system=who: "):
        encode_rows(
            [{"prompt": "a", "who": {"b": 1}}], Encoder(tokenizer, DataConfig(prompt="prompt", answer=None, system="who")), "training"
        )


def test_texts_of_a_csv_file_in_a_folder_are_not_taken_for_numbers(tmp_path):
    folder = tmp_path / "set[1]"
    folder.mkdir()
    (folder / "train.csv").write_text('prompt,answer\na,007\n"b,\nc",1.50\n')
    (folder / "test.csv").write_text("prompt,answer\na,NA\n")
    config = DataConfig(path=str(folder), subset=None, prompt="prompt", answer_after=None)
    assert load_rows(config) == (
        [{"prompt": "a", "answer": "007"}, {"prompt": "b,\nc", "answer": "1.50"}],
        [{"prompt": "a", "answer": "NA"}],
    )
    (folder / "train.csv").write_text("prompt,answer\na,1,000\n")
    with pytest.raises(DataError, match=r"^data\.path=.*train\.csv: .*row 1"):
        load_rows(config)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_the_header_of_a_table_says_what_separates_its_columns(tmp_path, mark, ending):
    file = tmp_path / f"rows.{ending}"
    file.write_text(f'prompt{mark}answer\n"a{mark}b; c, d"{mark}1.50\n' + f"e{mark}2\n" * 19)
    rows, _ = load_rows(DataConfig(source=Source.jsonl, path=None, train_path=str(file), prompt="prompt", answer_after=None))
    assert rows[:2] == [{"prompt": f"a{mark}b; c, d", "answer": "1.50"}, {"prompt": "e", "answer": "2"}]
    file.write_text("prompt\n" + "a; b\n" * 20)
    rows, _ = load_rows(DataConfig(source=Source.jsonl, path=None, train_path=str(file), prompt="prompt", answer=None))
    assert rows[0] == {"prompt": "a; b"}


def test_folders_of_save_to_disk_load(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": f"p{index}", "answer": f"00{index}"} for index in range(20)])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "both")

    def sizes(name: str, **options: str) -> tuple[int, int]:
        train, evaluation = load_rows(DataConfig(path=str(tmp_path / name), subset=None, prompt="prompt", **options))
        assert train[7] == {"prompt": "p7", "answer": "007"}
        return len(train), len(evaluation)

    assert sizes("one") == (18, 2)
    assert sizes("one", train_split="train[:50%]", eval_split="train[50%:]") == (10, 10)
    assert sizes("both") == (20, 3)
    with pytest.raises(DataError, match=r"data\.path=.*data\.eval_split"):
        sizes("both", eval_split="validation")


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
        encode_rows([{"prompt": "fine"}, {"prompt": prompt}], Encoder(tokenizer, DataConfig(prompt="prompt", answer=None)), "training")


def test_jsonl_and_parquet_hold_out_a_tenth(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(40)]
    train, evaluation = load_rows(files(tmp_path, rows))
    assert [row["prompt"] for row in evaluation] == ["p36", "p37", "p38", "p39"] and len(train) == 36
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(source=Source.parquet, path=None, train_path=str(tmp_path / "rows.parquet"), prompt="prompt", answer_after=None)
    assert list(load_rows(config)[1]) == list(evaluation)


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
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n')
    with pytest.raises(DataError, match=r"data\.train_path=.*broken\.jsonl: cannot be read as jsonl: .* begins in line 2"):
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


def test_data_files_are_read_once_a_process_for_their_digest(tmp_path, monkeypatch):
    file, opened, opens = tmp_path / "a.jsonl", [], Path.open
    file.write_bytes(LINE)
    monkeypatch.setattr(Path, "open", lambda self, *how, **more: opened.append(self.name) or opens(self, *how, **more))
    digests = [digest_files(str(file)) for _ in range(2)]
    assert digests[0] == digests[1] is not None and opened == ["a.jsonl"]
    file.write_bytes(LINE * 2)
    assert digest_files(str(file)) not in (None, digests[0])
    assert digest_files(str(tmp_path / "missing.jsonl")) is digest_files(str(tmp_path / "*.csv")) is None


def test_the_same_files_under_another_path_are_the_same_run(tmp_path):
    def identify(**paths: str | Path) -> dict:
        options = {"data.source": "jsonl", "data.path": None, **{f"data.{name}": str(path) for name, path in paths.items()}}
        return identity(from_options(options), SimpleNamespace(num_processes=1), Given())

    one, same, other = (tmp_path / name for name in ("one.jsonl", "b.jsonl", "other.jsonl"))
    for path, content in ((one, LINE), (same, LINE), (other, LINE * 2)):
        path.write_bytes(content)
    stored = json.loads(json.dumps(identify(train_path=one)))
    one.unlink()
    assert check_same(stored, identify(train_path=same), tmp_path, force=False) == []
    for changed in (other, tmp_path / "missing.jsonl"):
        with pytest.raises(ConfigError, match=r"data\.train_path was .*one\.jsonl, is "):
            check_same(stored, identify(train_path=changed), tmp_path, force=False)
    with pytest.raises(ConfigError, match=r"data\.eval_path was null"):
        check_same(stored, identify(train_path=same, eval_path=other), tmp_path, force=False)
    parts = [tmp_path / name for name in ("p", "q")]
    for folder in parts:
        folder.mkdir()
        for name, content in (("part-1.jsonl", LINE), ("part-2.jsonl", LINE * 2)):
            (folder / name).write_bytes(content)
    first = identify(train_path=parts[0] / "part-*.jsonl")
    assert check_same(first, identify(train_path=parts[1] / "part-*.jsonl"), tmp_path, force=False) == []
    (parts[1] / "part-2.jsonl").write_bytes(LINE * 3)
    assert check_same(first, identify(train_path=parts[1] / "part-*.jsonl"), tmp_path, force=True) != []
    del stored["files"]  # of a run from before there were digests of files
    with pytest.raises(ConfigError, match=r"data\.train_path was"):
        check_same(stored, identify(train_path=same), tmp_path, force=False)
    folders = [tmp_path / name for name in ("x", "y")]
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "train.jsonl").write_bytes(LINE)
    first, second = (identify(source="hub", path=folder) for folder in folders)
    assert check_same(first, second, tmp_path, force=False) == []
    (folders[1] / "data" / "train.jsonl").rename(folders[1] / "data" / "test.jsonl")
    assert check_same(first, identify(source="hub", path=folders[1]), tmp_path, force=True) != []
