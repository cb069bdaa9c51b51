"""Text of models and data made harmless to look at: what would hide, reorder or break a page becomes a visible mark."""

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, formats (direction marks among them), halves of pairs, no characters


def harmless(text: str) -> str:
    """`text` as it is, but for characters that do something to what stands around them."""
    return "".join(letter if letter in "\n\t" else mark(letter) for letter in text)


def one_line(text: str) -> str:
    return harmless(" ".join(text.split()))


def visible(text: str, most: int) -> str:
    """At most about `most` characters of `text`, with marks in the place of all that cannot be seen. Line feeds stay, behind a mark."""
    shown = "".join(mark(letter) for letter in text[:most])
    return shown if len(text) <= most else f"{shown} … (+{len(text) - most:,} characters)"


def mark(letter: str) -> str:
    if letter == "\n":
        return "↵\n"
    if letter == "\t":
        return "⇥"
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))  # the control pictures
    return f"⟨U+{ord(letter):04X}⟩" if unicodedata.category(letter) in HIDDEN else letter
