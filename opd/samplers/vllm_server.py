"""Sampling with a vLLM server: the student's weights go to it through a folder, prompts and completions as token ids.

The server is started by the user, with the student that the run begins with:

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --host 127.0.0.1 --port 8000 --dtype float32 --max-model-len 1024 \
        --logprobs-mode processed_logprobs

With adapters (`lora.rank`) add VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank RANK: then the adapters are sent alone.

The developer mode opens the addresses through which weights are exchanged. Anyone who reaches the port can use them: keep it local.
"""

import json
import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from opd import signals
from opd.data.rollouts import Request, Rollout
from opd.errors import OutputError
from opd.models.policy import is_quantized, last_hidden, output_head
from opd.models.server import NoSuchAddress, Server, served_models, short
from opd.samplers.adapter_sync import NAME, room_for_adapters, write_adapters
from opd.samplers.base import Decoding, OnDone, OnMain, SamplerSpec, run_here, unchanged
from opd.samplers.vllm import TESTED, make_rollout, request_seed, sampling_options
from opd.samplers.weights import write_weights

log = logging.getLogger(__name__)

START = "start it as opd/samplers/README.md says"
ZERO_TOLERANCE = 1e-4  # nats
PROBE_TOKENS = 8
BASE_TOLERANCE = 0.3  # nats per token between the server's model and the student: rounding to bf16 is below 0.1


class ServedSampler:
    """Implements `Sampler` with a server's own model, such as a teacher; `spec.batch_size` completions are requested at a time.

    Args:
        spec: Of the model, without its weights.
        model: Its name on the server.
    """

    def __init__(self, server: Server, model: str, spec: SamplerSpec) -> None:
        self.server = server
        self.model_name = model
        self.spec = spec
        self.allowed = spec.allowed

    def refresh(self) -> None: ...

    def sync_weights(self, on_main: OnMain = run_here) -> None: ...

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str, on_done: OnDone = unchanged) -> list[Rollout]:
        """Raises `EngineError` when the server refuses, is late, or does not return completions with finite log-probs."""
        options = sampling_options(decoding, self.spec.eos, self.allowed)

        def generate(request: Request) -> Rollout:
            ids, logp = self.complete(self.model_name, request.prompt.ids, options, request_seed(request, stream, self.spec.seed))
            return make_rollout(request, ids, logp, decoding, self.spec)

        pool, rollouts = ThreadPoolExecutor(self.spec.batch_size), list[Rollout]()
        try:
            for rollout in pool.map(generate, requests):
                signals.check()
                rollouts += on_done([rollout])
            return rollouts
        except BaseException:
            self.server.hang_up()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def complete(self, model: str, prompt: Sequence[int], options: dict[str, Any], seed: int) -> tuple[list[int], list[float]]:
        """Return the sampled ids of a completion and their log-probs."""
        body = {"model": model, "prompt": list(prompt), "seed": seed, "return_token_ids": True, **options}
        answer = self.server.post("/v1/completions", body)
        try:
            choice = answer["choices"][0]
            ids, logp = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if not all(isinstance(token, int) for token in ids) or not all(math.isfinite(value) for value in logp):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.server.error(f"its completion lacks token ids or log-probs: {short(json.dumps(answer).encode())}") from None
        return ids, logp


class VllmServerSampler(ServedSampler):
    """Implements `Sampler` with a vLLM server that gets the student's weights.

    Args:
        spec: The student. The main process sends its weights, in `sync_weights`, before any process asks for completions.
        bf16: Send weights in bf16, else in float32.
        url: The server's address.
        timeout: Seconds that the server may take to answer.
        weights_folder: Where the server reads weights from; None for a temporary folder.

    Raises:
        EngineError: The server does not answer, has an untested version, or returns log-probs of another distribution than it draws from.
    """

    def __init__(self, spec: SamplerSpec, bf16: bool, url: str, timeout: float = 600.0, weights_folder: str | None = None) -> None:
        super().__init__(Server(url, timeout, "sampling.vllm", f"{START}, with VLLM_SERVER_DEV_MODE=1"), "", spec)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        if weights_folder is None:
            weights_folder = tempfile.mkdtemp(prefix="opd-vllm-")
            weakref.finalize(self, shutil.rmtree, weights_folder, ignore_errors=True)
        self.folder = Path(weights_folder).expanduser().resolve()
        # The student's head may have rows for ids that the teacher does not have.
        head = spec.model.get_output_embeddings().weight.shape[0]
        if self.allowed is None and spec.vocabulary < head:
            self.allowed = list(range(spec.vocabulary))
        self.base_name = self.model_name = self.check_server(spec.longest)
        # A quantised base is not what the server has, and sharded weights cannot be compared with it.
        self.sends_adapters = room_for_adapters(spec.model) is not None and not spec.sharded and not is_quantized(spec.model)
        self.stale = True

    def check_server(self, longest: int) -> str:
        """Return the name of the served model. Raises `EngineError` for a server that cannot do what is needed."""
        answer = self.server.get("/version")
        if not (isinstance(answer, dict) and str(answer.get("version")).startswith(f"{TESTED}.")):
            raise self.server.error(f"this is not vLLM {TESTED}.x, which opd is tested with: {short(json.dumps(answer).encode())}")
        name, room = next(iter(served_models(self.server).items()))
        if room < longest:
            raise self.server.error(f"it takes {room} tokens, this run {longest}: start it with --max-model-len {longest}")
        self.server.get("/is_sleeping")  # there in developer mode only
        options = sampling_options(Decoding(2.0, PROBE_TOKENS, top_k=1), [])
        _, logp = self.complete(name, [0, 1, 2], options, 0)
        if not all(abs(value) < ZERO_TOLERANCE for value in logp):
            raise self.server.error(
                "its log-probs are not those of the distribution that it draws from (drawing from one token, they are "
                f"{logp[0]:.3f}, … and not 0): start it with --logprobs-mode processed_logprobs"
            )
        return name

    def refresh(self) -> None:
        """Note that the student's weights changed: `sync_weights` sends them, or the next `sample`."""
        self.stale = True

    def sync_weights(self, on_main: OnMain = run_here) -> None:
        """Write the weights to the folder and let the server load them: the adapters alone where it takes them.

        Raises `OutputError` where the folder is not writable, `EngineError` where the server does not load them.
        """
        if not self.stale:
            return
        if self.sends_adapters:
            self.sends_adapters = bool(on_main(self.send_adapters))
            self.model_name = NAME if self.sends_adapters else self.base_name
        if not self.sends_adapters:
            self.send_merged(on_main)
        self.stale = False

    def send_merged(self, on_main: OnMain) -> None:
        """Send all weights, with adapters merged. Collective where they are sharded."""
        file = self.folder / "tmp_model.safetensors"
        failure: OSError | None = None
        if self.spec.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                failure = error
        if self.spec.is_main or self.spec.sharded:
            writes = self.spec.is_main and failure is None
            failure = write_weights(self.spec.model, file if writes else None, self.dtype) or failure
        on_main(lambda: self.send(file, failure))

    def send_adapters(self) -> bool:
        """Let the server load the adapters; return whether it takes any. The first time its base model is compared with the student's.

        Raises `OutputError` where the folder is not writable, `EngineError` for another base model, or where it refuses later.
        """
        try:
            write_adapters(self.spec.model, self.folder)
        except OSError as error:
            raise self.unwritable(error) from error
        is_first = self.model_name != NAME
        try:
            body = {"lora_name": NAME, "lora_path": str(self.folder), "load_inplace": True}
            self.server.post("/v1/load_lora_adapter", body, is_json=False)
        except NoSuchAddress as error:
            if not is_first:
                raise
            log.warning("adapters are merged for the server, which takes none: %s", error)
            return False
        self.drop_cache()
        if is_first:
            self.check_base()
        return True

    def check_base(self) -> None:
        """Raise `EngineError` unless the server's model with the adapters has the student's log-probs."""
        prompt = [0, 1, 2]
        ids, logp = self.complete(NAME, prompt, sampling_options(Decoding(1.0, PROBE_TOKENS), [], self.allowed), 0)
        ids_T = torch.tensor([*prompt, *ids], device=self.spec.model.device)
        with torch.no_grad():
            hidden_TH = last_hidden(self.spec.model.base_model, ids_T[None])[0, len(prompt) - 1 : -1]
            logp_TV = output_head(self.spec.model, self.spec.vocabulary, masked=self.spec.masked).logits(hidden_TH).log_softmax(-1)
        expected = logp_TV.gather(-1, ids_T[len(prompt) :, None])[:, 0].cpu()
        gap = float((expected - torch.tensor(logp)).abs().mean())
        if not gap < BASE_TOLERANCE:  # also where it is not finite
            raise self.server.error(f"its log-probs are {gap:.2g} nats from the student's: start it with the model that model.path names")

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str, on_done: OnDone = unchanged) -> list[Rollout]:
        """Raises `EngineError` when the server refuses, is late, or does not return completions with finite log-probs."""
        if self.stale and self.spec.is_main:
            self.sync_weights()
        return super().sample(requests, decoding, stream, on_done)

    def send(self, file: Path, failure: OSError | None) -> None:
        """Let the server load the weights in `file` and drop cached keys and values of the old ones. `failure`: why there is no file."""
        try:
            if failure is not None:
                raise failure
            file.replace(self.folder / "model.safetensors")
        except OSError as error:
            raise self.unwritable(error) from error
        self.server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        self.drop_cache()

    def unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"sampling.vllm.weights_folder: {self.folder}: the weights could not be saved ({error}); name another folder")

    def drop_cache(self) -> None:
        """Drop cached keys and values of the weights before. Raises `EngineError` where the server keeps them."""
        answer = self.server.post("/reset_prefix_cache")
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise self.server.error(
                f"it did not drop the cache of the old weights ({short(json.dumps(answer).encode())}): do others use it?"
            )
