"""The task `arithmetic`: two-digit addition with the digits of the sum reversed (`27+85=` -> `211`).

With the units first, every carry is known before the digit that it changes, so that a tiny model learns the task in seconds.
"""

import itertools
import random

QUESTIONS, EVAL_ROWS = 8100, 1000


def rows(split: str, seed: int = 0, size: int = QUESTIONS) -> list[dict[str, str]]:
    """Return the questions of a split as rows such as `{"prompt": "27+85=", "answer": "211"}`.

    All 8100 pairs of numbers 10..99 are shuffled with `seed`: the last 1000 are "eval", the other 7100 "train". With a smaller `size` each
    split begins with the same questions and has that share of them.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"arithmetic: unknown split {split!r}; use 'train' or 'eval'")
    pairs = list(itertools.product(range(10, 100), repeat=2))
    random.Random(seed).shuffle(pairs)
    chosen = pairs[-EVAL_ROWS:] if split == "eval" else pairs[:-EVAL_ROWS]
    chosen = chosen[: len(chosen) * size // QUESTIONS]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)[::-1]} for a, b in chosen]
