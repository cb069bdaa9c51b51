"""The page: its frame, its head and its policy. All text from runs goes through `text`, all data into an inert block of JSON."""

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from opd import __version__
from opd.errors import DataError
from opd.report import curves, sections
from opd.report.tokens import MOST_BYTES, embedded
from opd.runs.reader import Run

HERE = Path(__file__).parent


def page(runs: Sequence[Run]) -> str:
    """One HTML document about one run, or several side by side. Nothing in it is fetched, and no text of a run can become markup.

    Raises `DataError` for a run whose files cannot be read.
    """
    style, script = (HERE / "page.css").read_text(encoding="utf-8"), (HERE / "page.js").read_text(encoding="utf-8")
    told, token_data, notes = [], [], []
    for run in runs:
        try:
            told.append(sections.told(run))
            own, left_out = embedded(run, MOST_BYTES // len(runs))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{run.path}: its lines cannot be read ({type(error).__name__}: {error})") from None
        token_data.append(own)
        notes += left_out
    names = [sections.text(run.name) for run in told]
    title = names[0] if len(names) == 1 else f"{len(names)} runs"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title} · opd report</title>",
            f"<style>{style}{colours()}</style>",
            "</head>",
            "<body>",
            "<main>",
            sections.heading(told),
            sections.results(told),
            sections.progress(told),
            sections.positions(told),
            sections.token_view(token_data, notes),
            sections.costs(told),
            sections.settings(told),
            f"<footer>Made by opd {escape(__version__)}. Everything in this page is in this file.</footer>",
            "</main>",
            f'<script type="application/json" id="data">{inert(token_data)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def policy(script: str) -> str:
    """Nothing may be fetched or sent, and of scripts only ours may run."""
    digest = b64encode(sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def inert(data: Any) -> str:
    """JSON that no browser takes for markup."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        written = written.replace(letter, f"\\u{ord(letter):04x}")
    return written


def colours() -> str:
    """The colours of the runs' lines, for both schemes."""

    def rules(values: Sequence[str]) -> str:
        return "".join(f".c{number}{{--line:{value}}}" for number, value in enumerate(values))

    return f"{rules(curves.LIGHT)}@media screen and (prefers-color-scheme:dark){{{rules(curves.DARK)}}}"
