"""Sampling with real vLLM, beyond the suite that all engines share (test_samplers.py)."""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_samplers import change_weights, completions, gaps, long_requests
from training_helpers import TIMED
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import signals
from opd.config.compose import PACKAGE
from opd.config.options import LoraConfig, ModelConfig
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request
from opd.errors import ConfigError, EngineError, Preempted
from opd.models import load as models
from opd.models.policy import add_adapters, output_head
from opd.samplers import Decoding, GenerateSampler, SamplerSpec
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_server import VllmServerSampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: scripts/environment_vllm"),
]

ROOT = Path(__file__).resolve().parent.parent
DECODING = Decoding(temperature=0.8, max_new_tokens=12)


@pytest.fixture
def model(make_model):
    return make_model(hidden=64)  # vLLM's attention on a CPU needs heads of at least 32


def spec_of(model, eos=(1,), vocabulary=23, **kwargs):
    return SamplerSpec(
        model=model, eos=eos, pad_id=0, vocabulary=vocabulary, seed=0, bf16=False, **{"longest": 200, "batch_size": 16, **kwargs}
    )


def engine_of(model, **kwargs):
    return VllmSampler(spec_of(model, **kwargs), bf16=False, memory_share=0.1)


def test_weights_change_at_a_refresh_only(model):
    """With long prompts, so that keys and values cached for the old weights would show."""
    sampler = engine_of(model)
    sampler.sample(long_requests(), DECODING, "train")
    change_weights(model)
    assert gaps(model, sampler.sample(long_requests(), DECODING, "train"), DECODING).max() > 1
    sampler.refresh()
    assert gaps(model, sampler.sample(long_requests(), DECODING, "train"), DECODING).max() < 1e-4


def test_bundled_teacher_can_be_a_student():
    folder = PACKAGE / "assets" / "tiny-teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    requests = [Request(Prompt(0, tuple(tokenizer("12 + 34 =")["input_ids"]), ""), attempt=attempt) for attempt in range(8)]
    sampler = engine_of(model, eos=models.eos_ids(model, tokenizer), vocabulary=output_head(model).vocabulary)
    decoding = Decoding(1.0, 12)
    assert gaps(model, sampler.sample(requests, decoding, "train"), decoding).max() < 1e-4


def test_model_that_vllm_cannot_run_is_refused():
    model = models.load_model(ModelConfig(path="bundled:tiny-student"), "model", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"Qwen2ForCausalLM: .*head_dim=16.*sampling\.engine=generate"):
        engine_of(model, eos=(256,), vocabulary=261)


def test_more_tokens_than_the_model_has_positions_are_refused(model):
    with pytest.raises(ConfigError, match=r"\(5000\) is greater than .*the longest prompt and the most new tokens"):
        engine_of(model, longest=5000, batch_size=2)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "embed_tokens"]], ids=["sent alone", "merged"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft
def test_adapters_reach_the_engine_alone_or_merged(make_model, targets):
    pytest.importorskip("peft")
    model = make_model(hidden=64)
    add_adapters(model, LoraConfig(rank=4, targets=targets))
    sampler = engine_of(model)
    assert sampler.rank == (8 if targets == ["all-linear"] else None)
    sampler.sample(long_requests(), DECODING, "train")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert gaps(model, sampler.sample(long_requests(), DECODING, "train"), DECODING).max() > 0.1
    sampler.refresh()
    assert gaps(model, sampler.sample(long_requests(), DECODING, "train"), DECODING).max() < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_random_numbers_threads_and_defaults_of_the_process_are_restored(model):
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


def test_signal_ends_sampling_after_the_current_engine_step(model, monkeypatch):
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
    """Return a student of a shape that vLLM runs on a CPU: the bundled teacher with noise on its weights."""
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
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def test_run_with_vllm_resumes_and_sweeps(student_folder, tmp_path):
    """The engine agrees with the trainer at every step; a resumed run and a sweep member log what the uninterrupted run logs."""
    done = opd(tmp_path, f"model.path={student_folder}", "name=one")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no output of vLLM
    run = tmp_path / "runs" / "one"
    steps = metrics(run)
    assert len(steps) == 6 and max(step["engine_gap"] for step in steps) < 1e-4
    shutil.rmtree(run / "checkpoints" / "step_000006")
    (run / "status.json").write_text((run / "status.json").read_text().replace("done", "failed"))
    done = opd(tmp_path, f"model.path={student_folder}", "name=one")
    assert done.returncode == 0 and "resuming after step 4" in done.stdout
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


def test_run_that_is_stopped_while_sampling_resumes_bitwise(student_folder, tmp_path):
    options = [f"model.path={student_folder}", "train.max_steps=3", "eval.limit=4", "eval.kl_prompts=4"]
    assert opd(tmp_path, *options, "name=straight").returncode == 0
    command = [sys.executable, "-c", STOPPED, "experiment=debug", "sampling.engine=vllm", *options, "name=stopped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75 and "stopped by SIGTERM" in done.stderr, done.stderr
    assert (tmp_path / "steps.txt").read_text() == "15"  # and none after
    straight, stopped = tmp_path / "runs" / "straight", tmp_path / "runs" / "stopped"
    saved = [path.name for path in (stopped / "checkpoints").glob("step_*")]
    done = opd(tmp_path, *options, "name=stopped")
    assert done.returncode == 0 and "resuming after step" in done.stdout
    assert saved and metrics(stopped) == metrics(straight)
    assert (stopped / "final" / "model.safetensors").read_bytes() == (straight / "final" / "model.safetensors").read_bytes()


SHARDED = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file", ROOT / "scripts/accelerate/fsdp2_cpu2.yaml"]


def launch(cwd, processes, student_folder, *options, sharded=False):
    launcher = SHARDED if sharded else ["torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, "-m", "opd.train", "experiment=debug", "sampling.engine=vllm"]
    command += [f"model.path={student_folder}", "device=cpu", "name=one", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_single_process_of_a_launcher_works(student_folder, tmp_path):
    done = launch(tmp_path, 1, student_folder)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "runs" / "one")) == 6


TWO = """
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from opd.data.prompts import Prompt
from opd.data.rollouts import Request
from opd.samplers import Decoding, SamplerSpec
from opd.samplers.vllm import VllmSampler

accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained("student", dtype=torch.float32).eval()
requests = [Request(Prompt(i, (5, 7, 9 + i), "")) for i in range(2 + accelerator.process_index)]
sampled = []
spec = SamplerSpec(model=model, eos=(256,), pad_id=257, vocabulary=261, seed=0, bf16=False, longest=60, batch_size=4)
for _ in range(2):
    sampler = VllmSampler(spec, bf16=False, memory_share=0.05)
    sampled.append([rollout.completion for rollout in sampler.sample(requests, Decoding(1.0, 12), "train")])
    del sampler
    assert float(accelerator.reduce(torch.ones(1))) == 2  # the run's process group still works
assert sampled[0] == sampled[1] and len(sampled[0]) == len(requests)
torch.distributed.destroy_process_group()
"""


def test_engines_of_two_processes_can_be_started_again_and_sample_different_numbers_of_requests(student_folder, tmp_path):
    (tmp_path / "student").symlink_to(student_folder)
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "two.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sharded", [False, True])
def test_each_of_two_processes_has_an_engine_with_the_current_weights(student_folder, tmp_path, sharded):
    """With a learning rate at which weights of the step before would show."""
    options = ["optim.lr=1e-2", "train.max_steps=4", "eval.limit=4", "eval.kl_prompts=4"]
    done = launch(tmp_path, 2, student_folder, *options, sharded=sharded)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "runs" / "one")
    assert len(steps) == 4 and max(step["engine_gap"] for step in steps) < 1e-4


@contextmanager
def serving(folder, log, *options, **variables):
    """Let a real server, started as opd/samplers/README.md says with a smaller cache, answer for the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "vllm", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--logprobs-mode", "processed_logprobs"]
    command += ["--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "64M", *options]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **variables}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
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


@pytest.fixture(scope="module")
def server(student_folder, tmp_path_factory):
    with serving(student_folder, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def test_run_with_adapters_sends_them_alone_to_a_server_with_room_for_them(student_folder, tmp_path):
    room = ("--enable-lora", "--max-lora-rank", "16")
    with serving(student_folder, tmp_path / "log", *room, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as url:
        options = [f"model.path={student_folder}", f"sampling.vllm.url={url}", "sampling.vllm.weights_folder=w", "optim.lr=1e-2"]
        done = opd(tmp_path, *options, "name=one", "lora=default")
        assert done.returncode == 0, done.stderr
        steps = metrics(tmp_path / "runs" / "one")
        assert len(steps) == 6 and max(step["engine_gap"] for step in steps) < 1e-4
        assert {file.name for file in (tmp_path / "w").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        done = opd(tmp_path, *options, "name=two", "lora=default", "lora.rank=32")
        assert done.returncode == 76 and "rank 32" in done.stderr


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def server_sampler(model, url, **kwargs):
    spec = spec_of(model, **{"eos": (256,), "vocabulary": 261, "batch_size": 8, **kwargs})
    return VllmServerSampler(spec, False, url, timeout=60.0)


def test_server_samples_with_the_weights_sent_last(student_folder, server):
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    sampler, requests = server_sampler(model, server), long_requests(vocabulary=250)
    for decoding in (DECODING, Decoding(0.8, 12, top_k=4), Decoding(1.2, 12, top_p=0.7)):
        assert gaps(model, sampler.sample(requests, decoding, "train"), decoding).max() < 1e-4
    change_weights(model)
    assert gaps(model, sampler.sample(requests, DECODING, "train"), DECODING).max() > 1
    sampler.refresh()
    first = sampler.sample(requests, DECODING, "train")
    assert gaps(model, first, DECODING).max() < 1e-4
    assert completions(sampler.sample(requests[::-1], DECODING, "train"))[::-1] == completions(first)
    greedy = completions(sampler.sample(requests, Decoding(0.0, 12), "train"))
    assert greedy == completions(GenerateSampler(spec_of(model, eos=(256,), vocabulary=261)).sample(requests, Decoding(0.0, 12), "train"))
    assert {rollout.finish_reason for rollout in sampler.sample(requests, Decoding(1.0, 5), "train")} >= {FinishReason.length}


def test_server_keeps_end_of_sequence_tokens_and_never_draws_ids_beyond_the_vocabulary(student_folder, server):
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    requests = long_requests(8, vocabulary=60)
    rollouts = server_sampler(model, server, eos=tuple(range(40, 60)), vocabulary=64).sample(requests, Decoding(2.0, 30), "train")
    assert max(max(completion) for completion in completions(rollouts)) < 64
    assert gaps(model, rollouts, Decoding(2.0, 30), vocabulary=64).max() < 1e-4
    ended = [rollout for rollout in rollouts if rollout.finish_reason is FinishReason.stop]
    assert ended and all(40 <= rollout.completion[-1] < 60 for rollout in ended)


def test_server_with_too_short_a_context_is_refused(student_folder, server):
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    with pytest.raises(EngineError, match="--max-model-len 4096"):
        server_sampler(model, server, longest=4096)


def test_run_with_a_server(student_folder, server, tmp_path):
    done = opd(tmp_path, f"model.path={student_folder}", f"sampling.vllm.url={server}", "name=one", "sampling.vllm.weights_folder=w")
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "runs" / "one")
    assert len(steps) == 6 and max(step["engine_gap"] for step in steps) < 1e-4
    assert (tmp_path / "w" / "model.safetensors").is_file()


@pytest.mark.parametrize(("lag", "sharded"), [(0, False), (1, False), (0, True), (1, True)])
def test_two_processes_share_a_server_with_the_current_weights(student_folder, server, tmp_path, lag, sharded):
    """With a learning rate at which weights of the step before would show; with a lag, they are used."""
    options = [f"sampling.vllm.url={server}", f"sampling.lag={lag}", "optim.lr=1e-2", "eval.steps=2"]
    done = launch(tmp_path, 2, student_folder, *options, sharded=sharded)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "runs" / "one")
    assert len(steps) == 6 and steps[0]["engine_gap"] < 1e-4
    assert all((step["engine_gap"] > 1e-3) == bool(lag) for step in steps[2:])
