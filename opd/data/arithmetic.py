"""The task `arithmetic`: two-digit addition, the answer written with its digits reversed (`27+85=` -> `211`).

Units first, so that every carry is known by the time the digit it changes is written: one pass of a tiny model
suffices, and the task is learnt in seconds.
"""

import itertools
import random

EVAL_ROWS = 1000


def rows(split: str, seed: int = 0) -> list[dict[str, str]]:
    """Return the questions of `split` as rows `{"prompt": "27+85=", "answer": "211"}`.

    All 8100 pairs of numbers 10..99 are shuffled from `seed`; the last 1000 are "eval", the other 7100 "train", so
    the two never share a question under one seed. Raises ValueError on any other split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"arithmetic: unknown split {split!r}; use 'train' or 'eval'")
    pairs = list(itertools.product(range(10, 100), repeat=2))
    random.Random(seed).shuffle(pairs)
    chosen = pairs[-EVAL_ROWS:] if split == "eval" else pairs[:-EVAL_ROWS]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)[::-1]} for a, b in chosen]
