"""A step's metrics and its stored rollouts, computed from the token table.

Metrics are means over tokens or rollouts of all processes, kept as sums and counts until the step ends.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd import __version__
from opd.config.options import TeacherWeights
from opd.data.rollouts import FinishReason, Rollout, micro_batches, repetition
from opd.models.device import peak_memory
from opd.models.distributed import global_quantile, global_sum
from opd.models.load import decode
from opd.models.policy import padding_limit
from opd.objective.overlap import OVERLAP
from opd.runs.text import one_line
from opd.training.masked import add_masked_metrics
from opd.training.spans import add_span_metrics, sums_at_ends
from opd.training.step import Step
from opd.training.tokens import Means, Tokens

BUCKETS = 16  # positions of a completion are reported in at most so many buckets of equal width
BY_POSITION = ("reverse_kl", "entropy", *OVERLAP)
PREFIX = "by_position/"
ALTERNATIVES = 5  # most probable tokens of the teacher that are stored at each token, in detailed steps

ByPosition = dict[str, int | list[float | None]]
Alternatives = Mapping[int, tuple[Tensor, Tensor]]


def engine_gap(tokens: Tokens) -> Tensor:
    """Return |behaviour_logp - logp| of each sampled token (N',), as sampled; with top-p or top-k the truncation is part of it."""
    return (tokens.own("behaviour_logp") - tokens.own("logp")).abs()


def add_rollout_metrics(tokens: Tokens, max_new_tokens: int) -> None:
    """Add the metrics of the rollouts and of the student before the update to the table's means."""
    means, rollouts = tokens.means, [rollout for rollout in tokens.rollouts if not rollout.given]
    for name in ("reverse_kl", "entropy", "advantage", "cut", "reference_kl", *OVERLAP):
        if name in tokens.columns:
            means.add_tensors(name, [scored_only(tokens, name)])
    add_masked_metrics(tokens)
    means.add_tensors("teacher_nll", [-scored_only(tokens, "teacher_logp")])
    if "span" in tokens.columns:
        add_span_metrics(means, rollouts)
    if "contrast_logp" in tokens.columns:
        means.add_tensors("contrast_nll", [-tokens.own("contrast_logp")])
    means.add_tensors("engine_gap", [engine_gap(tokens)])
    means.add("length", float(sum(len(rollout.completion) for rollout in rollouts)), len(rollouts))
    means.add("truncated", float(sum(rollout.truncated for rollout in rollouts)), len(rollouts))
    means.add("repetition", sum(repetition(rollout.completion) for rollout in rollouts), len(rollouts))
    known = {name: tokens.own(name) for name in BY_POSITION if name in tokens.columns}
    add_by_position(means, known, rollouts, max_new_tokens)
    means.add_tensors("given/nll", [] if tokens.given_N is None else [-tokens.columns["logp"][tokens.given_N]])


def scored_only(tokens: Tokens, name: str) -> Tensor:
    """Return a column as `Tokens.own` does, with `teacher.alignment=spans` without the tokens that the teacher does not score."""
    values = tokens.own(name)
    return values[tokens.own("span") >= 0] if "span" in tokens.columns and name != "entropy" else values


def add_by_dataset(tokens: Tokens, datasets: Sequence[str]) -> None:
    """Add the metrics of each dataset, of which this process may have no rollout, to the table's means."""
    kl_N = tokens.as_sampled("reverse_kl").double()
    rollout_N = tokens.rollout_N[tokens.sampling_order_N]
    is_scored_N = tokens.as_sampled("span") >= 0 if "span" in tokens.columns else torch.ones_like(kl_N, dtype=torch.bool)
    for label in datasets:
        own = [rollout for rollout in tokens.rollouts if rollout.request.prompt.dataset == label]
        sampled = [rollout for rollout in own if not rollout.given]
        is_sampled = [rollout.request.prompt.dataset == label and not rollout.given for rollout in tokens.rollouts]
        own_kl = kl_N[torch.tensor(is_sampled, device=kl_N.device)[rollout_N] & is_scored_N]
        tokens.means.add(f"data/{label}/reverse_kl", float(own_kl.sum()), len(own_kl))
        tokens.means.add(f"data/{label}/length", float(sum(len(rollout.completion) for rollout in sampled)), len(sampled))
        tokens.means.add(f"data/{label}/truncated", float(sum(rollout.truncated for rollout in sampled)), len(sampled))
        tokens.means.add(f"data/{label}/tokens", float(sum(len(rollout.trained) for rollout in own)), 1.0)


def step_metrics(
    tokens: Tokens, accelerator: Accelerator, max_new_tokens: int, datasets: Sequence[str] = ()
) -> tuple[dict[str, float], ByPosition]:
    """Return a finished step's metrics over all processes, and those by token position. Collective.

    Given completions have metrics of their own, `given/…`, and count in `loss`, `tokens` and what the update measures. A step without
    sampled completions has no metrics of them.

    Args:
        datasets: The labels of `data.mix`.
    """
    add_rollout_metrics(tokens, max_new_tokens)
    add_by_dataset(tokens, datasets)
    means = tokens.means.over_processes(accelerator)
    positions = take_by_position(means, max_new_tokens)
    trained = global_sum(accelerator, len(tokens.rollout_N))
    seconds = sum(tokens.seconds.values())
    metrics = means.means()
    metrics |= {f"data/{label}/tokens": means.sums[f"data/{label}/tokens"] for label in datasets}
    metrics |= {f"time/{name}": value for name, value in {**tokens.seconds, "step": seconds}.items()}
    for reason in FinishReason:
        ended = sum(rollout.finish_reason is reason for rollout in tokens.rollouts if not rollout.given)
        metrics[f"finish/{reason.value}"] = global_sum(accelerator, ended)
    if given := global_sum(accelerator, sum(rollout.given for rollout in tokens.rollouts)):
        metrics["given/rollouts"] = given
    if "reverse_kl" in metrics:  # some are sampled
        metrics["reverse_kl_p99"] = global_quantile(accelerator, scored_only(tokens, "reverse_kl"), 0.99)
        metrics["engine_gap_p99"] = global_quantile(accelerator, engine_gap(tokens), 0.99)
    metrics |= {"tokens": trained, "tokens_per_second": trained / seconds}
    return metrics, positions


# By token position.


def bucket_width(max_new_tokens: int) -> int:
    return math.ceil(max_new_tokens / BUCKETS)


def bucket_count(max_new_tokens: int) -> int:
    return math.ceil(max_new_tokens / bucket_width(max_new_tokens))


def add_by_position(means: Means, values: Mapping[str, Tensor], rollouts: Sequence[Rollout], max_new_tokens: int) -> None:
    """Add sums and counts of each bucket under a name of its own.

    Args:
        values: (N,) of the trained tokens, rollout by rollout.
    """
    width, count = bucket_width(max_new_tokens), bucket_count(max_new_tokens)
    offsets = [offset for rollout in rollouts for offset in rollout.trained]
    bucket_N = torch.tensor(offsets, dtype=torch.long) // width
    tokens = torch.bincount(bucket_N, minlength=count).tolist()
    for name in values:
        sums = torch.bincount(bucket_N, values[name].double().cpu(), minlength=count).tolist()
        for bucket in range(count):
            means.add(f"{PREFIX}{name}/{bucket:02}", sums[bucket], tokens[bucket])
    lengths = torch.tensor([len(rollout.completion) for rollout in rollouts], dtype=torch.long)
    ends = torch.bincount((lengths.clamp_min(1) - 1) // width, minlength=count).tolist()
    for bucket in range(count):
        means.add(f"{PREFIX}ends/{bucket:02}", ends[bucket], 1.0)


def take_by_position(means: Means, max_new_tokens: int) -> ByPosition:
    """Move the metrics by position out of `means`.

    Returns:
        `width`, tokens per bucket; for each bucket the mean `reverse_kl` and `entropy` in nats, and the overlap where it was measured (None
        without tokens or where it is not finite), its `tokens`, and as `ends` how many completions have their last token there.
    """
    names = [name for name in means.sums if name.startswith(PREFIX)]
    sums, counts = ({name: kind.pop(name) for name in names} for kind in (means.sums, means.counts))
    buckets = range(bucket_count(max_new_tokens))
    by_position: ByPosition = {"width": bucket_width(max_new_tokens)}
    known = [name for name in BY_POSITION if f"{PREFIX}{name}/00" in sums]
    for name in known:
        keys = [f"{PREFIX}{name}/{bucket:02}" for bucket in buckets]
        by_position[name] = [sums[key] / counts[key] if counts[key] and math.isfinite(sums[key]) else None for key in keys]
    by_position["tokens"] = [counts[f"{PREFIX}{known[0]}/{bucket:02}"] for bucket in buckets]
    by_position["ends"] = [sums[f"{PREFIX}ends/{bucket:02}"] for bucket in buckets]
    return by_position


# Stored rollouts.


def has_teacher_states(scoring: Step, is_updated: bool = False) -> bool:
    """Return whether all teachers' whole distributions can be computed: not by a server, nor by the student itself once it `is_updated`."""
    # The student's own output head is another one after an update, and with sharding it is there only while the student computes.
    lacks_head = is_updated or scoring.strategy.is_sharded
    parts = scoring.config.parts_by_teacher.values()
    is_lost = lacks_head and any(part.teacher_weights is TeacherWeights.current for part in parts)
    return not (scoring.config.is_served or scoring.spans is not None or is_lost)


def teacher_alternatives(scoring: Step, rollouts: Sequence[Rollout]) -> Alternatives:
    """Return the teacher's most probable ids and log-probs (tokens, k) at each token of each rollout, after the update. Collective.

    Nothing without `has_teacher_states`.
    """
    if not has_teacher_states(scoring, is_updated=True):
        return {}
    alternatives: dict[int, tuple[Tensor, Tensor]] = {}
    with scoring.teacher.ready():
        max_tokens, max_padding = scoring.choices["max_tokens"], padding_limit(scoring.device)
        for batch in micro_batches(rollouts, max_tokens, scoring.pad_id, scoring.packed, max_padding):
            states = scoring.teacher.states(batch.teacher_inputs)
            ids, logp = (values.cpu() for values in states.top(ALTERNATIVES, scoring.config.temperature))
            lengths = [len(rollouts[index].trained) for index in batch.rollouts]
            alternatives.update(zip(batch.rollouts, zip(ids.split(lengths), logp.split(lengths), strict=True), strict=True))
    return alternatives


def rollout_records(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, count: int, weights: Sequence[float], alternatives: Alternatives
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts as they are stored: texts, ids, and values per completion token, null for untrained tokens.

    Args:
        weights: Loss weight of each rollout's tokens: those of weight 0 were scored and not trained.
        alternatives: The teacher's most probable ids and their log-probs (tokens, k), by rollout, where they were asked for.
    """
    return [record(tokenizer, tokens, index, weights[index], alternatives.get(index)) for index in range(min(count, len(tokens.rollouts)))]


def record(
    tokenizer: PreTrainedTokenizerBase, tokens: Tokens, index: int, weight: float, alternatives: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    rollout = tokens.rollouts[index]
    columns = tokens.of_rollout(index)

    def spread(values: Sequence[Any] | None) -> list[Any] | None:
        """One entry per completion token."""
        if values is None:
            return None
        spread_out: list[Any] = [None] * len(rollout.completion)
        for offset, value in zip(rollout.trained, values, strict=True):
            spread_out[offset] = value
        return spread_out

    teacher_logp = rounded(columns["teacher_logp"].tolist())
    spans: dict[str, Any] = {}
    if "span" in columns:
        following = columns["span"].tolist()
        spans["span"] = spread(following)
        # At the last token of a span, and such that the difference to the student's is the span's advantage.
        sums = sums_at_ends((columns["logp"] - columns["reverse_kl"]).tolist(), following)
        teacher_logp = rounded([sums.get(index, math.nan) for index in range(len(following))])
    flags = {name: columns[name].bool().tolist() if name in columns else None for name in ("clipped", "cut")}
    choices = None
    if alternatives is not None:
        ids, logps = alternatives[0].tolist(), [rounded(row) for row in alternatives[1].tolist()]
        texts = {token: decode(tokenizer, [token]) for row in ids for token in row}
        choices = [
            [{"id": token, "text": texts[token], "logp": logp} for token, logp in zip(row, values, strict=True)]
            for row, values in zip(ids, logps, strict=True)
        ]
    dataset = rollout.request.prompt.dataset
    return {
        **({"dataset": dataset} if dataset else {}),
        "sample_id": rollout.request.prompt.sample_id,
        "epoch": rollout.request.epoch,
        "attempt": rollout.request.attempt,
        "prompt": decode(tokenizer, rollout.request.prompt.ids),
        "completion": decode(tokenizer, rollout.completion),
        "tokens": [decode(tokenizer, [token]) for token in rollout.completion],
        "ids": list(rollout.completion),
        "finish_reason": rollout.finish_reason.value,
        "given": rollout.given,
        "learnt": len(rollout.trained) if weight > 0 else 0,
        "behaviour_logp": rounded(rollout.behaviour_logp.tolist()),
        "student_logp": spread(rounded(columns["logp"].tolist())),
        "teacher_logp": spread(teacher_logp),
        **({"contrast_logp": spread(rounded(columns["contrast_logp"].tolist()))} if "contrast_logp" in columns else {}),
        "entropy": spread(rounded(columns["entropy"].tolist())),
        "clipped": spread(flags["clipped"]),
        "cut": spread(flags["cut"]),
        **spans,
        "alternatives": spread(choices),
    }


def rounded(values: Sequence[float]) -> list[float | None]:
    """Return the values as they are stored: None for one that is not finite, as JSON has none."""
    return [round(value, 5) if math.isfinite(value) else None for value in values]


def sample_text(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """Return a prompt and its completion on one line, for the display."""
    return one_line(f"{rollout.request.prompt.text} → {decode(tokenizer, rollout.answer, skip_special_tokens=True)}")


def max_peak_memory(accelerator: Accelerator) -> float:
    """Return the peak of memory, in bytes, of the process that needed most. Collective."""
    return float(accelerator.gather(torch.tensor([peak_memory(accelerator.device)], device=accelerator.device)).max())


def run_costs(accelerator: Accelerator, steps: int, grown: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Return the part of summary.json that is not in the logs. All ranks must call it: it gathers their peaks of memory."""
    device, peak = accelerator.device, max_peak_memory(accelerator)
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "steps": steps,
        "peak_memory_bytes": int(peak),
        "peak_memory_grown_bytes": dict(grown),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads",
        "versions": {"opd": __version__, **packages, "python": platform.python_version()},
    }
