"""A teacher with another tokenizer (`teacher.alignment=spans`): its scores of the student's spans, and how well the two fit.

`opd.data.spans` says what a span is. The teacher's log-prob of a span, and the student's, are of its text (`opd.objective.lookahead`).

Shapes: `N` rows of a micro-batch, `M` tokens of the teacher.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd.config.schema import Config
from opd.data.chat_template import ChatTemplate, teacher_template
from opd.data.prompts import Prompt
from opd.data.rollouts import MicroBatch, Rollout
from opd.data.spans import Aligner, Unscored
from opd.data.token_bytes import TokenBytes, check_student, check_teacher, longer_tokens
from opd.errors import DataError
from opd.models.distributed import global_sum
from opd.objective import Longer, chunked_stats, sum_over_spans, token_logp
from opd.objective.head import TokenStats
from opd.objective.lookahead import less_previous
from opd.teachers import Teacher
from opd.training.tokens import Means, Tokens

PREFIX = "spans/"  # of the metrics
MAX_UNSCORED, MAX_NOT_CANONICAL = 0.5, 0.2  # shares of a step's tokens
PROBED_PROMPTS = 1000  # whose texts the teacher's tokenizer is tried on


@dataclass(frozen=True, slots=True)
class Spans:
    """Aligns rollouts and has them scored.

    Args:
        aligner: Of the two tokenizers.
        longer, teacher_longer: The student's and the teacher's longer tokens that the other one would not write. None for a served teacher,
            of which the log-probs of other tokens are not known: then neither side is corrected.
    """

    aligner: Aligner
    longer: Longer | None = None
    teacher_longer: Longer | None = None

    def align(self, rollout: Rollout) -> Rollout:
        """Return the rollout with its alignment."""
        alignment = self.aligner.align(rollout.completion, rollout.truncated, len(rollout.request.prompt.seen_by_teacher))
        return replace(rollout, alignment=alignment if rollout.mask is None else alignment.masked(rollout.mask))

    def columns(self, teacher: Teacher, batch: MicroBatch, temperature: float) -> TokenStats:
        """Return the teacher's log-prob of each span, in nats, at the span's last token, 0 elsewhere; (N,)."""
        spans = batch.spans
        assert spans is not None
        sum_N = torch.zeros(len(batch.ids_N), dtype=torch.float64, device=batch.ids_N.device)
        if len(spans.ids_M) == 0:
            return {"teacher_logp": sum_N.float()}
        if self.teacher_longer is None:
            logp_M = teacher.logp(batch.teacher_inputs, spans.ids_M, temperature)
            return {"teacher_logp": sum_N.index_add_(0, spans.row_M, logp_M.double()).float()}
        states, longer = teacher.states(batch.teacher_inputs), self.teacher_longer

        def score(logits_CV: Tensor, part: slice) -> TokenStats:
            id_C = spans.ids_M[part]
            lookahead_C = longer.lookahead(logits_CV, id_C, temperature)
            return {"logp": token_logp(logits_CV, id_C, temperature)[0], "lookahead": lookahead_C}

        stats = chunked_stats(states.hidden_NH, states.head, score)
        sum_N.index_add_(0, spans.row_M, stats["logp"].double())
        is_last_M = torch.ones_like(spans.row_M, dtype=torch.bool)
        is_last_M[:-1] = spans.row_M[1:] != spans.row_M[:-1]
        lookahead_N = torch.zeros_like(sum_N).index_copy_(0, spans.row_M[is_last_M], stats["lookahead"][is_last_M].double())
        return {"teacher_logp": (sum_N + less_previous(lookahead_N, spans.previous_N)).float()}


def mean_advantage(tokens: Tokens, clip: float | None, accelerator: Accelerator) -> float:
    """Return the mean advantage of the sampled tokens that the teacher scores, of all processes, in nats; 0 if it scores none. Collective.

    It is the advantage of those that it does not score. Advantages are negative on average, so that with 0 the student would learn to
    write what is not scored; between equally good distributions the mean is 0, and so is the difference. The log-probs of the sampler stand
    in for the student's: a constant needs no more.
    """
    span_N = tokens.own("span")
    advantage_N, _ = sum_over_spans(tokens.own("teacher_logp") - tokens.own("behaviour_logp"), span_N)
    advantage_N = advantage_N if clip is None else advantage_N.clamp(-clip, clip)
    count = global_sum(accelerator, int((span_N >= 0).sum()))
    total = global_sum(accelerator, float(advantage_N.double().sum()))  # 0 where it is not scored
    return total / count if count else 0.0


def scored_logps(columns: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
    """Return the teacher's and the student's log-probs of a rollout's trained tokens; with `teacher.alignment=spans` of its spans."""
    teacher, student = columns["teacher_logp"].tolist(), columns["logp"].tolist()
    if "span" not in columns:
        return teacher, student
    following = columns["span"].tolist()
    return [logp for logp, count in zip(teacher, following, strict=True) if count == 0], list(sums_at_ends(student, following).values())


def sums_at_ends(values: Sequence[float], following: Sequence[int]) -> dict[int, float]:
    """Return the sum of the values of each scored span, by the place of its last token. `following`: the column `span`."""
    sums, start = {}, 0
    for index, count in enumerate(following):
        if count == 0:
            sums[index] = sum(values[start : index + 1])
        start = index + 1 if count <= 0 else start
    return sums


def make_spans(
    config: Config,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    eos: tuple[Sequence[int], Sequence[int]],
    prompts: Sequence[Prompt],
    limit: int | None,
    sizes: tuple[int, int],
    device: torch.device,
) -> Spans:
    """Return what aligns the student's completions with the teacher's tokens.

    Args:
        eos: The ids that end a completion of the student, and one of the teacher.
        prompts: Their texts probe the teacher's tokenizer.
        limit: Tokens that the teacher can read; None for any number.
        sizes: How many ids the student's and the teacher's output heads have.

    Raises:
        ConfigError: One of the tokenizers does not say which bytes its tokens cover, or the teacher's changes texts.
        DataError: A prompt has no messages to render for the teacher.
    """
    ours, theirs = TokenBytes(student, "model"), TokenBytes(teacher, "teacher")
    check_student(ours)
    check_teacher(theirs, [text for prompt in prompts[:PROBED_PROMPTS] for text in (prompt.text, *prompt.answers) if text])
    for prompt in prompts:
        if prompt.teacher_ids is None:
            raise DataError(
                f"row {prompt.sample_id}: teacher.alignment=spans: a prompt given as ids has no messages to render for the teacher; give "
                "its text or messages"
            )
    end = ChatTemplate(student, config.data.chat_template_kwargs).turn_end()
    teacher_end = teacher_template(config.data, config.teacher, student, teacher).turn_end()
    end = end if end in eos[0] else student.eos_token_id
    # The teacher need not stop there itself: its template says how an answer ends.
    is_control = teacher_end is not None and (teacher_end in eos[1] or theirs.piece(teacher_end) is None)
    teacher_end = teacher_end if is_control else teacher.eos_token_id
    assert end is not None and teacher_end is not None  # `load_tokenizer` sees to it
    aligner = Aligner(ours, theirs, end, teacher_end, frozenset(eos[0]), limit)
    if config.teacher.url is not None or not theirs.is_exact:
        return Spans(aligner)
    pairs = ((ours, theirs, sizes[0]), (theirs, ours, sizes[1]))
    return Spans(aligner, *(Longer.of(longer_tokens(own, other), size, device) for own, other, size in pairs))


def describe(spans: Spans) -> str:
    """Return what a person should know of a teacher with another tokenizer."""
    aligner = spans.aligner
    end, teacher_end = aligner.student.name(aligner.end), aligner.teacher.name(aligner.teacher_end)
    others = ", ".join(repr(aligner.student.name(token)) for token in sorted(aligner.eos - {aligner.end}))
    also = f"; {others} also ends the student and is never trained on" if others else ""
    return (
        f"teacher.alignment=spans: the teacher reads its own prompts and tokens; end of turn {end!r} for the student, {teacher_end!r} for "
        f"the teacher{also}; no KL over the vocabulary in evaluations, reverse_kl of each step estimates it"
    )


# Metrics.


def add_span_metrics(means: Means, rollouts: Sequence[Rollout]) -> None:
    """Add how well the tokens of a teacher with another tokenizer fit the student's."""
    counts: Counter[str] = Counter()
    aligned = [(rollout, rollout.alignment) for rollout in rollouts if rollout.alignment is not None]
    for rollout, alignment in aligned:
        trained = set(rollout.trained)
        for span in alignment.spans:
            size = len(trained.intersection(range(span.start, span.stop)))
            counts[span.unscored.value if span.unscored else "scored"] += size
            counts["spans"] += span.unscored is None
            counts["one_to_one"] += span.unscored is None and span.is_one_to_one
        counts["completions"] += any(span.unscored is Unscored.not_canonical for span in alignment.spans)
    total = counts["scored"] + sum(counts[reason.value] for reason in Unscored)
    for reason in Unscored:
        means.add(f"{PREFIX}{reason.value}", counts[reason.value], total)
    means.add(f"{PREFIX}one_to_one", counts["one_to_one"], counts["scored"])
    means.add(f"{PREFIX}tokens", counts["scored"], counts["spans"])
    means.add(f"{PREFIX}not_canonical_completions", counts["completions"], len(aligned))


def span_problems(metrics: Mapping[str, float]) -> list[str]:
    """Return what is wrong with the alignments of a step, one line each, from its metrics."""
    unscored = {reason.value: metrics.get(PREFIX + reason.value, 0.0) for reason in Unscored}
    odd = unscored[Unscored.not_canonical.value]
    problems = []
    if sum(unscored.values()) > MAX_UNSCORED:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in unscored.items() if share)
        problems.append(f"the teacher scores only {1 - sum(unscored.values()):.0%} of the tokens ({shares})")
    if odd > MAX_NOT_CANONICAL:
        problems.append(f"{odd:.0%} of the tokens are no spelling that the student's own tokenizer makes")
    return problems
