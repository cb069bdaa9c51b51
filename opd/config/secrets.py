"""Refuse secrets in command lines and configs, which are written to files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.errors import ConfigError

KEYS = ("token", "api_key", "apikey", "password", "passwd", "secret", "access_token", "auth_token", "hf_token", "secret_key", "private_key")
VALUES = re.compile(
    r"\b(hf_|api_org_)[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
UNSET = ("", "null", "None", "none")


def refuse_in_words(words: Sequence[str]) -> None:
    """Raise `ConfigError`, without showing the value, if a command line contains a secret."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        refuse(key, value.strip("'\""), word)


def refuse_in_config(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError`, without showing the value, if a composed config contains a secret."""
    for key, value in texts(config):
        refuse(key, value, value)


def refuse(key: str, value: str, text: str) -> None:
    if VALUES.search(text) or (key.rpartition(".")[2].lower() in KEYS and value not in UNSET):
        shown = "an argument" if VALUES.search(key) else key
        raise ConfigError(
            f"{shown}: looks like a secret (its value is not shown), and options are written to files; remove it and set an environment "
            "variable such as HF_TOKEN, which the libraries read"
        )


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings in nested mappings and lists, with their dotted keys."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from texts(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part, key)
    elif isinstance(value, str):
        yield key, value
