"""The client of a vLLM server: what it sends, and one clear line for each way in which a server can fail. Needs no vLLM."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opd import signals
from opd.config.schema import LoraConfig
from opd.data.order import derive_seed
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request
from opd.errors import ENGINE, ConfigError, EngineError, OutputError, Preempted
from opd.models import fsdp2
from opd.models.policy import Policy, add_adapters
from opd.samplers import Decoding
from opd.samplers import vllm as vllm_module
from opd.samplers.vllm_server import VllmServerSampler

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = [Request(Prompt(i, (5, 7, 9 + i), "")) for i in range(3)]
DECODING = Decoding(0.8, 4, top_p=0.9, top_k=7)


def completion(ids=(4, 5, 6, 1), logp=(-0.5, -0.25, -1.0, -2.0)):
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logp}}]}


class FakeServer(ThreadingHTTPServer):
    """Answers as told: a path's answer is a value for JSON, or a function that gets the handler and the body."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.answers = {
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": "student", "max_model_len": 64}]},
            "/is_sleeping": {"is_sleeping": False},
            "/v1/completions": self.complete,
            "/collective_rpc": {"results": [None]},
            "/reset_prefix_cache": {"success": True},
        }
        self.completion = completion()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, handler, body):
        probe = body["top_k"] == 1
        handler.reply(completion([3] * 8, [0.0] * 8) if probe else self.completion)

    def bodies(self, path):
        return [body for asked, body in self.asked if asked == path]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size)) if size else None
        self.server.asked.append((self.path, body))
        answer = self.server.answers.get(self.path, lambda handler, body: handler.send_error(404))
        if callable(answer):
            answer(self, body)
        else:
            self.reply(answer)

    do_POST = do_GET

    def reply(self, answer, status=200, length=None):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    fake = FakeServer()
    threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def make_sampler(make_model, server):
    def make(vocabulary=23, model=None, **kwargs):
        settings = {"url": server.url, "longest": 32, "connections": 2, "timeout": 5.0, "weights_folder": None, **kwargs}
        return VllmServerSampler(model or make_model(tie_word_embeddings=True), (1, 2), vocabulary, 7, False, **settings)

    return make


def failure(action):
    """The one line of the `EngineError` that it raises."""
    with pytest.raises(EngineError) as caught:
        action()
    assert caught.value.exit_code == ENGINE == 76
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_asks_for_exactly_the_decoding_and_takes_ids_as_they_were_drawn(make_sampler, server):
    rollouts = make_sampler().sample(REQUESTS, DECODING, "train")
    assert [rollout.completion for rollout in rollouts] == [(4, 5, 6, 1)] * 3
    assert [rollout.finish_reason for rollout in rollouts] == [FinishReason.stop] * 3
    assert [rollout.request for rollout in rollouts] == REQUESTS
    assert torch.equal(rollouts[0].behaviour_logp, torch.tensor([-0.5, -0.25, -1.0, -2.0]))
    sent = sorted(server.bodies("/v1/completions")[1:], key=lambda body: body["prompt"])
    assert [body["prompt"] for body in sent] == [[5, 7, 9], [5, 7, 10], [5, 7, 11]]
    assert [body["seed"] for body in sent] == [derive_seed("train", 7, 0, i, 0) for i in range(3)]
    for body in sent:
        assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.8, 0.9, 7, 4)
        assert (body["min_p"], body["repetition_penalty"], body["presence_penalty"], body["frequency_penalty"]) == (0, 1, 0, 0)
        assert body["stop_token_ids"] == [1, 2] and body["ignore_eos"] is True and body["return_token_ids"] is True
        assert "allowed_token_ids" not in body
    make_sampler(vocabulary=9).sample(REQUESTS[:1], DECODING, "train")
    assert server.bodies("/v1/completions")[-1]["allowed_token_ids"] == list(range(9))


def test_greedy_tokens_are_certain_and_a_completion_may_be_cut(make_sampler, server):
    server.completion = completion([4, 5, 6, 7])
    (rollout,) = make_sampler().sample(REQUESTS[:1], Decoding(0.0, 4), "train")
    assert rollout.finish_reason is FinishReason.length
    assert not rollout.behaviour_logp.any()


def test_weights_go_once_for_each_refresh_with_the_tied_head_by_its_name(make_sampler, make_model, server, tmp_path):
    model = make_model(tie_word_embeddings=True)
    sampler = make_sampler(model=model, weights_folder=str(tmp_path / "w"))
    for _ in range(2):
        sampler.sample(REQUESTS, DECODING, "train")
    calls = [path for path, _ in server.asked if path in ("/collective_rpc", "/reset_prefix_cache")]
    assert calls == ["/collective_rpc", "/reset_prefix_cache"]
    assert server.bodies("/collective_rpc") == [{"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "w")}}]
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    sampler.refresh()
    sampler.sample(REQUESTS, DECODING, "train")
    assert len(server.bodies("/collective_rpc")) == len(server.bodies("/reset_prefix_cache")) == 2
    sent = load_file(tmp_path / "w" / "model.safetensors")
    assert sent.keys() == model.state_dict().keys() and "lm_head.weight" in sent
    assert all(torch.equal(sent[name], tensor) for name, tensor in model.state_dict().items())


BAD_COMPLETIONS = {
    "null for a log-prob": (completion(logp=[-0.5, None, -1.0, -2.0]), "lacks token ids or log-probs"),
    "null for the log-probs": ({"choices": [{"token_ids": [4], "logprobs": None}]}, "lacks token ids or log-probs"),
    "null for everything": (None, "lacks token ids or log-probs"),
    "no ids": ({"choices": [{"text": "a", "logprobs": {"token_logprobs": [-1.0]}}]}, "lacks token ids or log-probs"),
    "no choices": ({"choices": []}, "lacks token ids or log-probs"),
    "text for ids": (completion(ids=["a", "b", "c", "d"]), "lacks token ids or log-probs"),
    "NaN": (completion(logp=[-0.5, math.nan, -1.0, -2.0]), "lacks token ids or log-probs"),
    "infinite": (completion(logp=[-0.5, -math.inf, -1.0, -2.0]), "lacks token ids or log-probs"),
    "a probability above 1": (completion(logp=[-0.5, 0.3, -1.0, -2.0]), "log-probs that are not any"),
    "fewer log-probs than ids": (completion(logp=[-0.5, -1.0]), "log-probs that are not any"),
    "too short": (completion(ids=[4, 5], logp=[-0.5, -1.0]), "broke off: 2 tokens of at most 4"),
    "nothing": (completion(ids=[], logp=[]), "broke off: 0 tokens"),
    "too long": (completion(ids=[4] * 5, logp=[-1.0] * 5), "broke off: 5 tokens of at most 4"),
    "on behind the end": (completion(ids=[4, 1, 4, 4], logp=[-1.0] * 4), "broke off"),
    "an id that the teacher lacks": (completion(ids=[4, 30, 4, 4], logp=[-1.0] * 4), "drew id 30"),
}


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_a_completion_that_cannot_be_is_one_line(make_sampler, server, case):
    server.completion, expected = BAD_COMPLETIONS[case]
    assert expected in failure(lambda: make_sampler().sample(REQUESTS, DECODING, "train"))


def test_one_of_several_processes_sends_the_weights(make_sampler, server):
    sampler = make_sampler(leads=False)
    sampler.sync_weights(lambda send: None)
    sampler.refresh()
    sampler.sample(REQUESTS, DECODING, "train")
    assert not server.bodies("/collective_rpc") and len(server.bodies("/v1/completions")) == 1 + len(REQUESTS)


def work(rank, folder, url):
    """One of two processes: layers shared out, handed over tied and not, with adapters and without, to what can be written and what not."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for name, tied, bf16, adapted in (("tied", True, True, False), ("apart", False, False, False), ("adapted", False, False, True)):
        model = student(tied, adapted)
        settings = {"url": url, "longest": 32, "connections": 2, "timeout": 5.0, "leads": rank == 0, "sharded": True}
        sampler = VllmServerSampler(model, (1, 2), 23, 7, bf16, **settings, weights_folder=str(folder / name))
        nowhere = VllmServerSampler(model, (1, 2), 23, 7, bf16, **settings, weights_folder="/proc/opd")
        policy = Policy(model, 23)
        for layer in layers(model):
            fully_shard(layer)
        fully_shard(policy)
        fsdp2.settle(policy, layerwise=True)
        sampler.sync_weights(lambda send: send() if rank == 0 else None)
        with pytest.raises(OutputError) if rank == 0 else nullcontext():
            nowhere.sync_weights(lambda send: send() if rank == 0 else None)
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def student(tied, adapted):
    model = random_model(tie_word_embeddings=tied)
    if adapted:
        add_adapters(model, LoraConfig(rank=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    return model


def layers(model):
    return [module for module in model.modules() if type(module).__name__ == "Qwen2DecoderLayer"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks in transformers' old words
def test_weights_that_two_processes_share_go_to_the_server_whole_and_stay_shared(server, tmp_path):
    pytest.importorskip("peft")
    torch.multiprocessing.spawn(work, (tmp_path, server.url), nprocs=2)
    assert len(server.bodies("/collective_rpc")) == 3
    for name, tied, dtype in (("tied", True, torch.bfloat16), ("apart", False, torch.float32)):
        sent, model = load_file(tmp_path / name / "model.safetensors"), student(tied, adapted=False)
        assert sent.keys() == model.state_dict().keys() and "lm_head.weight" in sent
        assert all(torch.equal(sent[key], tensor.to(dtype)) for key, tensor in model.state_dict().items())
    sent, base = load_file(tmp_path / "adapted" / "model.safetensors"), student(tied=False, adapted=False)
    assert sent.keys() == base.state_dict().keys()
    differs = {key for key, tensor in base.state_dict().items() if not torch.equal(sent[key], tensor)}
    assert differs and all("proj" in key for key in differs)
    base.load_state_dict(sent)
    ids = torch.arange(9)[None]
    assert torch.allclose(base(ids).logits, student(tied=False, adapted=True)(ids).logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "lag", "lora"), [("fsdp2", 0, False), ("fsdp2", 1, False), ("fsdp2", 0, True), ("zero3", 0, False), ("zero3", 1, True)]
)
def test_a_run_with_sharded_weights_lets_a_server_sample_without_gathering_them(server, tmp_path, strategy, lag, lora):
    """The last thing that is handed over is what the run ends with."""
    if strategy == "zero3":
        pytest.importorskip("deepspeed")
    server.completion = completion([17, 18, 256], [-0.5, -0.25, -1.0])
    server.answers["/v1/models"] = {"data": [{"id": "student", "max_model_len": 4096}]}
    (tmp_path / "run.py").write_text(GATHERED)
    config = ROOT / f"scripts/accelerate/{strategy}_cpu2.yaml"
    command = ["accelerate", "launch", "--main_process_port", "0", "--config_file", str(config), "run.py", "experiment=debug", "device=cpu"]
    command += ["name=run", "sampling.engine=vllm", f"sampling.vllm.url={server.url}", "sampling.vllm.weights_folder=w"]
    command += [
        f"sampling.lag={lag}",
        "train.max_steps=3",
        "eval.steps=0",
        "eval.kl_prompts=4",
        *(["lora=default", "optim.lr=1e-2"] if lora else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.bodies("/collective_rpc")) == 4 - lag  # before each of three steps, one of them ahead, and to be evaluated at the end
    assert (tmp_path / "gathered.txt").read_text().split() == ["kl", "kl"]
    sent, ended = load_file(tmp_path / "w/model.safetensors"), load_file(tmp_path / "runs/run/final/model.safetensors")
    assert all(torch.allclose(sent[name], tensor, atol=1e-6 * lora) for name, tensor in ended.items()) and sent.keys() >= ended.keys()


# Notes what weights are gathered for, but for building and for layers in turn.
GATHERED = """
import os, sys
from pathlib import Path
from opd import train
from opd.training import loop as trainer

whole = trainer.whole

def noted(module):
    if os.environ["RANK"] == "0":
        with Path("gathered.txt").open("a") as file:
            file.write(f"{'kl' if sys._getframe(3).f_code.co_name == 'kl' else sys._getframe(1).f_code.co_name}\\n")
    return whole(module)

trainer.whole = noted
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_stop_breaks_off_what_is_waited_for_and_not_what_is_sampled_ahead(make_sampler, monkeypatch):
    """Only the weights before the update could sample it again."""
    sampler = make_sampler()
    monkeypatch.setattr(signals, "pending", [signal.SIGTERM])
    with pytest.raises(Preempted):
        sampler.sample(REQUESTS, DECODING, "train")
    with ThreadPoolExecutor(1) as background:
        assert len(background.submit(sampler.sample, REQUESTS, DECODING, "train").result()) == len(REQUESTS)


def hang(handler, body):
    time.sleep(3)


def hang_up(handler, body):
    handler.connection.close()


def break_off(handler, body):
    handler.reply(b'{"choices"', length=500)


BAD_ANSWERS = {
    "refuses": (lambda handler, body: handler.reply({"error": {"message": "too\nlong"}}, 400), "refuses /v1/completions (400): "),
    "crashes": (lambda handler, body: handler.send_error(500), "refuses /v1/completions (500): "),
    "hangs": (hang, "no answer to /v1/completions within 0.3 s; see its log, or raise sampling.vllm.timeout"),
    "hangs up": (hang_up, "no answer to /v1/completions"),
    "breaks off": (break_off, "no answer to /v1/completions"),
    "says no JSON": (lambda handler, body: handler.reply(b"<html>"), "its answer to /v1/completions is not JSON: <html>"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_server_that_fails_while_it_samples_is_one_line(make_sampler, server, case):
    sampler = make_sampler(timeout=0.3)
    server.answers["/v1/completions"], expected = BAD_ANSWERS[case]
    start = time.monotonic()
    line = failure(lambda: sampler.sample(REQUESTS * 20, DECODING, "train"))
    assert line.startswith(f"sampling.vllm.url={server.url}: ") and expected in line
    assert time.monotonic() - start < 2  # the requests that wait are not tried


UNFIT = {
    "another version": ("/version", {"version": "0.31.2"}, "this is not vLLM 0.32.x"),
    "no vLLM": ("/version", None, "this is not vLLM 0.32.x"),
    "no developer mode": ("/is_sleeping", lambda handler, body: handler.send_error(404), "with VLLM_SERVER_DEV_MODE=1"),
    "raw log-probs": (
        "/v1/completions",
        lambda handler, body: handler.reply(completion([3] * 8, [0.0] * 7 + [-0.1])),
        "start it with --logprobs-mode processed_logprobs",
    ),
    "no models": ("/v1/models", {"data": []}, "tells no model"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_server_that_does_not_do_is_refused_before_the_first_step(make_sampler, server, case):
    path, answer, expected = UNFIT[case]
    server.answers[path] = answer
    assert expected in failure(make_sampler)


def test_a_server_that_is_not_there_is_one_line(make_sampler):
    line = failure(lambda: make_sampler(url="http://127.0.0.1:9"))
    assert line.startswith("sampling.vllm.url=http://127.0.0.1:9: no answer to /version") and "is it running?" in line


@pytest.mark.parametrize(
    ("path", "answer", "expected"),
    [
        ("/collective_rpc", lambda handler, body: handler.send_error(500), "refuses /collective_rpc (500)"),
        ("/reset_prefix_cache", {"success": False}, "did not drop the cache of the old weights"),
        ("/reset_prefix_cache", None, "did not drop the cache of the old weights"),
    ],
)
def test_weights_that_do_not_arrive_stop_the_run(make_sampler, server, path, answer, expected):
    sampler = make_sampler()
    server.answers[path] = answer
    assert expected in failure(lambda: sampler.sample(REQUESTS, DECODING, "train"))
    assert len(server.bodies("/v1/completions")) == 1  # the probe alone


def test_a_weights_folder_that_cannot_be_written_is_named(make_sampler):
    with pytest.raises(OutputError, match=r"sampling\.vllm\.weights_folder: /proc/opd"):
        make_sampler(weights_folder="/proc/opd").sample(REQUESTS, DECODING, "train")


@pytest.mark.parametrize(("found", "fine"), [("0.32.0+cpu", True), ("0.32.1", True), ("0.31.9", False), ("0.320.0", False), ("1.0", False)])
def test_only_the_tested_version_of_vllm_is_used(monkeypatch, found, fine):
    monkeypatch.setattr(vllm_module, "version", lambda name: found)
    if fine:
        vllm_module.check_installed()
    else:
        with pytest.raises(ConfigError, match=rf"this is vLLM {found}; opd is tested with 0\.32\.x"):
            vllm_module.check_installed()
