"""How much probability student and teacher give to the ids that are masked because only one of them has these tokens.

Masking a rare token changes nothing that matters. A teacher that wants to begin with `<think>` is another thing: what it says of the tokens
that it would not write there is noise. A student's masked ids are not trained: deployed without the mask, it would still write them.

Columns of the token table, where vocabularies overlap: `student_masked` and `teacher_masked`, the probability of all masked ids, and
`student_masked_id` and `teacher_masked_id`, the most probable of them.
"""

from collections.abc import Mapping

import torch

from opd.models.overlap import Overlap
from opd.training.tokens import Tokens

ROLES = ("student", "teacher")
FIRST = 4  # positions of a completion that are looked at one by one
MAX_TEACHER = 0.01  # mean probability
MAX_FIRST = 0.5  # of the teacher, at any of the first positions, where it decides how to answer
MAX_STUDENT = 0.001
NAMED, SHOWN = 3, 5e-5  # ids in a message, and the least mean probability that is worth a name


def add_masked_metrics(tokens: Tokens) -> None:
    """Add the mean masked probability of each model, and that at each of the first positions, to the table's means."""
    offsets = torch.tensor([offset for rollout in tokens.rollouts for offset in rollout.trained])
    for role in ROLES:
        if f"{role}_masked" not in tokens.columns:
            continue
        mass_N = tokens.as_sampled(f"{role}_masked").double().cpu()
        tokens.means.add_tensors(f"masked/{role}", [mass_N])
        for position in range(FIRST):
            tokens.means.add_tensors(f"masked/{role}_{position + 1}", [mass_N[offsets == position]])


def check_masses(metrics: Mapping[str, float], tokens: Tokens, overlap: Overlap) -> tuple[str, str] | None:
    """Return what is wrong with a step's masked probabilities, and the remedy; None where they are within the bounds."""
    student, teacher = (metrics.get(f"masked/{role}", 0.0) for role in ROLES)
    first, position = max((metrics.get(f"masked/teacher_{position}", 0.0), position) for position in range(1, FIRST + 1))
    too_much = [
        ("teacher", "student", first > MAX_FIRST, f"{first:.1%} of its probability at token {position}, more than {MAX_FIRST:.0%}"),
        ("teacher", "student", teacher > MAX_TEACHER, f"{teacher:.2%} of its probability, more than {MAX_TEACHER:.0%}"),
        ("student", "teacher", student > MAX_STUDENT, f"{student:.2%} of its probability, more than {MAX_STUDENT:.1%}"),
    ]
    for role, other, is_too_much, share in too_much:
        if is_too_much:
            option, remedy = REMEDIES[role]
            names = name_masked(role, tokens, overlap)
            return f"{option}: the {role} gives {share}, to tokens that the {other} lacks (over all tokens: {names})", remedy
    return None


REMEDIES = {
    "teacher": (
        "teacher.path",
        "let it answer without thinking: data.chat_template_kwargs.enable_thinking=false, or for the teacher alone "
        "teacher.chat_template_kwargs.enable_thinking=false; or set model.path to a student that has these tokens",
    ),
    "student": (
        "model.path",
        "it would still write them after training: set data.chat_template_kwargs.enable_thinking=false, or teacher.path to a teacher that "
        "has these tokens",
    ),
}


def name_masked(role: str, tokens: Tokens, overlap: Overlap) -> str:
    """Return the masked ids with the most probability, each with the mean over tokens of this process; nothing without any."""
    if f"{role}_masked" not in tokens.columns:
        return ""
    mass_N, id_N = tokens.columns[f"{role}_masked"].double().cpu(), tokens.columns[f"{role}_masked_id"].cpu()
    ids, place_N = id_N.unique(return_inverse=True)
    mean_M = torch.zeros(len(ids), dtype=torch.double).index_add_(0, place_N, mass_N) / max(1, len(mass_N))
    best = sorted(zip(mean_M.tolist(), ids.tolist(), strict=True), reverse=True)[:NAMED]
    return ", ".join(f"{overlap.name(token)} {mean:.2%}" for mean, token in best if token >= 0 and mean >= SHOWN)
