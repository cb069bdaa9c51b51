"""What is shown on a terminal can do nothing to it."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from opd.training import record
from opd.training.display import Display

HOSTILE = "a\x1b[31mb\x07\u202ec\nd\r"


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def test_notes_hold_no_control_characters(screen: io.StringIO) -> None:
    Display(1, shown=True, console=Console(file=screen, soft_wrap=True)).note(HOSTILE)
    assert screen.getvalue() == "a␛[31mb␇⟨U+202E⟩c\nd␍\n"


def test_a_sample_is_one_harmless_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "decode", lambda tokenizer, ids, **options: HOSTILE)
    rollout = SimpleNamespace(request=SimpleNamespace(prompt=SimpleNamespace(text="say\n  a")), completion=(1,))
    assert record.sample_text(None, [SimpleNamespace(rollout=rollout)]) == "say a → a␛[31mb␇⟨U+202E⟩c d"
    assert record.sample_text(None, []) == ""
