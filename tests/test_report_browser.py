"""The report in a real browser: nothing is fetched, nothing hostile runs, and the token view does what it says."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from opd.report import render_report
from opd.runs.folder import write_json
from opd.runs.reader import open_run

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>window.pwned=1</script><img src=http://127.0.0.1:9/x onerror=window.pwned=1>\u202eevil\u2066</bdi></div>&quot;"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium was found (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a file; whatever the page says, throws or asks for but the file itself is in `page.complaints`."""
    opened = []

    def visit(file: Path, **options):
        page = chromium.new_page(**options)
        opened.append(page)
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: None if request.url == file.as_uri() else page.complaints.append(request.url))
        page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
        page.goto(file.as_uri())
        return page

    yield visit
    for page in opened:
        page.close()


@pytest.fixture(scope="module")
def stored(debug_run) -> dict[int, list[dict]]:
    run = open_run(debug_run)
    return {step: run.rollouts(step) for step in run.rollout_steps()}


def slide(page, control: str, value: float) -> None:
    page.evaluate(
        "([id, value]) => { const one = document.getElementById(id); one.value = value; one.dispatchEvent(new Event('input')) }",
        [control, value],
    )


def texts(page) -> list[str]:
    return page.locator("#columns .tok").all_text_contents()


def largest(record: dict) -> float:
    return max(abs(teacher - student) for teacher, student in zip(record["teacher_logp"], record["student_logp"], strict=True))


@pytest.mark.parametrize("options", [{}, {"viewport": PHONE}, {"color_scheme": "dark"}])
def test_a_real_run_is_shown_without_complaint_request_or_sideways_scrolling(visit, debug_run, stored, options):
    page = visit(debug_run / "report.html", **options)
    assert texts(page) == [token for record in stored[6] for token in record["tokens"]]
    assert page.locator("section").count() == 6 and page.locator("svg polyline").count() > 8
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = options.get("color_scheme") == "dark"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(paper) < 60) if dark else (min(paper) > 240)
    assert page.complaints == []


def test_pointing_tapping_and_the_keyboard_show_both_probabilities_and_the_alternatives(visit, debug_run, stored):
    page = visit(debug_run / "report.html")
    record, tokens, detail = stored[6][0], page.locator("#columns .tok"), page.locator("#detail")

    def shown(index: int) -> bool:
        text = detail.inner_text()
        best = [one["text"] for one in record["alternatives"][index]]
        rows = page.locator("#detail .alt").count()
        gap = abs(record["teacher_logp"][index] - record["student_logp"][index])
        student = f"{100 * math.exp(round(record['student_logp'][index], 3)):.1f}"
        return f"position {index + 1}" in text and f"{gap:.2f} nats" in text and student in text and best[0] in text and rows == 5

    tokens.nth(0).hover()
    assert shown(0)
    tokens.nth(1).click()
    assert shown(1) and page.evaluate("document.activeElement.classList.contains('tok')")
    page.keyboard.press("ArrowLeft")
    assert shown(0)
    assert page.locator("#columns .tok[tabindex='0']").count() == 1  # one stop for the tab key, arrows for the rest
    assert page.complaints == []


def test_the_step_slider_goes_through_the_steps(visit, debug_run, stored):
    page = visit(debug_run / "report.html")
    for place, step in enumerate(sorted(stored)):
        slide(page, "step", place)
        assert page.locator("#step-name").inner_text() == str(step)
        assert texts(page) == [token for record in stored[step] for token in record["tokens"]]


def test_the_filter_leaves_what_differs_most(visit, debug_run, stored):
    page = visit(debug_run / "report.html")
    page.select_option("#order", "largest")
    everything = sorted(map(largest, (record for records in stored.values() for record in records)), reverse=True)
    heads = page.locator(".rollout > p:first-child").all_text_contents()
    found = [float(head.split("up to ")[1].split()[0]) for head in heads]
    assert found == pytest.approx(everything[:12], abs=0.006) and page.locator("#step").is_disabled()
    least = round(everything[3] - 0.05, 1)
    slide(page, "least", least)
    assert page.locator(".rollout").count() == sum(value >= least for value in everything) >= 4
    bright = page.locator("#columns .tok:not(.dim)").count()
    assert 0 < bright < page.locator("#columns .tok").count()
    slide(page, "least", 1000)  # as far as it goes, which is just above the largest
    assert page.locator(".rollout").count() == 0 and "No completion" in page.locator("#columns").inner_text()


def test_runs_stand_side_by_side(visit, debug_run, tmp_path):
    shutil.copytree(debug_run, tmp_path / "other", ignore=shutil.ignore_patterns("final", "checkpoints"))
    file = tmp_path / "both.html"
    file.write_text(render_report([open_run(debug_run), open_run(tmp_path / "other")]), encoding="utf-8")
    page = visit(file)
    assert page.locator("#columns .column").count() == 2 and page.locator("#result tbody tr").count() == 2
    boxes = [page.locator("#columns .column").nth(index).bounding_box() for index in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert page.complaints == []


def hostile_run(folder: Path) -> Path:
    folder.mkdir()
    words = [HOSTILE, "\u202e" * 50, "x" * 200_000, "\x00\x1b[31m\x07", "\ud800", "</script><!--", "a\u2028b", *["word"] * 5_000]
    record = {
        "sample_id": 0, "epoch": 0, "attempt": 0, "prompt": HOSTILE + "\n" + "y" * 200_000, "completion": "".join(words), "tokens": words,
        "ids": list(range(len(words))), "finish_reason": "length", "learnt": 3, "student_logp": [-1.0] * len(words),
        "teacher_logp": [-2.0] * 4 + [None] * (len(words) - 4), "entropy": [0.5] * len(words), "clipped": None, "cut": None,
        "alternatives": [[{"id": 0, "text": HOSTILE, "logp": -0.1}]] + [None] * (len(words) - 1),
    }  # fmt: skip
    write_json(folder / "status.json", {"status": "failed", "reason": HOSTILE, "exit_code": 70})
    write_json(
        folder / "run.json", {"config": {"name": HOSTILE, "data": {"path": HOSTILE, HOSTILE: [HOSTILE]}, "model": {"path": HOSTILE}}}
    )
    (folder / ".hydra").mkdir()
    (folder / ".hydra/overrides.yaml").write_text(json.dumps([HOSTILE]))
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 2, "reverse_kl": 1.0}\n')
    (folder / "rollouts").mkdir()
    (folder / "rollouts/step_000001.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_hostile_text_stays_text(visit, tmp_path):
    folder = hostile_run(tmp_path / "<img src=x onerror=alert(1)>\u202e")
    file = tmp_path / "hostile.html"
    file.write_text(render_report([open_run(folder)]), encoding="utf-8")
    page = visit(file, viewport=PHONE)
    tokens = page.locator("#columns .tok")
    tokens.nth(0).click()
    assert page.evaluate("window.pwned") is None
    counted = "[document.images.length, document.scripts.length, document.querySelectorAll('main bdi script').length]"
    assert page.evaluate(counted) == [0, 2, 0]
    assert "<script>" in tokens.nth(0).inner_text() and "⟨U+202E⟩" in tokens.nth(1).inner_text()
    assert "<script>" in page.locator("#detail .alt").inner_text()
    shown = page.locator("body").inner_text()
    assert not set(shown) & set("\u202e\u2066\x00\x1b\x07\u2028") and "␀" in shown and "⟨U+D800⟩" in shown
    assert tokens.nth(0).evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"
    assert len(tokens.nth(2).inner_text()) < 200 and "characters" in tokens.nth(2).inner_text()
    assert tokens.count() == 1_500 and "3,507 more tokens are not in this page" in shown
    assert tokens.nth(3).evaluate("one => one.classList.contains('off')") and page.locator(".edge").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert file.stat().st_size < 300_000 and page.complaints == []


def test_the_policy_lets_no_script_run_and_nothing_be_fetched(visit, debug_run):
    page = visit(debug_run / "report.html")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}))")
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x'}))")
    outcome = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'answered', (error) => String(error))")
    assert page.evaluate("window.pwned") is None and "TypeError" in outcome
    for blocked in ("Executing inline script", "Loading the image", "Connecting to"):
        assert any(complaint.startswith(blocked) and "Content Security Policy" in complaint for complaint in page.complaints)


def test_printed_it_has_the_tokens_and_no_controls(visit, debug_run):
    page = visit(debug_run / "report.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("#columns").is_visible()
    assert not page.locator("#controls").is_visible() and not page.locator("#detail").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)") == [29, 33, 37]
