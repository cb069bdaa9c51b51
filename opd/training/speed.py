"""How much of the device a step uses: `perf/mfu` and `perf/decode_bandwidth`, against rates that are measured at start."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd.config.schema import Config
from opd.models.measured import cache_bytes, measure
from opd.samplers.generate import decoding_batches
from opd.training.tokens import Tokens

COPIED = {"cuda": 2**28}  # bytes
PRODUCT = {"cuda": 4096}  # rows and columns
SMALL_COPIED, SMALL_PRODUCT = 2**25, 512  # on other devices
RUNS = 4
CALLS = {"cuda": 16}  # in a run: launching one and waiting for it would add a tenth to its time


@dataclass(frozen=True, slots=True)
class Speed:
    """What this process's device can do, and what a token costs.

    Args:
        copy_rate: Bytes moved per second by a copy, where each is moved twice: from and to memory.
        product_rate: Floating-point operations per second of a matrix product in the dtype of the update.
        student, teacher: Parameters in matrix products.
        passes: Forward passes that one token's update costs: 3, or 2 where most weights are frozen.
        weight_bytes: What the sampler reads for each token of a batch; 0 where another engine samples.
        cache_bytes: Keys and values of one token.
        batch_size: Completions decoded side by side.
        teachers: Parameters of the teachers that have a label.
    """

    copy_rate: float
    product_rate: float
    student: int
    teacher: int
    passes: int
    weight_bytes: int
    cache_bytes: int
    batch_size: int
    teachers: Mapping[str, int] = field(default_factory=dict)

    def metrics(self, tokens: Tokens) -> dict[str, float]:
        """Return this process's shares of the two rates in a finished step.

        MFU counts two operations for each parameter and token of a forward pass, as Kaplan et al. (arXiv 2001.08361) do, without attention
        and without what is recomputed. A decoding batch reads all weights for each new token, and the keys and values of all earlier ones.
        """
        rollouts = [rollout for rollout in tokens.rollouts if not rollout.given]
        count, sampled = (sum(rollout.length for rollout in group) for group in (tokens.rollouts, rollouts if self.weight_bytes else []))
        scored = sum(rollout.length * self.teachers.get(rollout.request.prompt.teacher, self.teacher) for rollout in tokens.rollouts)
        operations = 2 * (scored + sampled * self.student + count * tokens.inner * self.passes * self.student)
        shares = {"perf/mfu": operations / sum(tokens.seconds.values()) / self.product_rate}
        if self.weight_bytes:
            read = 0
            for batch in decoding_batches([rollout.request for rollout in rollouts], self.batch_size):
                lengths = [(len(rollouts[index].request.prompt.ids), len(rollouts[index].completion)) for index in batch]
                cached = sum((new - 1) * prompt + new * (new - 1) // 2 for prompt, new in lengths)
                read += max(new for _, new in lengths) * self.weight_bytes + cached * self.cache_bytes
            shares["perf/decode_bandwidth"] = read / tokens.seconds["sample"] / self.copy_rate
        return shares


def measure_speed(
    config: Config, student: PreTrainedModel, teacher: PreTrainedModel | None, bf16: bool, decodes_in: torch.dtype | None
) -> Speed:
    """Return the rates of the student's device and the costs of both models.

    Args:
        teacher: The one without a label; None where a server has it, or there is none.
        bf16: Whether the update computes in bf16.
        decodes_in: Dtype of the weights that sample; None where another engine samples.
    """
    device = student.device
    source = torch.empty(COPIED.get(device.type, SMALL_COPIED), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = PRODUCT.get(device.type, SMALL_PRODUCT)
    # As irregular as weights: a GPU multiplies equal numbers faster. No random ones, which would change those of the run.
    factor = torch.arange(size * size, device=device).sin().view(size, size).to(torch.bfloat16 if bf16 else torch.float32)
    width = 0 if decodes_in is None else decodes_in.itemsize
    return Speed(
        copy_rate=2 * source.numel() / fastest(lambda: target.copy_(source), device),
        product_rate=2 * size**3 / fastest(lambda: factor @ factor, device),
        student=product_parameters(student),
        teacher=0 if teacher is None else product_parameters(teacher),
        passes=2 if config.lora.rank else 3,
        weight_bytes=width * product_parameters(student),
        cache_bytes=round(measure("the cache", cache_of, student, width)[0]),
        batch_size=config.sampling.batch_size,
    )


def cache_of(model: PreTrainedModel, width: int) -> tuple[float, float]:
    """Return `cache_bytes` of a copy without storage."""
    with torch.device("meta"):
        return cache_bytes(AutoModelForCausalLM.from_config(copy.deepcopy(model.config)), width)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the work in the fastest of a few runs."""
    times, calls = [], CALLS.get(device.type, 1)
    for _ in range(RUNS):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) / calls)
    return min(times)


def product_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters, without an embedding that is only looked up."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    count = int(model.num_parameters())  # of 4-bit weights as well
    return count if embedding.weight is head.weight else count - embedding.weight.numel()
