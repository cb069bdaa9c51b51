"""The client of a vLLM server: what it sends, and one line for each way in which a server can fail. Needs no vLLM."""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import forked
import pytest
import torch
from conftest import random_model
from fake_vllm import FakeServer, ModelServer, completion, running
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opd import signals
from opd.config.options import LoraConfig
from opd.data.order import derive_seed
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request
from opd.errors import ENGINE, ConfigError, EngineError, OutputError, Preempted
from opd.models.distributed import Fsdp2
from opd.models.policy import Policy, add_adapters, decoder_layers
from opd.samplers import Decoding, SamplerSpec
from opd.samplers import vllm as vllm_module
from opd.samplers.vllm_server import VllmServerSampler

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = [Request(Prompt(i, (5, 7, 9 + i), "")) for i in range(3)]
DECODING = Decoding(0.8, 4, top_p=0.9, top_k=7)


def spec_of(model, **kwargs):
    return SamplerSpec(
        model=model, **{"eos": (1, 2), "pad_id": 0, "vocabulary": 23, "seed": 7, "bf16": False, "longest": 32, "batch_size": 2, **kwargs}
    )


@pytest.fixture
def server():
    with running(FakeServer()) as fake:
        yield fake


@pytest.fixture
def make_sampler(make_model, server):
    def make(model=None, url=None, timeout=5.0, weights_folder=None, **kwargs):
        spec = spec_of(model or make_model(tie_word_embeddings=True), **kwargs)
        return VllmServerSampler(spec, False, url or server.url, timeout, weights_folder)

    return make


def failure(action):
    """Return the message of the `EngineError` that it raises: a single line."""
    with pytest.raises(EngineError) as caught:
        action()
    assert caught.value.exit_code == ENGINE == 76
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_request_has_exactly_the_decoding_and_ids_are_taken_as_drawn(make_sampler, server):
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


def test_greedy_log_probs_are_zero_and_a_completion_may_be_truncated(make_sampler, server):
    server.completion = completion([4, 5, 6, 7])
    (rollout,) = make_sampler().sample(REQUESTS[:1], Decoding(0.0, 4), "train")
    assert rollout.finish_reason is FinishReason.length
    assert not rollout.behaviour_logp.any()


def test_weights_are_sent_once_for_each_refresh_with_the_tied_head_under_its_name(make_sampler, make_model, server, tmp_path):
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
    "a probability above 1": (completion(logp=[-0.5, 0.3, -1.0, -2.0]), "invalid log-probs"),
    "fewer log-probs than ids": (completion(logp=[-0.5, -1.0]), "invalid log-probs"),
    "too short": (completion(ids=[4, 5], logp=[-0.5, -1.0]), "2 tokens of at most 4"),
    "nothing": (completion(ids=[], logp=[]), "0 tokens of at most 4"),
    "too long": (completion(ids=[4] * 5, logp=[-1.0] * 5), "5 tokens of at most 4"),
    "tokens after the end of sequence": (completion(ids=[4, 1, 4, 4], logp=[-1.0] * 4), "end-of-sequence at [1]"),
    "an id that the teacher does not have": (completion(ids=[4, 30, 4, 4], logp=[-1.0] * 4), "drew id 30"),
}


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_impossible_completion_is_an_engine_error_of_one_line(make_sampler, server, case):
    server.completion, expected = BAD_COMPLETIONS[case]
    assert expected in failure(lambda: make_sampler().sample(REQUESTS, DECODING, "train"))


def test_only_the_main_process_sends_weights(make_sampler, server):
    sampler = make_sampler(is_main=False)
    sampler.sync_weights(lambda send: None)
    sampler.refresh()
    sampler.sample(REQUESTS, DECODING, "train")
    assert not server.bodies("/collective_rpc") and len(server.bodies("/v1/completions")) == 1 + len(REQUESTS)


class AdapterServer(ModelServer):
    """Has the base model, and loads adapters from a folder as vLLM does: by the names and with the scale of peft's files."""

    def __init__(self, base):
        super().__init__(base)
        self.base, self.adapted = {name: tensor.clone() for name, tensor in base.state_dict().items()}, False
        self.model.load_state_dict(self.base)
        self.answers["/v1/load_lora_adapter"] = self.load
        self.answers["/v1/completions"] = self.respond

    def load(self, handler, body):
        assert body["load_inplace"] is True and body["lora_name"] == "opd"
        folder = Path(body["lora_path"])
        settings, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
        weights = dict(self.base)
        for name in (name for name in tensors if name.endswith("lora_A.weight")):
            plain = name.removeprefix("base_model.model.").replace(".lora_A", "")
            scale = settings["lora_alpha"] / settings["r"]
            weights[plain] = weights[plain] + scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        self.model.load_state_dict(weights)
        self.adapted = True
        handler.reply(b"Success: LoRA adapter 'opd' added successfully.")

    def respond(self, handler, body):
        if body["top_k"] == 1:
            handler.reply(completion([3] * 8, [0.0] * 8))
        else:
            assert body["model"] == ("opd" if self.adapted else "student")
            self.sample(handler, body)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft
def test_adapters_alone_go_to_a_server_that_takes_them(tmp_path):
    pytest.importorskip("peft")
    model = student(tied=False, adapted=True)
    with running(AdapterServer(student(tied=False, adapted=False))) as server:
        sampler = VllmServerSampler(spec_of(model, eos=(1,)), False, server.url, 5.0, str(tmp_path / "w"))
        for _ in range(2):
            (rollout,) = sampler.sample(REQUESTS[:1], Decoding(1.0, 6), "train")
            ids = torch.tensor([[*rollout.request.prompt.ids, *rollout.completion]])
            expected = model(ids).logits[0, 2:-1].log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
            assert torch.allclose(rollout.behaviour_logp, expected.detach(), atol=1e-4)
            change_adapters(model)
            sampler.refresh()
        assert (
            not server.bodies("/collective_rpc")
            and len(server.bodies("/v1/load_lora_adapter")) == len(server.bodies("/reset_prefix_cache")) == 2
        )
        sent = sum(file.stat().st_size for file in (tmp_path / "w").iterdir())
        assert sent < 0.9 * sum(tensor.nbytes for tensor in model.state_dict().values())


def change_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft
def test_server_with_another_base_model_or_too_little_room_for_the_adapters_is_refused(tmp_path):
    pytest.importorskip("peft")
    with running(AdapterServer(random_model(seed=5))) as server:
        sampler = VllmServerSampler(spec_of(student(tied=False, adapted=True)), False, server.url)
        assert "model.path" in failure(sampler.sync_weights)
        server.answers["/v1/load_lora_adapter"] = lambda handler, body: handler.reply({"error": "rank 4 is too large"}, 400)
        assert "too large" in failure(VllmServerSampler(spec_of(student(False, True)), False, server.url).sync_weights)
        assert not server.bodies("/collective_rpc")  # vLLM breaks where weights are loaded with adapters


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft
def test_merged_weights_go_to_a_server_without_adapters_with_a_warning(server, caplog):
    pytest.importorskip("peft")
    sampler = VllmServerSampler(spec_of(student(tied=False, adapted=True)), False, server.url)
    for _ in range(2):
        sampler.sync_weights()
        sampler.refresh()
    assert len(server.bodies("/collective_rpc")) == 2 and len(server.bodies("/v1/load_lora_adapter")) == 1
    assert sampler.model_name == "student" and "merged" in caplog.text


def send_sharded_weights(rank, folder, url):
    """One of two processes: tied and separate heads, adapters, and a read-only folder."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for name, tied, bf16, adapted in (("tied", True, True, False), ("apart", False, False, False), ("adapted", False, False, True)):
        model = student(tied, adapted)
        spec = spec_of(model, is_main=rank == 0, sharded=True)
        sampler, unwritable = (VllmServerSampler(spec, bf16, url, 5.0, path) for path in (str(folder / name), "/proc/opd"))
        policy = Policy(model, 23)
        for layer in decoder_layers(model):
            fully_shard(layer)
        Fsdp2(None, fully_shard(policy), None)
        sampler.sync_weights(lambda send: send() if rank == 0 else None)
        with pytest.raises(OutputError) if rank == 0 else nullcontext():
            unwritable.sync_weights(lambda send: send() if rank == 0 else None)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft
def test_sharded_weights_are_sent_in_full_and_stay_sharded(server, tmp_path):
    pytest.importorskip("peft")
    forked.work_in_two(send_sharded_weights, tmp_path, server.url)
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
    ("lag", "lora"), [(0, False), pytest.param(1, False, marks=pytest.mark.long), pytest.param(0, True, marks=pytest.mark.long)]
)
def test_sharded_run_samples_with_a_server_without_gathering_weights(server, tmp_path, lag, lora):
    """The weights that are sent last are those that the run ends with."""
    server.completion = completion([17, 18, 256], [-0.5, -0.25, -1.0])
    server.answers["/v1/models"] = {"data": [{"id": "student", "max_model_len": 4096}]}
    words = ["experiment=debug", "device=cpu", "name=run", "sampling.engine=vllm", f"sampling.vllm.url={server.url}"]
    words += ["sampling.vllm.weights_folder=w", f"sampling.lag={lag}", "train.max_steps=3", "eval.steps=0", "eval.kl_prompts=4"]
    words += ["lora=default", "optim.lr=1e-2"] if lora else []
    forked.trained(tmp_path, words, 2, config=forked.FSDP2, before=note_gathering)
    # At first and after each of three updates; with a lag, the second step samples with the first weights.
    assert len(server.bodies("/collective_rpc")) == 4 - lag
    callers = (tmp_path / "callers.txt").read_text().split()
    assert callers.count("scoring_ready") == 2 and "sampler_ready" not in callers
    sent, final = load_file(tmp_path / "w/model.safetensors"), load_file(tmp_path / "runs/run/final/model.safetensors")
    assert all(torch.allclose(sent[name], tensor, atol=1e-6 * lora) for name, tensor in final.items()) and sent.keys() >= final.keys()


def note_gathering() -> None:
    """Write down which functions gather weights."""
    gathered_weights = Fsdp2.gathered_weights

    def noted(self):
        if os.environ["RANK"] == "0":
            with Path("callers.txt").open("a") as file:
                print(sys._getframe(1).f_code.co_name, file=file)
        return gathered_weights(self)

    Fsdp2.gathered_weights = noted


def test_stop_signal_ends_sampling_in_the_main_thread_but_not_sampling_ahead(make_sampler, monkeypatch):
    """Rollouts sampled ahead are saved: the weights that could sample them again are gone."""
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
    "answers without JSON": (lambda handler, body: handler.reply(b"<html>"), "its answer to /v1/completions is not JSON: <html>"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_server_that_fails_while_it_samples_is_an_engine_error_of_one_line(make_sampler, server, case):
    sampler = make_sampler(timeout=0.3)
    server.answers["/v1/completions"], expected = BAD_ANSWERS[case]
    line = failure(lambda: sampler.sample(REQUESTS, DECODING, "train"))
    assert line.startswith(f"sampling.vllm.url={server.url}: ") and expected in line


def test_waiting_requests_are_not_sent_after_a_failure(make_sampler, server):
    sampler = make_sampler(timeout=0.3)
    server.answers["/v1/completions"] = hang
    failure(lambda: sampler.sample(REQUESTS * 20, DECODING, "train"))
    assert len(server.bodies("/v1/completions")) < 10  # of 60, two at a time


UNFIT = {
    "another version": ("/version", {"version": "0.31.2"}, "this is not vLLM 0.32.x"),
    "no vLLM": ("/version", None, "this is not vLLM 0.32.x"),
    "no developer mode": ("/is_sleeping", lambda handler, body: handler.send_error(404), "with VLLM_SERVER_DEV_MODE=1"),
    "raw log-probs": (
        "/v1/completions",
        lambda handler, body: handler.reply(completion([3] * 8, [0.0] * 7 + [-0.1])),
        "start it with --logprobs-mode processed_logprobs",
    ),
    "no models": ("/v1/models", {"data": []}, "names no served model"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unsuitable_server_is_refused_before_the_first_step(make_sampler, server, case):
    path, answer, expected = UNFIT[case]
    server.answers[path] = answer
    assert expected in failure(make_sampler)


def test_server_that_does_not_run_is_an_engine_error_of_one_line(make_sampler):
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
def test_weights_that_are_not_loaded_stop_the_run(make_sampler, server, path, answer, expected):
    sampler = make_sampler()
    server.answers[path] = answer
    assert expected in failure(lambda: sampler.sample(REQUESTS, DECODING, "train"))
    assert len(server.bodies("/v1/completions")) == 1  # the probe alone


def test_weights_folder_that_cannot_be_written_is_an_output_error(make_sampler):
    with pytest.raises(OutputError, match=r"sampling\.vllm\.weights_folder: /proc/opd"):
        make_sampler(weights_folder="/proc/opd").sample(REQUESTS, DECODING, "train")


@pytest.mark.parametrize(
    ("installed", "is_tested"), [("0.32.0+cpu", True), ("0.32.1", True), ("0.31.9", False), ("0.320.0", False), ("1.0", False)]
)
def test_only_the_tested_version_of_vllm_is_used(monkeypatch, installed, is_tested):
    monkeypatch.setattr(vllm_module, "version", lambda name: installed)
    if is_tested:
        vllm_module.check_installed()
    else:
        with pytest.raises(ConfigError, match=rf"this is vLLM {installed}; opd is tested with 0\.32\.x"):
            vllm_module.check_installed()
