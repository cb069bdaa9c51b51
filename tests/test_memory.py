"""The estimate of a run's memory, before any weights are loaded."""

import pytest
import torch
from conftest import random_model

from opd.api import from_options
from opd.config.options import LoraConfig
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rollouts import Request
from opd.models import load as models
from opd.models import memory
from opd.models.load import load_model
from opd.models.measured import activations_of_layer, cache_bytes, saved_bytes
from opd.models.memory import Memory, empty_model, estimate, largest_micro_batch, samples_with_copy
from opd.samplers import Decoding, GenerateSampler, SamplerSpec, longest_sequence

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = {"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher"}
PROMPTS = [Prompt(index, (1,) * 5, "") for index in range(4)]


def tiny(**options: object) -> Config:
    return from_options({**TINY, "model.dtype": "float32", "teacher.dtype": "float32", **options})


def parameters(path: str) -> int:
    model = models.load_model(from_options({"model.path": path}).model, "model", CPU)
    return sum(parameter.numel() for parameter in model.parameters())


STUDENT, TEACHER = (parameters(TINY[key]) for key in TINY)


def test_unsharded_float32_needs_16_bytes_a_student_parameter_and_4_a_teacher_parameter() -> None:
    plain = estimate(tiny(), 2, CPU)
    assert plain.resident == {"the process": 0, "student": 4 * STUDENT, "teacher": 4 * TEACHER, "optimizer": 8 * STUDENT}
    assert plain.update == {"gradients": 4 * STUDENT} and plain.peak == 16 * STUDENT + 4 * TEACHER
    assert str(plain).startswith("memory of each process, largest during the update: 4.5 MiB (student 0.4 MiB, ")
    assert str(plain).endswith("; activations, samples and the process itself are not included")


def test_bf16_teacher_needs_half() -> None:
    assert estimate(tiny(**{"teacher.dtype": "bfloat16"}), 1, CPU).resident["teacher"] == 2 * TEACHER


def test_fsdp2_shards_weights_and_optimizer_and_gathers_all_weights_to_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = random_model(num_hidden_layers=20)
    monkeypatch.setattr(memory, "load_config", lambda *_: deep.config)
    size = sum(parameter.numel() for parameter in deep.parameters())
    sharded = estimate(tiny(), 4, CPU, sharded=True)
    assert (sharded.resident["student"], sharded.resident["optimizer"]) == (size, 2 * size)
    assert sharded.sampling == {"gathered weights": 4 * size}
    assert "largest while sampling" in str(sharded)
    layer = sum(parameter.numel() for parameter in deep.model.layers[0].parameters())
    assert sharded.update["gathered weights"] == 4 * (size - 20 * layer + 2 * layer), "all but the layers, and two of them"


def test_lora_needs_an_optimizer_for_the_adapters_alone() -> None:
    adapters = estimate(tiny(**{"lora.rank": 2}), 1, CPU)
    assert adapters.resident["student"] > 4 * STUDENT
    assert adapters.resident["optimizer"] == 2 * adapters.update["gradients"] < 4 * STUDENT


def test_offloaded_teacher_has_two_layers_on_the_gpu() -> None:
    layers = models.load_model(tiny().teacher, "teacher", CPU).model.layers
    layer, inside = (sum(parameter.numel() for parameter in part.parameters()) for part in (layers[0], layers))
    options = {"teacher.placement": "offload", "teacher.dtype": "float32"}
    assert estimate(tiny(**options), 1, GPU).resident["teacher"] == 4 * (TEACHER - inside + 2 * layer)


@pytest.mark.parametrize(
    ("options", "fast", "expected"),
    [
        ({"sampling.dtype": "bfloat16"}, False, True),
        ({"sampling.dtype": "trainer"}, True, False),
        ({"sampling.dtype": "auto"}, True, True),
        ({"sampling.dtype": "auto"}, False, False),
        ({"sampling.dtype": "auto", "model.dtype": "bfloat16"}, True, True),  # in the layout of the matrix kernels
        ({"sampling.engine": "vllm"}, False, True),
        ({"sampling.engine": "vllm", "sampling.vllm.url": "http://127.0.0.1:8000"}, True, False),
    ],
)
def test_bf16_copy_for_sampling(options: dict[str, object], fast: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.models.load.is_fast_in_bf16", lambda device: fast)
    config = tiny(**options)
    assert samples_with_copy(config, CPU) == expected
    assert estimate(config, 1, CPU, prompts=(PROMPTS, PROMPTS)).sampling["bf16 copy"] == 2 * STUDENT * expected


def test_decode_line_of_a_gpu_has_the_bytes_that_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the line computes as it does on a GPU, with buffers of the same sizes."""
    config = tiny(**{"sampling.dtype": "trainer", "sampling.batch_size": 6, "sampling.max_new_tokens": 40})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    estimated = estimate(config, 1, torch.device("cuda"), prompts=(PROMPTS, PROMPTS)).resident["decode line"]

    model = load_model(config.model, "model", CPU).eval()
    longest = longest_sequence(config, PROMPTS)
    spec = SamplerSpec(model=model, eos=(0,), pad_id=0, vocabulary=model.config.vocab_size, seed=0, bf16=False, longest=longest)
    sampler = GenerateSampler(spec)
    sampler.captures = True
    sampler.sample([Request(prompt) for prompt in PROMPTS], Decoding(1.0, 40, batch_size=6), "train")
    assert sampler.lines is not None
    buffers = sampler.lines.buffers
    assert estimated == sum(tensor.nbytes for tensor in (*buffers.keys, *buffers.values, buffers.logits))


def test_largest_micro_batch_is_the_runs() -> None:
    config = Config()
    config.train.batch_size, config.sampling.n, config.sampling.max_new_tokens = 2, 3, 10
    assert largest_micro_batch(config, PROMPTS, CPU) == (6, 15)
    config.train.max_tokens_per_micro_batch = 45
    assert largest_micro_batch(config, PROMPTS, CPU) == (3, 15)


def test_kv_cache_counts_no_more_prompts_than_there_are() -> None:
    config = tiny(**{"teacher.path": "bundled:tiny-student", "eval.batch_size": 64, "sampling.dtype": "trainer"})
    per_token, constant = cache_bytes(empty_model(config.model, "model"), 4)
    assert constant == 0
    few, many = (estimate(config, 1, CPU, prompts=(PROMPTS, PROMPTS[:1] * count)).sampling["KV cache"] for count in (4, 640))
    step = min(config.sampling.batch_size, config.train.batch_size * config.sampling.n) * (5 + config.sampling.max_new_tokens) * per_token
    assert few == step and many == 64 * (5 + config.eval.max_new_tokens) * per_token


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_linear_in_layers_and_tokens(bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = random_model(num_hidden_layers=4, hidden=32).to(dtype)
    per_token, constant = activations_of_layer(model.config, 64, bf16, LoraConfig())
    two = random_model(num_hidden_layers=2, hidden=32).to(dtype)
    for tokens in (40, 120):
        measured = saved_bytes(model, tokens) - saved_bytes(two, tokens)
        assert 2 * (tokens * per_token + constant) == pytest.approx(measured, rel=0.02)


def test_activation_checkpointing_and_smaller_micro_batches_need_less() -> None:
    kept = {"train.activation_checkpointing": False}
    activations = [
        estimate(tiny(**options), 1, CPU, prompts=(PROMPTS, PROMPTS)).update["activations"]
        for options in (kept, {**kept, "train.max_tokens_per_micro_batch": 300}, {"train.activation_checkpointing": True}, {})
    ]
    assert activations[0] > 2 * activations[1] and activations[0] > activations[2] > 0
    assert activations[3] == activations[2], "the default on a CPU"


def test_peak_is_that_of_the_larger_phase() -> None:
    needed = Memory({"student": 1, "optimizer": 2}, {"KV cache": 1}, {"activations": 3})
    assert needed.peak == 6 and needed.parts == {"student": 1, "optimizer": 2, "activations": 3}


def test_bf16_student_has_float32_masters_beside_it() -> None:
    assert estimate(tiny(**{"model.dtype": "bfloat16"}), 1, CPU).resident["student"] == (2 + 4) * STUDENT


def test_8_bit_states_are_expanded_on_a_cpu_and_not_on_a_gpu() -> None:
    options = {"optim.name": "adamw8bit"}
    assert estimate(tiny(**options), 1, CPU).update["8-bit step"] >= 6 * 4 * 64 * 64
    assert "8-bit step" not in estimate(tiny(**options), 1, GPU).update
    assert "8-bit step" not in estimate(tiny(), 1, CPU).update


def test_a_layer_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object) -> tuple[float, float]:
        calls.append(args)
        return 1000.0, 0.0

    monkeypatch.setattr(memory, "activations_of_layer", counted)
    first, again, other = (
        estimate(tiny(**{"train.max_tokens_per_micro_batch": tokens, "lora.rank": rank}), 1, CPU, prompts=(PROMPTS, PROMPTS))
        for tokens, rank in ((8192, 0), (300, 0), (8192, 2))
    )
    assert len(calls) == 2, "once for each kind of layer"
    assert first.update["activations"] > again.update["activations"] and other.update["activations"] > 0
