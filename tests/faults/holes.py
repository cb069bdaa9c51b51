"""Known holes in a build, each with the case that has to find it: they show that the cases can fail."""

import fcntl
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from faults import teachers
from opd.runs import folder
from opd.teachers import ServedTeacher, served
from opd.training import checkpoint, checks
from opd.training.checkpoint import Checkpoint


def skip_manifest() -> None:
    """Use checkpoints without verifying them."""
    checkpoint.verify = lambda path: None


def lose_rollouts() -> None:
    """Forget the rollouts of a step that was stopped between its inner steps."""
    Checkpoint.tensors = lambda self, name: None  # type: ignore[method-assign]


def skip_flush() -> None:
    """Do not wait for the disk."""
    folder.flush = lambda path: None


def skip_lock() -> None:
    """Let two runs write to the same folder."""
    fcntl.flock = lambda *_: None


def accept_non_finite() -> None:
    """Apply gradients whatever numbers they are."""
    math.isfinite = lambda value: True


def tries_only(kind: str, remove: Callable[[], None]) -> Callable[[], None]:
    """Remove a check of served teachers, and let `wrong-teachers` try the kind that it finds."""

    def open_hole() -> None:
        teachers.KINDS = {kind: teachers.KINDS[kind]}
        remove()

    return open_hole


def trust_names() -> None:
    """Do not compare a server's tokens with the tokenizer's."""
    served.check_names = lambda *_: None


def trust_limit() -> None:
    """Do not look at how many tokens a server takes."""
    models = served.served_models
    served.served_models = lambda server: dict.fromkeys(models(server), 10**6)


def trust_weights() -> None:
    """Do not compare the first batch's scores with those of the weights at `teacher.path`."""
    served.check_weights = lambda *_: None


def trust_first_scores() -> None:
    """Do not compare two scorings of the first batch."""
    served.check_spread = lambda *_: None


def trust_shape() -> None:
    """Do not look at the entropy of a served teacher."""
    ServedTeacher.check_entropy = lambda *_: None  # type: ignore[method-assign]


def trust_later() -> None:
    """Do not compare a served teacher with that of the run's start."""
    ServedTeacher.check_drift = lambda *_: None  # type: ignore[method-assign]


def accept_any_answer() -> None:
    """Make log-probs of whatever a server answers."""

    def number(value: Any) -> float:
        return value if isinstance(value, float) and not math.isnan(value) else 0.0

    def read(answer: Any, ids: Sequence[int], k: int = 0) -> served.Scores:
        entries = answer["choices"][0]["prompt_logprobs"][1:]
        logp = [number(entry.get(str(token), {}).get("logprob")) for entry, token in zip(entries, ids[1:], strict=False)]
        top = [[(0, max(number(value["logprob"]) for value in entry.values()))] * k for entry in entries]
        return served.Scores(logp + [0.0] * (len(ids) - 1 - len(logp)), top)

    served.read_scores = read


def trust_distance() -> None:
    """Do not compare teacher and student."""
    checks.check_distance = lambda *_: None


class Hole(NamedTuple):
    """A hole, the case that has to find it, and the tries that suffice."""

    open: Callable[[], None]
    case: str
    times: int


HOLES = {
    "no-manifest": Hole(skip_manifest, "corruptions", 3),
    "no-buffer": Hole(lose_rollouts, "stops", 1),
    "no-flush": Hole(skip_flush, "power-cuts", 100),
    "no-lock": Hole(skip_lock, "second-writer", 1),
    "no-check-of-numbers": Hole(accept_non_finite, "not-finite", 4),
    "no-check-of-names": Hole(tries_only("other tokens", trust_names), "wrong-teachers", 1),
    "no-check-of-limit": Hole(tries_only("too short", trust_limit), "wrong-teachers", 1),
    "no-check-of-weights": Hole(tries_only("another model from the start", trust_weights), "wrong-teachers", 1),
    "no-second-scoring": Hole(tries_only("never the same", trust_first_scores), "wrong-teachers", 1),
    "no-check-of-entropy": Hole(tries_only("uniform from the start", trust_shape), "wrong-teachers", 1),
    "no-canary": Hole(tries_only("another model", trust_later), "wrong-teachers", 1),
    "null-taken": Hole(tries_only("null", accept_any_answer), "wrong-teachers", 1),
    "NaN-taken": Hole(tries_only("NaN", accept_any_answer), "wrong-teachers", 1),
    "short-answers-taken": Hole(tries_only("short answers", accept_any_answer), "wrong-teachers", 1),
    "shuffled-answers-taken": Hole(tries_only("shuffled answers", accept_any_answer), "wrong-teachers", 1),
    "no-word-of-student": Hole(tries_only("the student", trust_distance), "wrong-teachers", 1),
}
