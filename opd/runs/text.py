"""How text and numbers are shown to people, on terminals, in reports and in model cards."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "–"
# Controls, formats (among them direction marks), surrogates, private and unassigned characters, line and paragraph separators.
HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def harmless(text: str) -> str:
    """Replace characters that are invisible or affect the text around them by visible marks; keep line feeds and tabs."""
    return "".join(character if character in "\n\t" else _mark(character) for character in text)


def one_line(text: str) -> str:
    """Return `harmless(text)` on one line."""
    return harmless(" ".join(text.split()))


def visible(text: str, limit: int) -> str:
    """Return the first `limit` characters with a mark for each invisible one; line feeds get a mark and stay."""
    shown = "".join(_mark(character) for character in text[:limit])
    return shown + cut(text, limit)[len(text[:limit]) :]


def cut(text: str, limit: int) -> str:
    """Return the first `limit` characters, and how many are left out."""
    return text if len(text) <= limit else f"{text[:limit]} … (+{len(text) - limit:,} characters)"


def _mark(character: str) -> str:
    if character in "\n\t":
        return "↵\n" if character == "\n" else "⇥"
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # Unicode's control pictures
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in HIDDEN_CATEGORIES else character


def format_number(value: float | None, spec: str = ".4f") -> str:
    return MISSING if value is None else format(value, spec)


def format_kl(mean: float | None, interval: Sequence[float] | None, digits: int = 4) -> str:
    """Return a KL in nats as `mean [low, high]`, or without an interval where there is none."""
    shown = format_number(mean, f".{digits}f")
    return shown if mean is None or interval is None else f"{shown} [{interval[0]:.2f}, {interval[1]:.2f}]"


def format_percent(value: float | None, spec: str = ".1f") -> str:
    return MISSING if value is None else f"{100 * value:{spec}}%"


def format_amount(value: float | None, shares: bool, sign: str = "") -> str:
    """Return a reward, or a difference of rewards, in percent or as it is. shares: whether all rewards are within 0 and 1."""
    return format_percent(value, f"{sign}.1f") if shares else format_number(value, f"{sign}.4g")


def format_reward(mean: float | None, interval: Sequence[float] | None, *, digits: int = 1, sign: str = "", shares: bool = True) -> str:
    """Return `mean [low, high]`; the mean alone where all values are the same number, which makes no interval.

    Args:
        mean: a reward, or a difference of rewards.
        interval: its bounds.
        digits: of the bounds of shares; 0 fits into tables of 80 columns.
        sign: "+" shows the sign of positive numbers too.
        shares: whether all rewards are within 0 and 1, and shown in percent.
    """
    amount = format_amount(mean, shares, sign)
    if mean is None or interval is None or (interval[0] == interval[1] == mean):
        return amount
    low, high = (format(100 * bound, f"{sign}.{digits}f") if shares else format(bound, f"{sign}.4g") for bound in interval)
    return f"{amount} [{low}, {high}]"


def gap_label(closed: float) -> str:
    """Return the words for the share of the student's distance to the teacher that training closed; below 0 it grew."""
    return "of the gap to the teacher closed" if closed >= 0 else "the gap to the teacher grew by"


def describe_gap(closed: float, interval: Sequence[float] | None = None) -> str:
    """Return the sentence about that share, with its interval where there is one."""
    if closed >= 0:
        return f"{format_reward(closed, interval)} {gap_label(closed)}"
    grown = None if interval is None else (-interval[1], -interval[0])
    return f"{gap_label(closed)} {format_reward(-closed, grown)}"


def format_duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def format_bytes(count: float | None) -> str:
    if count is None:
        return MISSING
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def make_console(width: int = 160, soft_wrap: bool = False) -> "Console":
    """Return a console on standard output, at least `width` columns wide where there is no terminal to fit into."""
    from rich.console import Console  # takes 50 ms to import, which `opd --help` does without

    console = Console(highlight=False, soft_wrap=soft_wrap)
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console
