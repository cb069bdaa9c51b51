"""The data of the token view: stored completions of some steps, made harmless and cut so that the page stays small."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from opd.runs.outcome import is_detailed_step
from opd.runs.reader import Run
from opd.runs.text import visible

MAX_BYTES = 6_000_000  # of completions in a page, over all runs
MAX_TOKENS = 1_500  # per completion
MAX_TOKEN_CHARACTERS = 60
MAX_PROMPT_CHARACTERS = 2_000
CLIPPED, ADVANTAGE_CLIPPED = 1, 2  # flags, as in page.js
COLUMNS = ("tokens", "ids", "student_logp", "teacher_logp", "entropy", "clipped", "cut", "alternatives")


def token_view_data(run: Run, max_bytes: int) -> tuple[dict[str, Any], list[str]]:
    """Return the stored completions that the student generated as page.js reads them, and a sentence for each thing left out.

    Args:
        run: its rollouts are read from its folder.
        max_bytes: the most that the completions may take as JSON.
    """
    stored = run.rollout_steps()
    planned = run.config.get("train", {}).get("max_steps")
    total = planned if isinstance(planned, int) else max(stored, default=1)
    rollouts: list[dict[str, Any]] = []
    for step in spread([step for step in stored if is_detailed_step(step, total)]):
        of_step = [_rollout(step, record) for record in run.rollouts(step) if not record.get("given")]
        max_bytes -= sum(len(json.dumps(rollout, ensure_ascii=False).encode()) for rollout in of_step)
        if max_bytes < 0:
            break
        rollouts += of_step
    rollouts.sort(key=lambda rollout: rollout["step"])
    steps = sorted({rollout["step"] for rollout in rollouts})
    name, notes = visible(run.name, 120), []
    if len(steps) < len(stored):
        notes.append(f"{name}: completions of {len(steps)} of {len(stored)} stored steps are in this page; rollouts/ has all of them.")
    shortened = sum(rollout["more"] > 0 for rollout in rollouts)
    if shortened:
        notes.append(f"{name}: {shortened} completions are cut to their first {MAX_TOKENS:,} tokens.")
    return {"name": name, "steps": steps, "rollouts": rollouts}, notes


def spread(steps: Sequence[int]) -> list[int]:
    """Reorder steps so that every prefix is spread over the run: the first, the last, then always the middle of a gap."""
    gaps, order = [(0, len(steps) - 1)], [*steps[:1], *steps[1:][-1:]]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(steps[middle])
            gaps += [(low, middle), (middle, high)]
    return order


def _rollout(step: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored rollout as page.js reads it.

    Each token is [text, id, student's log-prob, teacher's log-prob, entropy, flags, alternatives, its span]. The last is there where the
    teacher has another tokenizer and the span several tokens: their text, of which the log-probs are then.
    """
    tokens = []
    record, texts = by_span(record)
    for text, token, student, teacher, entropy, clipped, advantage_clipped, alternatives, span in zip_longest(
        *((record.get(name) or [])[:MAX_TOKENS] for name in COLUMNS), texts[:MAX_TOKENS]
    ):
        flags = CLIPPED * bool(clipped) + ADVANTAGE_CLIPPED * bool(advantage_clipped)
        others = [
            [visible(each["text"], MAX_TOKEN_CHARACTERS), logp, each["id"] == token]
            for each in alternatives or ()
            if (logp := _rounded(each["logp"])) is not None
        ]
        logps = _rounded(student), _rounded(teacher), _rounded(entropy)
        tokens.append(
            [
                visible(text, MAX_TOKEN_CHARACTERS),
                token,
                *logps,
                flags,
                others,
                *([] if span is None else [visible(span, MAX_TOKEN_CHARACTERS)]),
            ]
        )
    return {
        "step": step,
        "sample": record.get("sample_id"),
        "attempt": record.get("attempt"),
        "prompt": visible(str(record.get("prompt", "")), MAX_PROMPT_CHARACTERS),
        "truncated": record.get("finish_reason") == "length",
        "trained": record.get("learnt"),
        "more": max(0, len(record["tokens"]) - MAX_TOKENS),
        "tokens": tokens,
    }


def by_span(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str | None]]:
    """Return a stored rollout with the log-probs of a whole span at each of its tokens, and each token's span of several as text.

    A record has `span` where the teacher has another tokenizer: how many tokens of its span follow each token.
    """
    following: list[int | None] = record.get("span") or []
    texts: list[str | None] = [None] * len(record["tokens"])
    student, teacher = list(record["student_logp"]), list(record["teacher_logp"])
    start = 0
    for index, count in enumerate(following):
        if count is None or count < 0:
            start = index + 1
        elif count == 0:
            span = slice(start, index + 1)
            size = index + 1 - start
            if size > 1:
                student[span] = [None if None in student[span] else sum(student[span])] * size
                teacher[span] = [teacher[index]] * size
                texts[span] = ["".join(record["tokens"][span])] * size
            start = index + 1
    return {**record, "student_logp": student, "teacher_logp": teacher}, texts


def _rounded(value: float | None) -> float | None:
    """Return a stored number as page.js reads it: None for one that is not finite, which earlier versions stored as NaN."""
    return None if value is None or not math.isfinite(value) else round(value, 3)
