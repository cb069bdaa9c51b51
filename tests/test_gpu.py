"""What a GPU does otherwise: graphs, streams, bf16. What a CPU can do of it is tried there as well."""

import json

import pytest
import torch
from conftest import random_model

from opd.api import from_options
from opd.config.schema import Placement
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, collate, micro_batches
from opd.models.policy import completion_hidden, output_head, prepare_teacher
from opd.objective import behaviour_logp
from opd.samplers import Decoding, GenerateSampler
from opd.teachers import LocalTeacher, place
from opd.train import main
from opd.training.overlap import Overlap

pytestmark = pytest.mark.gpu
V = 23
DECODING = Decoding(temperature=0.8, max_new_tokens=40, batch_size=24)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])


def model_on(device, **options):
    return random_model(V, **options).to(device).eval()


def requests(attempts=4):
    prompts = [(5, 7, 9), (4,), (11, 12, 13, 14, 15, 3), (8, 2), (20, 21, 22, 19), (6,)]
    return [Request(Prompt(i, ids, ""), attempt=attempt) for i, ids in enumerate(prompts) for attempt in range(attempts)]


def furthest(model, rollouts):
    """The largest |behaviour_logp − that of a plain forward pass|, in nats."""
    batch = collate(rollouts, range(len(rollouts)), pad_id=0).to(model.device)
    with torch.no_grad():
        logits = output_head(model).logits(completion_hidden(model.base_model, batch.inputs))
    logp_N = behaviour_logp(logits, DECODING.temperature, 0, 1.0).gather(-1, batch.target_N[:, None])[:, 0]
    return float((logp_N - batch.behaviour_logp_N).abs().max())


@devices
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_log_probs_are_those_of_a_plain_forward_pass(device, static, bf16):
    """With a static cache every batch is rebuilt several times on the way, and on a GPU each of them captured."""
    model = model_on(device)
    sampler = GenerateSampler(model, (1,), 0, V, seed=0, bf16=bf16, static=static)
    rollouts = sampler.sample(requests(), DECODING, "train")
    assert len({len(rollout.completion) for rollout in rollouts}) > 5
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        assert furthest(model, rollouts) < (0.1 if bf16 else 1e-4)


@devices
def test_a_static_cache_changes_no_sample_and_keeps_no_memory(device):
    model = model_on(device)
    growing, fixed = (GenerateSampler(model, (1,), 0, V, seed=0, bf16=False, static=static) for static in (False, True))
    assert [r.completion for r in growing.sample(requests(), DECODING, "train")] == [
        r.completion for r in fixed.sample(requests(), DECODING, "train")
    ]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        fixed.sample(requests(), DECODING, "train")
        assert torch.cuda.memory_allocated() == before


def scored():
    rollouts = [Rollout(Request(Prompt(i, (2, 3 + i), "")), (5, 6 + i, 1), torch.zeros(3), FinishReason.stop) for i in range(6)]
    return micro_batches(rollouts, 100, 0)[0]


@devices
def test_a_teacher_in_main_memory_says_the_same(device):
    here, away = prepare_teacher(random_model(V), torch.device(device)), prepare_teacher(random_model(V), torch.device("cpu"))
    place(away, Placement.offload, torch.device(device))
    batch = scored().to(torch.device(device))
    expected, found = LocalTeacher(here, V), LocalTeacher(away, V, device=torch.device(device))
    for _ in range(3):
        assert torch.equal(found.logp(batch, 0.7), expected.logp(batch, 0.7))


@devices
def test_a_teacher_in_main_memory_scores_while_the_student_samples(device):
    config = from_options({"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher", "sampling.temperature": 0.8})
    teacher = LocalTeacher(prepare_teacher(random_model(V, seed=2), torch.device("cpu")), V, device=torch.device(device))
    sampler = GenerateSampler(model_on(device), (1,), 0, V, seed=0, bf16=False, static=True)
    overlap = Overlap(sampler, teacher, config, lambda rollouts: micro_batches(rollouts, 200, 0), torch.device(device))
    rollouts = overlap.sample(requests(), Decoding(0.8, 20, batch_size=5), "train")
    found = overlap.said(rollouts)
    whole = collate(rollouts, range(len(rollouts)), pad_id=0).to(torch.device(device))
    assert torch.allclose(found, teacher.logp(whole, 0.8), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["sampling.dtype=auto", "model.dtype=bfloat16", "teacher.dtype=bfloat16"],
        ["train.activation_checkpointing=true"],
        ["teacher.placement=offload", "ppo.estimator=exact"],
        ["teacher.placement=device", "teacher.device=cpu", "sampling.batch_size=4"],
        ["train.max_tokens_per_micro_batch=64", "checkpoint.background=true"],
        ["ppo.estimator=topk", "train.compile=true"],
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@on_gpu
def test_a_run_on_a_gpu_learns_and_goes_on(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "device=cuda", "name=run", *options]
    assert main([*words, "train.max_steps=6"]) == 0
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["steps"] == 6 and 0 < summary["eval_kl_after"] < 10 and summary["peak_memory_bytes"] > 0
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert all(line["optim/skipped"] == 0 for line in lines) and max(line["engine_gap"] for line in lines) < 0.1
