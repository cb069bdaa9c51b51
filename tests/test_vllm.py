"""Sampling with real vLLM: the configured distribution of the weights of the moment, and nothing of the process disturbed."""

import gc
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import signals
from opd.config.compose import PACKAGE
from opd.config.schema import LoraConfig, ModelConfig
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, collate
from opd.errors import ConfigError, EngineError, Preempted
from opd.models import load as models
from opd.models.policy import add_adapters, completion_hidden, output_head
from opd.objective import behaviour_logp
from opd.samplers import Decoding, GenerateSampler
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_server import VllmServerSampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: scripts/environment_vllm"),
]

ROOT = Path(__file__).resolve().parent.parent
LONG = 160  # tokens of a prompt: more than a block of the prefix cache
DECODING = Decoding(temperature=0.8, max_new_tokens=12)


@pytest.fixture
def model(make_model):
    return make_model(hidden=64)  # a CPU's attention kernels begin at 32 a head


def engine_of(model, eos=(1,), vocabulary=23, seed=0, bf16=False):
    return VllmSampler(model, eos, vocabulary, seed, bf16, longest=LONG + 40, batch_size=16, memory_share=0.1)


def long_requests(n=2, vocabulary=23):
    generator = torch.Generator().manual_seed(5)
    prompts = [Prompt(i, tuple(torch.randint(2, vocabulary, (LONG,), generator=generator).tolist()), "") for i in range(4)]
    return [Request(prompt, attempt=attempt) for prompt in prompts for attempt in range(n)]


def completions(rollouts):
    return [rollout.completion for rollout in rollouts]


def gap(model, rollouts, decoding, vocabulary=None):
    """The largest distance of a token's log-prob from that of a plain forward pass of the trainer's model."""
    worst = 0.0
    for rollout in rollouts:
        batch = collate([rollout], [0], pad_id=0)
        with torch.no_grad():
            logits = output_head(model, vocabulary).logits(completion_hidden(model.base_model, batch.inputs))
        expected = behaviour_logp(logits, decoding.temperature, decoding.top_k, decoding.top_p).gather(-1, batch.target_N[:, None])[:, 0]
        worst = max(worst, float((rollout.behaviour_logp - expected).abs().max()))
    return worst


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)), alpha=0.2)


@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_are_those_of_the_students_weights_of_the_moment(make_model, tied):
    """Before and after an update; long prompts, so that keys and values kept from the old weights would show."""
    model = make_model(hidden=64, tie_word_embeddings=tied)
    sampler, requests = engine_of(model), long_requests()
    for decoding in (DECODING, Decoding(0.8, 12, top_k=4), Decoding(0.8, 12, top_p=0.7), Decoding(1.5, 12, top_p=0.9, top_k=8)):
        assert gap(model, sampler.sample(requests, decoding, "train"), decoding) < 1e-4
    change(model)
    assert gap(model, sampler.sample(requests, DECODING, "train"), DECODING) > 1  # the update is one that shows
    sampler.refresh()
    assert gap(model, sampler.sample(requests, DECODING, "train"), DECODING) < 1e-4


def test_the_bundled_teacher_can_be_a_student():
    folder = PACKAGE / "assets" / "tiny-teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    requests = [Request(Prompt(0, tuple(tokenizer("12 + 34 =")["input_ids"]), ""), attempt=attempt) for attempt in range(8)]
    vocabulary = output_head(model).vocabulary
    rollouts = engine_of(model, models.eos_ids(model, tokenizer), vocabulary).sample(requests, Decoding(1.0, 12), "train")
    assert gap(model, rollouts, Decoding(1.0, 12)) < 1e-4


def test_a_model_that_vllm_cannot_run_is_refused():
    model = models.load_model(ModelConfig(path="bundled:tiny-student"), "model", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"cannot run Qwen2ForCausalLM: .*head_dim=16.*sampling\.engine=generate"):
        engine_of(model, (256,), 261)


def test_more_tokens_than_the_model_has_positions_are_refused(model):
    with pytest.raises(ConfigError, match=r"max_model_len \(5000\) is greater than .*the longest prompt and the most new tokens"):
        VllmSampler(model, (1,), 23, 0, False, longest=5000, batch_size=2, memory_share=0.1)


def test_adapters_are_merged_into_what_vllm_gets(make_model):
    pytest.importorskip("peft")
    model = make_model(hidden=64)
    add_adapters(model, LoraConfig(rank=4))
    sampler = engine_of(model)
    sampler.sample(long_requests(), DECODING, "train")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert gap(model, sampler.sample(long_requests(), DECODING, "train"), DECODING) > 0.1
    sampler.refresh()
    assert gap(model, sampler.sample(long_requests(), DECODING, "train"), DECODING) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.6, 0, 1.0), (0.6, 0, 1.0), (1.3, 5, 1.0), (1.3, 0, 0.8)])
def test_samples_follow_the_models_distribution(model, temperature, top_k, top_p):
    """Chi-square of 4,000 first tokens against the model's own probabilities; the bound is 8 standard deviations away."""
    drawn = engine_of(model).sample(
        [Request(Prompt(i, (5, 7, 9), "")) for i in range(4000)], Decoding(temperature, 1, top_p=top_p, top_k=top_k), "train"
    )
    with torch.no_grad():
        logp = behaviour_logp(model(torch.tensor([[5, 7, 9]])).logits[:, -1], temperature, top_k, top_p)[0]
    expected = logp.double().exp() * len(drawn)
    counts = torch.bincount(torch.tensor([rollout.completion[0] for rollout in drawn]), minlength=23).double()
    kept = expected > 0
    assert not counts[~kept].any() and int(kept.sum()) > 3
    freedom = int(kept.sum()) - 1
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < freedom + 8 * math.sqrt(2 * freedom)


def test_greedy_is_the_students_own(model):
    rollouts = engine_of(model).sample(long_requests(1), Decoding(0.0, 12), "evaluation")
    own = GenerateSampler(model, (1,), 0, 23, 0, False).sample(long_requests(1), Decoding(0.0, 12), "evaluation")
    assert completions(rollouts) == completions(own)
    assert not torch.cat([rollout.behaviour_logp for rollout in rollouts]).any()


def test_every_end_of_sequence_token_stops_and_is_kept(model):
    model.generation_config.eos_token_id = 3  # of no account, like all that it holds
    rollouts = engine_of(model, eos=(1, 6, 17)).sample(long_requests(8), Decoding(1.5, 30), "train")
    assert {rollout.completion[-1] for rollout in rollouts if rollout.finish_reason is FinishReason.stop} == {1, 6, 17}
    for rollout in rollouts:
        assert not set(rollout.completion[:-1]) & {1, 6, 17}
        assert len(rollout.behaviour_logp) == len(rollout.completion)


def test_a_completion_without_end_is_cut_and_says_so(model):
    rollouts = engine_of(model, eos=()).sample(long_requests(), DECODING, "train")
    assert {len(rollout.completion) for rollout in rollouts} == {12}
    assert {rollout.finish_reason for rollout in rollouts} == {FinishReason.length}


@pytest.mark.parametrize("tied", [True, False])
def test_ids_beyond_the_shared_vocabulary_are_never_drawn(make_model, tied):
    model = make_model(hidden=64, tie_word_embeddings=tied)
    requests = long_requests(8, vocabulary=9)
    whole = engine_of(model, vocabulary=23).sample(requests, Decoding(2.0, 12), "train")
    assert max(max(completion) for completion in completions(whole)) >= 9  # it would
    sampler = engine_of(model, vocabulary=9)
    for temperature in (2.0, 0.0):
        rollouts = sampler.sample(requests, Decoding(temperature, 12), "train")
        assert max(max(completion) for completion in completions(rollouts)) < 9
    assert gap(model, sampler.sample(requests, DECODING, "train"), DECODING, vocabulary=9) < 1e-4


def test_random_numbers_come_from_seed_epoch_sample_and_attempt(model):
    base = Request(Prompt(3, (5, 7, 9), ""), epoch=0, attempt=0)
    variants = [base, Request(base.prompt, 1, 0), Request(base.prompt, 0, 1), Request(Prompt(4, (5, 7, 9), ""), 0, 0)]
    sampler = engine_of(model, eos=())
    drawn = completions(sampler.sample(variants, DECODING, "train"))
    drawn += completions(sampler.sample([base], DECODING, "evaluation"))
    assert completions(sampler.sample(variants[::-1], DECODING, "train"))[::-1] == drawn[:4]
    assert completions(sampler.sample([base], DECODING, "train")) == drawn[:1]
    drawn += completions(engine_of(model, eos=(), seed=1).sample([base], DECODING, "train"))
    assert len(set(drawn)) == len(drawn)
    assert completions(engine_of(model, eos=()).sample([base], DECODING, "train")) == drawn[:1]


def test_the_process_keeps_its_random_numbers_threads_and_switches(model):
    def state():
        return (
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.set_num_threads,
            torch.get_default_dtype(),
        )

    before = state()
    sampler = engine_of(model)
    assert state() == before
    sampler.sample(long_requests(), DECODING, "train")
    assert state() == before
    del sampler
    gc.collect()
    assert not torch.distributed.is_initialized()


def test_a_signal_ends_a_call_after_the_step_it_is_at(model, monkeypatch):
    sampler, steps = engine_of(model, eos=()), []
    undisturbed = completions(sampler.sample(long_requests(), DECODING, "train"))
    engine = sampler.engine.llm_engine
    original = engine.step

    def step():
        steps.append(None)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original()

    with monkeypatch.context() as patch, signals.deferred():
        patch.setattr(engine, "step", step)
        with pytest.raises(Preempted, match="SIGTERM"):
            sampler.sample(long_requests(), DECODING, "train")
    assert len(steps) == 3 and not engine.has_unfinished_requests()
    assert completions(sampler.sample(long_requests(), DECODING, "train")) == undisturbed


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    """The bundled teacher with noise on its weights: a student of a shape that vLLM runs on a CPU."""
    folder, source = tmp_path_factory.mktemp("student"), PACKAGE / "assets" / "tiny-teacher"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def opd(cwd, *overrides):
    command = [sys.executable, "-m", "opd", "train", "experiment=debug", "sampling.engine=vllm", *map(str, overrides)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(("time/", "tokens_per"))} for line in lines]


def test_a_run_from_end_to_end(student_folder, tmp_path):
    """The engine agrees with the trainer at every step. A run that goes on does what it would have done; so does a member of a sweep."""
    done = opd(tmp_path, f"model.path={student_folder}", "name=one")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # vLLM has nothing to say on the screen
    run = tmp_path / "runs" / "one"
    steps = metrics(run)
    assert len(steps) == 6 and max(step["engine_gap"] for step in steps) < 1e-4
    shutil.rmtree(run / "checkpoints" / "step_000006")
    (run / "status.json").write_text((run / "status.json").read_text().replace("done", "failed"))
    done = opd(tmp_path, f"model.path={student_folder}", "name=one")
    assert done.returncode == 0 and "going on after step 4" in done.stdout
    assert metrics(run) == steps
    done = opd(tmp_path, f"model.path={student_folder}", "seed=0,1", "--multirun", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${seed}")
    assert done.returncode == 0, done.stderr
    assert steps == metrics(tmp_path / "sweep" / "0") != metrics(tmp_path / "sweep" / "1")


STOPPED = """
import os, signal, sys
from pathlib import Path
from opd.samplers import vllm
from opd.train import main

start_engine, steps = vllm.start_engine, 0

def start(*args):
    engine = start_engine(*args)
    original = engine.llm_engine.step

    def step():
        global steps
        steps += 1
        Path("steps.txt").write_text(str(steps))
        if steps == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return original()

    engine.llm_engine.step = step
    return engine

vllm.start_engine = start
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_is_stopped_amid_sampling_goes_on_as_if_it_had_not_been(student_folder, tmp_path):
    options = [f"model.path={student_folder}", "train.max_steps=3", "eval.limit=4", "eval.kl_prompts=4"]
    assert opd(tmp_path, *options, "name=straight").returncode == 0
    command = [sys.executable, "-c", STOPPED, "experiment=debug", "sampling.engine=vllm", *options, "name=stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75 and "stopped by SIGTERM" in done.stderr, done.stderr
    assert (tmp_path / "steps.txt").read_text() == "15"  # and none after
    straight, stopped = tmp_path / "runs" / "straight", tmp_path / "runs" / "stopped"
    saved = [path.name for path in (stopped / "checkpoints").glob("step_*")]
    done = opd(tmp_path, *options, "name=stopped")
    assert done.returncode == 0 and "going on after step" in done.stdout
    assert saved and metrics(stopped) == metrics(straight)
    assert (stopped / "final" / "model.safetensors").read_bytes() == (straight / "final" / "model.safetensors").read_bytes()


SHARDED = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file", ROOT / "scripts/accelerate/fsdp2_cpu2.yaml"]


def launch(cwd, processes, student_folder, *options, sharded=False):
    launcher = SHARDED if sharded else ["torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, "-m", "opd.train", "experiment=debug", "sampling.engine=vllm"]
    command += [f"model.path={student_folder}", "device=cpu", "name=one", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_one_process_of_a_launcher_works(student_folder, tmp_path):
    done = launch(tmp_path, 1, student_folder)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "runs" / "one")) == 6


TWO = """
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from opd.data.prompts import Prompt
from opd.data.rollouts import Request
from opd.samplers import Decoding
from opd.samplers.vllm import VllmSampler

accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained("student", dtype=torch.float32).eval()
requests = [Request(Prompt(i, (5, 7, 9 + i), "")) for i in range(2 + accelerator.process_index)]
written = []
for _ in range(2):
    sampler = VllmSampler(model, (256,), 261, 0, False, longest=60, batch_size=4, memory_share=0.05)
    written.append([rollout.completion for rollout in sampler.sample(requests, Decoding(1.0, 12), "train")])
    del sampler
    assert float(accelerator.reduce(torch.ones(1))) == 2  # what the processes share is still there
assert written[0] == written[1] and len(written[0]) == len(requests)
torch.distributed.destroy_process_group()
"""


def test_engines_of_several_processes_come_and_go_and_sample_what_each_is_asked(student_folder, tmp_path):
    (tmp_path / "student").symlink_to(student_folder)
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "two.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sharded", [False, True])
def test_each_of_several_processes_has_an_engine_of_its_own(student_folder, tmp_path, sharded):
    """A learning rate at which weights of a step before would show."""
    options = ["optim.lr=1e-2", "train.max_steps=4", "eval.limit=4", "eval.kl_prompts=4"]
    done = launch(tmp_path, 2, student_folder, *options, sharded=sharded)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "runs" / "one")
    assert len(steps) == 4 and max(step["engine_gap"] for step in steps) < 1e-4


@pytest.fixture(scope="module")
def server(student_folder, tmp_path_factory):
    """A real server as the README starts it, with a smaller cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "vllm", "serve", student_folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--logprobs-mode", "processed_logprobs"]
    command += ["--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "64M"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = tmp_path_factory.mktemp("server") / "log"
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            deadline = time.monotonic() + 240
            while not answers(f"{url}/health"):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def server_sampler(model, url, eos=(256,), vocabulary=261, **kwargs):
    settings = {"longest": 200, "connections": 8, "timeout": 60.0, "weights_folder": None, **kwargs}
    return VllmServerSampler(model, eos, vocabulary, 0, False, url=url, **settings)


def test_a_server_samples_with_the_students_weights_of_the_moment(student_folder, server):
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    sampler, requests = server_sampler(model, server), long_requests(vocabulary=250)
    for decoding in (DECODING, Decoding(0.8, 12, top_k=4), Decoding(1.2, 12, top_p=0.7)):
        assert gap(model, sampler.sample(requests, decoding, "train"), decoding) < 1e-4
    change(model)
    assert gap(model, sampler.sample(requests, DECODING, "train"), DECODING) > 1
    sampler.refresh()
    first = sampler.sample(requests, DECODING, "train")
    assert gap(model, first, DECODING) < 1e-4
    assert completions(sampler.sample(requests[::-1], DECODING, "train"))[::-1] == completions(first)
    greedy = completions(sampler.sample(requests, Decoding(0.0, 12), "train"))
    assert greedy == completions(GenerateSampler(model, (256,), 257, 261, 0, False).sample(requests, Decoding(0.0, 12), "train"))
    assert {rollout.finish_reason for rollout in sampler.sample(requests, Decoding(1.0, 5), "train")} >= {FinishReason.length}


def test_a_server_keeps_ends_and_leaves_out_what_the_teacher_lacks(student_folder, server):
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    requests = long_requests(8, vocabulary=60)
    rollouts = server_sampler(model, server, eos=tuple(range(40, 60)), vocabulary=64).sample(requests, Decoding(2.0, 30), "train")
    assert max(max(completion) for completion in completions(rollouts)) < 64
    assert gap(model, rollouts, Decoding(2.0, 30), vocabulary=64) < 1e-4
    ended = [rollout for rollout in rollouts if rollout.finish_reason is FinishReason.stop]
    assert ended and all(40 <= rollout.completion[-1] < 60 for rollout in ended)


def test_a_server_that_takes_too_few_tokens_is_refused(student_folder, server):
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    with pytest.raises(EngineError, match="it takes 256 tokens, this run 4096: start it with --max-model-len 4096"):
        server_sampler(model, server, longest=4096)


def test_a_run_with_a_server(student_folder, server, tmp_path):
    done = opd(tmp_path, f"model.path={student_folder}", f"sampling.vllm.url={server}", "name=one", "sampling.vllm.weights_folder=w")
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "runs" / "one")
    assert len(steps) == 6 and max(step["engine_gap"] for step in steps) < 1e-4
    assert (tmp_path / "w" / "model.safetensors").is_file()


@pytest.mark.parametrize(("lag", "sharded"), [(0, False), (1, False), (0, True), (1, True)])
def test_two_processes_share_a_server_which_has_the_weights_before_either_asks(student_folder, server, tmp_path, lag, sharded):
    """A learning rate at which weights of a step before would show; with a lag they are to."""
    options = [f"sampling.vllm.url={server}", f"sampling.lag={lag}", "optim.lr=1e-2", "eval.steps=2"]
    done = launch(tmp_path, 2, student_folder, *options, sharded=sharded)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "runs" / "one")
    assert len(steps) == 6 and steps[0]["engine_gap"] < 1e-4
    assert all((step["engine_gap"] > 1e-3) == bool(lag) for step in steps[2:])
