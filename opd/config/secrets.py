"""What looks like a secret has no place in a command line or a config: both are written to files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.errors import ConfigError

KEYS = ("token", "api_key", "apikey", "password", "passwd", "secret", "access_token", "auth_token", "hf_token", "secret_key", "private_key")
VALUES = re.compile(
    r"\b(hf_|api_org_)[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
NOTHING = ("", "null", "None", "none")


def refuse_in_words(words: Sequence[str]) -> None:
    """Raises `ConfigError`, without the value, where an argument carries a secret."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        refuse(key, value.strip("'\""), word)


def refuse_in_config(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError`, without the value, where a composed config holds a secret, wherever it came from."""
    for key, value in leaves(config):
        refuse(key, value, value)


def refuse(key: str, value: str, text: str) -> None:
    last = key.rpartition(".")[2].lower()
    if (last in KEYS and value not in NOTHING) or VALUES.search(text):
        shown = key if not VALUES.search(key) else "an argument"
        raise ConfigError(
            f"{shown}: looks like a secret (its value is not shown), and what is configured is written to files; take it out and put it "
            "into the environment, for example HF_TOKEN, where the libraries look for it"
        )


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts, by dotted key."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part, key)
    elif isinstance(value, str):
        yield key, value
