"""The HTML page around the sections. All text of runs is escaped (`sections.text`), all data is inert JSON."""

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from opd import __version__
from opd.errors import DataError, OpdError
from opd.report import charts, sections, tokens
from opd.report.controls import Effect, effects
from opd.runs.outcome import achieved
from opd.runs.reader import MEMBER, Run, find_runs

HERE = Path(__file__).parent
GENERATOR = '<meta name="generator" content="opd">'


def render_report(runs: Sequence[Run]) -> str:
    """Return an HTML document about one run, or several side by side.

    Raises:
        DataError: the files of a run cannot be read.
    """
    outcomes, token_data, notes = [], [], []
    for run in runs:
        try:
            outcomes.append(achieved(run.metrics, run.evaluations))
            data, left_out = tokens.token_view_data(run, tokens.MAX_BYTES // len(runs))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{run.path}: its lines cannot be read ({type(error).__name__}: {error})") from None
        token_data.append(data)
        notes += left_out
    body = [
        sections.heading(runs),
        sections.results(runs, outcomes, _effects(runs)),
        sections.datasets(runs),
        sections.progress(runs),
        sections.positions(runs),
        sections.answers(runs),
        sections.token_view(token_data, notes),
        sections.costs(runs),
        sections.settings(runs),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return document(f"{title} · opd report", "\n".join(body), token_data)


def _effects(runs: Sequence[Run]) -> list[Effect]:
    """Return what the teacher accounts for; for one run of a sweep, with the other members as far as they can be read."""
    if len(runs) > 1:
        return effects(runs)
    [run] = runs
    if not (run.path / MEMBER).is_file():
        return []
    try:
        return [effect for effect in effects(find_runs([run.path.parent])) if str(run.path) in effect.runs]
    except (OpdError, ValueError, KeyError, TypeError, AttributeError):  # of another run, which has a report of its own
        return []


def document(title: str, body: str, data: Any = None) -> str:
    """Return a self-contained HTML document in the style of the report. Its policy forbids to fetch or send anything.

    Args:
        title: plain text.
        body: HTML.
        data: what page.js shows, embedded as JSON; without it there is no script.
    """
    style, script = (HERE / "page.css").read_text(encoding="utf-8"), (HERE / "page.js").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    scripts = ""
    if data is not None:
        policy += f"; script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"
        scripts = f'<script type="application/json" id="data">{inert_json(data)}</script>\n<script>{script}</script>\n'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{sections.text(title)}</title>
<style>{style}{_line_colours()}</style>
</head>
<body>
<main>
{body}
<footer>Made by opd {escape(__version__)}. Everything in this page is in this file.</footer>
</main>
{scripts}</body>
</html>
"""


def inert_json(data: Any) -> str:
    """Return JSON that no browser takes for markup."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _line_colours() -> str:
    light, dark = (
        "".join(f".c{number}{{--line:{value}}}" for number, value in enumerate(values)) for values in (charts.LIGHT, charts.DARK)
    )
    return f"{light}@media screen and (prefers-color-scheme:dark){{{dark}}}"
