"""The token view's data: stored completions of some steps of each run, tamed and cut so that the page stays small."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from opd.runs.outcome import is_detailed_step
from opd.runs.reader import Run
from opd.runs.text import visible

MOST_BYTES = 6_000_000  # of completions in a page, over all runs
MOST_TOKENS = 1_500  # of a completion
MOST_LETTERS = 60  # of a token
MOST_PROMPT = 2_000  # letters of a prompt
CLIPPED, CUT = 1, 2


def embedded(run: Run, room: int) -> tuple[dict[str, Any], list[str]]:
    """The run's name, steps and completions as `page.js` takes them, in at most `room` bytes; and what was left out, a sentence each."""
    stored = run.rollout_steps()
    rollouts: list[dict[str, Any]] = []
    for step in spread([step for step in stored if is_detailed_step(step, last_step(run, stored))]):
        own = [rollout(step, record) for record in run.rollouts(step)]
        room -= sum(len(json.dumps(one, ensure_ascii=False).encode()) for one in own)
        if room < 0:
            break
        rollouts.extend(own)
    rollouts.sort(key=lambda one: one["step"])
    steps = sorted({one["step"] for one in rollouts})
    name, notes = visible(run.name, 120), []
    if len(steps) < len(stored):
        notes.append(f"{name}: completions of {len(steps)} of {len(stored)} stored steps are in this page; rollouts/ holds all.")
    shorter = sum(one["more"] > 0 for one in rollouts)
    if shorter:
        notes.append(f"{name}: {shorter} completions are cut to their first {MOST_TOKENS:,} tokens.")
    return {"name": name, "steps": steps, "rollouts": rollouts}, notes


def last_step(run: Run, stored: Sequence[int]) -> int:
    planned = run.config.get("train", {}).get("max_steps")
    return planned if isinstance(planned, int) else max(stored, default=1)


def spread(steps: Sequence[int]) -> list[int]:
    """The same steps in another order: the first, the last, and then always from the middle of a gap, so that any beginning is spread."""
    gaps, found = [(0, len(steps) - 1)], [*steps[:1], *steps[1:][-1:]]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            found.append(steps[middle])
            gaps += [(low, middle), (middle, high)]
    return found


def rollout(step: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A stored rollout as the page takes it. tokens: [text, id, student's log-prob, teacher's, entropy, flags, alternatives] each."""
    kept = slice(MOST_TOKENS)
    return {
        "step": step,
        "sample": record.get("sample_id"),
        "attempt": record.get("attempt"),
        "prompt": visible(str(record.get("prompt", "")), MOST_PROMPT),
        "truncated": record.get("finish_reason") == "length",
        "learnt": record.get("learnt"),
        "more": max(0, len(record["tokens"]) - MOST_TOKENS),
        "tokens": list(tokens({name: (record.get(name) or [])[kept] for name in COLUMNS})),
    }


COLUMNS = ("tokens", "ids", "student_logp", "teacher_logp", "entropy", "clipped", "cut", "alternatives")


def tokens(columns: Mapping[str, Sequence[Any]]) -> Iterator[list[Any]]:
    for text, token, student, teacher, entropy, clipped, cut, best in zip_longest(*(columns[name] for name in COLUMNS)):
        flags = CLIPPED * bool(clipped) + CUT * bool(cut)
        others = [[visible(one["text"], MOST_LETTERS), short(one["logp"]), one["id"] == token] for one in best or ()]
        yield [visible(text, MOST_LETTERS), token, short(student), short(teacher), short(entropy), flags, others]


def short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
