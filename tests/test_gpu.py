"""What a GPU does differently: CUDA graphs, streams, bf16. The parts that a CPU can do run there as well."""

import gc
import json
from importlib.util import find_spec

import pytest
import torch
from conftest import random_model
from test_samplers import completions, gaps, requests, spec_of

from opd.config.options import Placement
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout, micro_batches
from opd.models.device import autocast
from opd.models.policy import prepare_teacher
from opd.objective import Head, chunked_loss
from opd.objective.logp import token_logp
from opd.samplers import Decoding, GenerateSampler
from opd.teachers import LocalTeacher, place
from opd.train import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores"),  # advice of inductor
    pytest.mark.filterwarnings(r"ignore:.*grad_output\.strides"),  # of cuDNN's attention
]
DECODING = Decoding(temperature=0.8, max_new_tokens=40, batch_size=9)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])


@pytest.fixture(autouse=True)
def no_cudnn_attention():
    """Turn off, as a run does, cuDNN's attention, which plans for every new shape for up to a second."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def sampler_on(device, captured, **kwargs):
    sampler = GenerateSampler(spec_of(random_model().to(device), bf16=kwargs.pop("bf16", False)), **kwargs)
    sampler.captures = captured
    return sampler


@devices
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast", "copy"])
def test_log_probs_are_those_of_a_forward_pass(device, captured, precision):
    """The decode line shrinks several times, and on a GPU each new size is captured."""
    sampler = sampler_on(device, captured, bf16=precision == "autocast", bf16_copy=precision == "copy")
    rollouts = sampler.sample(requests(4), DECODING, "train")
    assert len(set(map(len, completions(rollouts)))) > 5
    with autocast(torch.device(device), precision == "autocast"):
        gaps_N = gaps(sampler.spec.model, rollouts, DECODING)
    if precision == "float32":
        assert gaps_N.max() < 1e-4
    else:
        assert gaps_N.mean() < 0.03 and gaps_N.max() < 0.3  # on a CPU 0.014 and 0.14 with the copy


@devices
def test_the_decode_line_gives_the_samples_of_the_growing_cache_and_keeps_its_memory(device):
    growing, captured = sampler_on(device, False), sampler_on(device, True)
    expected = completions(growing.sample(requests(4), DECODING, "train"))
    assert completions(captured.sample(requests(4), DECODING, "train")) == expected
    if device == "cuda":
        gc.collect()  # what earlier tests have left
        before = torch.cuda.memory_allocated()
        for stream in ("train", "evaluation"):  # lines that stay, and lines that do not
            captured.sample(requests(4), DECODING, stream)
            assert torch.cuda.memory_allocated() == before


@on_gpu
def test_decode_step_is_captured_on_a_gpu(monkeypatch):
    graphs = []
    original = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: graphs.append(graph) or original(graph, **kwargs))
    GenerateSampler(spec_of(random_model().to("cuda"), eos=())).sample(requests(), Decoding(0.8, 12), "train")
    assert len(graphs) == 1  # one for all steps: no row ends


@devices
@pytest.mark.parametrize("masked", [None, [3, 7]])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_the_token_log_prob_are_those_of_plain_torch_in_float64(device, dtype, limit, masked):
    """A GPU has kernels for it, and adds a chunk's product in bf16 to the head's gradient in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(rows, 16, generator=generator).to(device, dtype).requires_grad_() for rows in (40, 100))
    target_N, advantage_N = torch.randint(10, 90, (40,), generator=generator).to(device), torch.randn(40, generator=generator).to(device)
    ids = None if masked is None else torch.tensor(masked, device=device)

    def token_loss(logits_CV, part):
        logp_C, entropy_C = token_logp(logits_CV, target_N[part], 0.7, overwrite=True)
        return -advantage_N[part] * logp_C, {"logp": logp_C.detach(), "entropy": entropy_C}

    plain = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    logits_NV = (plain[0] @ plain[1].T)[:, :90]
    logits_NV = logits_NV if ids is None else logits_NV.index_fill(-1, ids, -torch.inf)
    logp_NV = (logits_NV / 0.7).log_softmax(-1)
    logp_N = logp_NV.gather(-1, target_N[:, None])[:, 0]
    expected = torch.autograd.grad(-(advantage_N * logp_N).sum(), plain)
    loss, stats = chunked_loss(hidden_NH, Head(weight_VH, None, size=90, rows=7, masked=ids), token_loss)
    computed = torch.autograd.grad(loss, (hidden_NH, weight_VH))
    entropy_N = torch.special.entr(logp_NV.exp()).sum(-1)
    for one, other in zip((stats["logp"], stats["entropy"], *computed), (logp_N, entropy_N, *expected), strict=True):
        assert float((one.detach().double() - other.detach()).norm()) < limit * float(other.detach().norm())


@devices
def test_offloaded_teacher_gives_the_same_log_probs(device):
    rollouts = [Rollout(Request(Prompt(i, (2, 3 + i), "")), (5, 6 + i, 1), torch.zeros(3), FinishReason.stop) for i in range(6)]
    batch = micro_batches(rollouts, 100, 0)[0].to(torch.device(device))
    resident, offloaded = (prepare_teacher(random_model(), torch.device(where)) for where in (device, "cpu"))
    place(offloaded, Placement.offload, torch.device(device))
    expected, teacher = LocalTeacher(resident, 23), LocalTeacher(offloaded, 23, device=torch.device(device))
    for _ in range(3):
        assert torch.equal(teacher.logp(batch.inputs, batch.ids_N, 0.7), expected.logp(batch.inputs, batch.ids_N, 0.7))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["sampling.dtype=auto", "model.dtype=bfloat16", "teacher.dtype=bfloat16"],
        ["sampling.dtype=bfloat16", "model.dtype=float32"],
        ["train.activation_checkpointing=true"],
        ["teacher.placement=offload", "ppo.estimator=exact"],
        ["teacher.placement=device", "teacher.device=cpu", "sampling.batch_size=4"],
        ["train.max_tokens_per_micro_batch=64", "checkpoint.background=true"],
        ["ppo.estimator=topk", "train.compile=true"],
        ["checkpoint.best=final", "eval.steps=1", "checkpoint.background=true"],
        pytest.param(["lora=default"], marks=pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")),
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@on_gpu
def test_run_on_a_gpu_trains(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["train.max_steps=3", "eval.steps=0", "eval.limit=4", "eval.kl_prompts=4"]
    assert main(["experiment=debug", "device=cuda", "name=run", *short, *options]) == 0
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["steps"] == 3 and 0 < summary["eval_kl_after"] < 10 and summary["peak_memory_bytes"] > 0
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert all({"perf/mfu", "perf/decode_bandwidth"} <= line.keys() for line in lines)
    assert all(line["optim/skipped"] == 0 for line in lines) and max(line["engine_gap"] for line in lines) < 0.1
