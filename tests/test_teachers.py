"""One suite for all teachers: the log-probs of a plain forward pass, whatever the batch, and the objectives they serve."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from fake_vllm import ScoringServer, running
from hypothesis import HealthCheck, given, settings
from training_helpers import rollout_lists, rollout_of, trained_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.config.compose import PACKAGE
from opd.config.options import DataConfig, ModelConfig, Placement, Quantization, TeacherConfig
from opd.data import arithmetic
from opd.data.prompts import Encoder, encode_rows
from opd.data.rollouts import Rollout, collate
from opd.models.load import load_model
from opd.models.policy import prepare_teacher
from opd.objective import forward_kl, reverse_kl, topk
from opd.teachers import LocalTeacher, ServedTeacher, Teacher, place

CPU = torch.device("cpu")
FOLDER = PACKAGE / "assets/tiny-teacher"
VOCABULARY = 261
K = 4
# How far, on average and as a share of 1 nat and the log-prob, a teacher may be from the plain forward pass in float32.
KINDS = {"local": 1e-5, "offload": 1e-5, "bf16": 0.005, "int8": 0.005, "nf4": 0.02, "served": 1e-5, "vllm": 1e-5}
# Those that round are measured on texts of the task: at random ids the logits are so large that rounding is of any size.


def kind(name: str) -> Any:
    marks = []
    if name in ("int8", "nf4"):
        marks = [pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")]
    elif name == "vllm":
        marks = [
            pytest.mark.vllm,
            pytest.mark.slow,
            pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: scripts/environment_vllm"),
        ]
    return pytest.param(name, marks=marks)


def connect(url: str) -> ServedTeacher:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return ServedTeacher(TeacherConfig(path=str(FOLDER), url=url), tokenizer, VOCABULARY, 60, [256, 5, 9, 14, 3], K)


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[kind(name) for name in KINDS])
def teacher(request: pytest.FixtureRequest, plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Teacher, float]]:
    """Yield each kind of teacher with its bound."""
    name, bound = request.param, KINDS[request.param]
    if name == "served":
        with running(ScoringServer(plain, AutoTokenizer.from_pretrained(FOLDER))) as fake:
            yield connect(fake.url), bound
        return
    if name == "vllm":
        from test_vllm import serving

        with serving(FOLDER, tmp_path_factory.mktemp("vllm") / "log") as url:
            yield connect(url), bound
        return
    config: ModelConfig = TeacherConfig(path=str(FOLDER))
    if name in ("int8", "nf4"):
        config = replace(config, quantization=Quantization(name))
    model = prepare_teacher(load_model(config, "teacher", CPU), CPU)
    model = model if name in ("int8", "nf4") else model.to(torch.bfloat16 if name == "bf16" else torch.float32)
    if name == "offload":
        place(model, Placement.offload, CPU)
    yield LocalTeacher(model, VOCABULARY, device=CPU), bound


def expected(model: Any, rollouts: list[Rollout]) -> list[torch.Tensor]:
    """Return each rollout's log-probs of its trained tokens, from one forward pass of its sequence alone."""
    result = []
    for rollout in rollouts:
        prompt = rollout.request.prompt.seen_by_teacher
        with torch.no_grad():
            logp_TV = model(torch.tensor([prompt + rollout.completion])).logits[0, :, :VOCABULARY].log_softmax(-1)
        positions = torch.tensor(rollout.trained, dtype=torch.long) + len(prompt) - 1
        result.append(logp_TV[positions, torch.tensor(trained_ids(rollout), dtype=torch.long)])
    return result


@pytest.fixture
def exact_teacher(teacher):
    if teacher[1] > KINDS["local"]:
        pytest.skip("it rounds")
    return teacher


def distance(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    return float(((found_N - expected_N).abs() / (1 + expected_N.abs())).mean())


def check_log_probs(scorer: Teacher, bound: float, plain: Any, rollouts: list[Rollout]) -> None:
    reference = expected(plain, rollouts)
    chosen = [index for index, rollout in enumerate(rollouts) if rollout.trained]
    scorer.expect(rollouts)
    for indices in filter(None, (chosen, chosen[::-1], chosen[:1])):
        for packed in (False, True):
            batch = collate(rollouts, indices, pad_id=0, packed=packed)
            with scorer.ready():
                logp_N = scorer.logp(batch.teacher_inputs, batch.ids_N, 1.0)
            assert distance(logp_N, torch.cat([reference[index] for index in indices])) <= bound


def test_log_probs_are_those_of_a_plain_forward_pass_in_order_whatever_the_batch(teacher, plain):
    tokenizer, rollouts = AutoTokenizer.from_pretrained(FOLDER), []
    for row in arithmetic.rows("eval", 0)[:12]:
        prompt = encode_rows([row], Encoder(tokenizer, DataConfig(prompt="prompt", answer=None)), "test")[0].ids
        right = [*tokenizer(str(row["answer"]), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rollouts += [rollout_of(prompt, tuple(right)), rollout_of(prompt, (right[1], right[0], *right[2:]))]
    check_log_probs(*teacher, plain, rollouts)


@given(rollouts=rollout_lists())
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_and_so_they_are_at_any_ids(exact_teacher, plain, rollouts):
    check_log_probs(*exact_teacher, plain, rollouts)


def test_most_probable_ids_make_the_same_objective(teacher, plain):
    scorer, bound = teacher
    bound = 0.1 if bound > KINDS["local"] else bound
    batch = collate([rollout_of((3, 4), (5, 6, 1)), rollout_of((7,), (9, 8))], [0, 1], pad_id=0)
    states = LocalTeacher(plain, VOCABULARY).states(batch.teacher_inputs)
    with scorer.ready():
        top = scorer.top(batch.teacher_inputs)
    logits_NV = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for divergence in (reverse_kl, forward_kl):
        (ours_N, ours), (theirs_N, theirs) = (topk(batch.ids_N, one, 1.0, divergence, K)(logits_NV, slice(0, 5)) for one in (top, states))
        assert distance(ours_N, theirs_N) <= 2 * bound
        assert distance(ours["teacher_logp"], theirs["teacher_logp"]) <= bound
