"""`opd sample` completes prompts with both models; `opd score` gives each token's log-prob under both, also as an HTML page."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from opd import errors
from opd.cli import main as cli
from opd.config.options import ModelConfig
from opd.errors import DataError
from opd.evaluation import texts
from opd.evaluation.sample_score import ScoredText
from opd.evaluation.show import completion_table, score_page, score_parts
from opd.models import load as models

TINY = ["bundled:tiny-student", "teacher=tiny", "data=arithmetic", "device=cpu", "model.dtype=float32", "teacher.dtype=float32"]
DOCUMENT_TAGS = ("html", "head", "meta", "title", "style", "body", "main", "footer")
HOSTILE = '<script>alert(1)</script>\u202e"onload="x" \x1b[31m & \u2066'


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sample_completes_each_prompt_with_both_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("11+11=\n\n12+12=\n")
    words = ["sample", *TINY, "--prompt", "27+85=", "--file", "prompts.txt", "-n", "3", "sampling.max_new_tokens=8", "--json"]
    assert cli.main(words) == errors.OK
    first = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["prompt"] for line in first] == ["27+85=", "11+11=", "12+12="]
    assert [line["teacher"] for line in first] == [["211"] * 3, ["22"] * 3, ["42"] * 3], "the bundled teacher is always right"
    assert all(len(line["student"]) == 3 for line in first)
    assert cli.main(words) == errors.OK
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == first, "the same seed gives the same answers"
    assert {file.name for file in tmp_path.iterdir()} == {"prompts.txt"}


def test_sample_reads_prompts_from_standard_input_and_may_leave_out_the_teacher(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("11+11=\n12+12=\n\n13+13=\n"))
    assert cli.main(["sample", "bundled:tiny-teacher", "data=arithmetic", "--teacher", "none", "device=cpu", "--json"]) == errors.OK
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert lines == [{"prompt": "11+11=", "student": ["22"]}, {"prompt": "12+12=", "student": ["42"]}], "an empty line ends"


def test_the_temperature_of_answers_is_shown_above_them(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", *TINY, "--teacher", "none", "--prompt", "27+85=", "sampling.max_new_tokens=2"]) == errors.OK
    assert capfd.readouterr().out.startswith("answers at sampling.temperature=0.7\n")


def test_truncated_completions_are_marked(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", *TINY, "--prompt", "27+85=", "sampling.max_new_tokens=2", "--json"]) == errors.OK
    assert json.loads(capfd.readouterr().out)["teacher"] == ["21 […]"]


def test_scores_match_a_plain_forward_pass(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("27+85=211")
    assert cli.main(["score", *TINY, "--file", "text.txt", "--json"]) == errors.OK
    found = json.loads(capfd.readouterr().out)
    assert "".join(found["tokens"]) == "7+85=211"
    for role, name in (("student", "tiny-student"), ("teacher", "tiny-teacher")):
        config = ModelConfig(path=f"bundled:{name}")
        ids = models.load_tokenizer(config, "model")("27+85=211", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logp = models.load_model(config, "model", torch.device("cpu"))(ids).logits.log_softmax(-1)
        wanted = logp[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(torch.tensor(found[f"{role}_logp"]), wanted, atol=1e-4)


def test_score_of_a_text_after_a_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", *TINY, "--prompt", "27+85=", "--text", "211", "--json"]) == errors.OK
    right = json.loads(capfd.readouterr().out)
    assert cli.main(["score", *TINY, "--prompt", "27+85=", "--text", "999", "--json"]) == errors.OK
    wrong = json.loads(capfd.readouterr().out)
    assert right["tokens"] == ["2", "1", "1"] and sum(right["teacher_logp"]) > -0.1 > -5 > sum(wrong["teacher_logp"])


def test_the_teacher_scores_with_its_own_system_message(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["score", *TINY, "--prompt", "27+85=", "--text", "211", "--json"]
    found = []
    for more in ([], ["teacher.system='Hello there'"]):
        assert cli.main([*words, *more]) == errors.OK
        found.append(json.loads(capfd.readouterr().out))
    assert found[0]["student_logp"] == found[1]["student_logp"] and found[0]["teacher_logp"] != found[1]["teacher_logp"]


def test_a_text_on_its_own_is_scored_without_a_token_that_the_tokenizer_puts_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any) -> Any:
        tokenizer = load_tokenizer(*args)
        end = processors.TemplateProcessing(single="$A <|end|>", pair="$A $B", special_tokens=[("<|end|>", 256)])
        tokenizer.backend_tokenizer.post_processor = end
        return tokenizer

    load_tokenizer = models.load_tokenizer
    monkeypatch.setattr(models, "load_tokenizer", load)
    assert cli.main(["score", *TINY, "--text", "27", "--json"]) == errors.OK
    assert json.loads(capfd.readouterr().out)["tokens"] == ["7"]


class Page(HTMLParser):
    """Its tags, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_score_page_is_self_contained_and_text_is_never_markup(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", *TINY, "--text", HOSTILE, "--html", "page.html"]) == errors.OK
    assert capfd.readouterr().out.endswith("\nwritten to page.html\n")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {*DOCUMENT_TAGS, "header", "h1", "bdi", "p"}
    tokens = [attributes for tag, attributes in page.tags if tag == "bdi" and attributes.get("class") == "tok"]
    assert len(tokens) > 10 and all(set(token) == {"class", "title", "style"} for token in tokens)
    assert "script>alert(1)</script>" in page.shown
    assert not re.search(r"https?://|[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
    assert "default-src 'none'" in text and "script-src" not in text


def test_titles_and_tokens_of_the_score_page_are_escaped() -> None:
    text = score_page(ScoredText([HOSTILE], [-1.0], [-2.0]), "<b>&")
    assert "<script" not in text and "<b>" not in text and "⟨U+202E⟩" in text and "␛[31m" in text
    assert "difference -1.000 nats" in text and "rgba(var(--less),0.25)" in text


def test_the_terminal_gets_no_control_characters() -> None:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(completion_table(HOSTILE, {"student": [HOSTILE], "teacher": ["[red]x[/red]"]}))
    for part in score_parts(ScoredText([HOSTILE, "b"], [-1.0, -0.1], [-4.0, -0.1])):
        console.print(part)
    shown = stream.getvalue()
    assert "\x1b" not in shown and "\u202e" not in shown and "[red]x[/red]" in shown and "-3.000" in shown


@pytest.mark.parametrize(("count", "named"), [(40, list(range(40))), (113, list(range(1, 21)))])
def test_the_table_of_scores_has_all_tokens_or_those_that_differ_most_in_their_order(count: int, named: list[int]) -> None:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=100)
    teacher = [-1.0 - (index if index <= 20 else 0) / 10 for index in range(count)]
    for part in score_parts(ScoredText([f"t{index}." for index in range(count)], [-1.0] * count, teacher)):
        console.print(part)
    shown = stream.getvalue()
    assert [int(index) for index in re.findall(r"'t(\d+)\.'", shown)] == named
    assert ("the 20 of 113 tokens that differ most, in their order; --json has all" in shown) == (count > 40)


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["score", *TINY], 64, "--text TEXT or --file FILE"),
        (["score", *TINY, "--text", "a", "--file", "b"], 64, "one text"),
        (["score", *TINY, "--file", "nowhere.txt"], 65, "nowhere.txt: No such file"),
        (["score", *TINY, "--text", "77", "--html", "nowhere/x.html"], 74, "nowhere/x.html: there is no folder nowhere"),
        (["score", *TINY, "--text", "77", "--html", "."], 74, ".: a folder; name a file"),
        (["eval", *TINY, "--out", "nowhere/x.json"], 74, "nowhere/x.json: there is no folder nowhere"),
        (["sample", *TINY, "--file", "\x1b[31m\u202e"], 65, "␛[31m⟨U+202E⟩: No such file"),
        (["score", *TINY, "--text", "7"], 65, "no token that follows another one"),
        (["score", *TINY, "--text", "7" * 600], 65, "600 tokens, the student takes 512"),
        (["score", "nowhere/at/all", "--text", "77"], 64, "there is no such folder"),
        (["sample", *TINY, "other", "--prompt", "1"], 64, "--prompt TEXT"),
        (["sample", *TINY, "--file", "binary"], 65, "not a text"),
        (["sample", *TINY, "--file", "empty"], 65, "--prompt TEXT"),
        (["sample", *TINY, "--wat"], 64, "opd"),
        (["sample", *TINY, "-n", "x"], 64, "whole number"),
    ],
)
def test_sample_and_score_mistakes_are_one_line_with_an_exit_code(
    words: list[str], code: int, part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").touch()
    assert cli.main(words) == code
    shown = capfd.readouterr()
    assert part in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_prompts_of_a_file_are_its_lines_whatever_other_separators_are_in_them(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a\u2028b\x85c\r\n\nd".encode())
    assert texts.read_prompts([], "prompts.txt", input) == ["a\u2028b\x85c", "d"]


def test_prompts_end_with_the_input() -> None:
    def ask() -> str:
        raise EOFError

    assert texts.read_prompts([], None, ask) == []
    assert texts.read_prompts(["a"], None, ask) == ["a"]
    with pytest.raises(DataError):
        texts.read_text("no/such/file")
