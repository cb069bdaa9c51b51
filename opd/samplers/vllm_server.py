"""Sampling with a vLLM server: the student's weights go to it through a folder, prompts and completions as token ids.

The server is started by the user, with the student that the run begins with:

    VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --host 127.0.0.1 --port 8000 --dtype float32 --max-model-len 1024 \
        --logprobs-mode processed_logprobs

The developer mode opens the addresses through which weights are exchanged. They are open to whoever reaches the port: keep it local.
"""

import http.client
import json
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedModel

from opd import signals
from opd.data.rollouts import Request, Rollout
from opd.errors import EngineError, OutputError
from opd.samplers.base import Decoding, Lead, by_itself
from opd.samplers.vllm import TESTED, make_rollout, request_seed, sampling_options
from opd.samplers.weights import write_weights

START = "start it as README.md says under Sampling engines"
CERTAIN = 1e-4  # what a log-prob of 0 may be off by
PROBE_TOKENS = 8


class Server:
    """JSON in, JSON out. Everything that can go wrong on the way is an `EngineError` of one line."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        self.name = f"sampling.vllm.url={url}"
        self.address = parts.netloc
        self.connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.timeout = timeout

    def get(self, path: str) -> Any:
        return self.ask("GET", path, None)

    def post(self, path: str, body: object = None) -> Any:
        return self.ask("POST", path, json.dumps(body).encode())

    def ask(self, method: str, path: str, body: bytes | None) -> Any:
        connection = self.connect(self.address, timeout=self.timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except TimeoutError:
            raise self.error(f"no answer to {path} within {self.timeout:g} s; see its log, or raise sampling.vllm.timeout") from None
        except (OSError, http.client.HTTPException) as error:
            raise self.error(f"no answer to {path} ({error or type(error).__name__}): is it running? {START}") from None
        finally:
            connection.close()
        if status == 404:
            raise self.error(f"it has no {path}: {START}, with VLLM_SERVER_DEV_MODE=1")
        if status != 200:
            raise self.error(f"it refuses {path} ({status}): {short(answer)}; see its log")
        try:
            return json.loads(answer) if answer else None
        except ValueError:
            raise self.error(f"its answer to {path} is not JSON: {short(answer)}") from None

    def error(self, what: str) -> EngineError:
        return EngineError(f"{self.name}: {what}")


def short(answer: bytes) -> str:
    return " ".join(answer.decode(errors="replace").split())[:200] or "nothing"


def made(folder: Path) -> OSError | None:
    """Make a folder, unless it is there. Returns what kept it from being made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error
    return None


class VllmServerSampler:
    """Implements `Sampler` with a vLLM server.

    model, eos, vocabulary, seed, bf16: as in `VllmSampler`. longest: tokens of prompt and completion that the server has to take.
    connections: completions asked for at a time. weights_folder: where the server reads weights from; a temporary folder for None.
    leads: whether this process sends the weights; of several that ask one server, one does, in `hand_over`, before any of them asks.
    sharded: the weights will be, and all processes put them together for the one.

    Raises `EngineError` when the server does not answer, has another version than was tested, or returns other log-probs than those of the
    distribution that it draws from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Sequence[int],
        vocabulary: int,
        seed: int,
        bf16: bool,
        *,
        url: str,
        longest: int,
        connections: int,
        timeout: float,
        weights_folder: str | None,
        leads: bool = True,
        sharded: bool = False,
    ) -> None:
        self.model = model
        self.eos = list(eos)
        self.vocabulary = vocabulary
        self.seed = seed
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.connections = connections
        self.server = Server(url, timeout)
        if weights_folder is None:
            weights_folder = tempfile.mkdtemp(prefix="opd-vllm-")
            weakref.finalize(self, shutil.rmtree, weights_folder, ignore_errors=True)
        self.folder = Path(weights_folder).expanduser().resolve()
        # Where the student's head is wider than the ids that the teacher has, the server must be told.
        head = model.get_output_embeddings().weight.shape[0]
        self.restriction = {"allowed_token_ids": list(range(vocabulary))} if vocabulary < head else {}
        self.model_name = self.check_server(longest)
        self.leads = leads
        self.sharded = sharded
        self.stale = True

    def check_server(self, longest: int) -> str:
        """The name of the model it serves. Raises `EngineError` for a server that does not do what is needed."""
        found = self.server.get("/version")
        if not (isinstance(found, dict) and str(found.get("version")).startswith(f"{TESTED}.")):
            raise self.server.error(f"this is not vLLM {TESTED}.x, which opd is tested with: {short(json.dumps(found).encode())}")
        models = self.server.get("/v1/models")
        try:
            name, room = str(models["data"][0]["id"]), int(models["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self.server.error(f"it tells no model that it serves: {short(json.dumps(models).encode())}") from None
        if room < longest:
            raise self.server.error(f"it takes {room} tokens, this run {longest}: start it with --max-model-len {longest}")
        self.server.get("/is_sleeping")  # there in developer mode only
        options = sampling_options(Decoding(2.0, PROBE_TOKENS, top_k=1), [])
        _, logp = self.complete(name, [0, 1, 2], options, 0)
        if not all(abs(value) < CERTAIN for value in logp):
            raise self.server.error(
                "its log-probs are not those of the distribution that it draws from (drawing from one token, they are "
                f"{logp[0]:.3f}, … and not 0): start it with --logprobs-mode processed_logprobs"
            )
        return name

    def refresh(self) -> None:
        """The student's weights changed: the next `hand_over` sends them, or the next `sample` where there was none."""
        self.stale = True

    def sync_weights(self, lead: Lead = by_itself) -> None:
        """Write the weights where the server finds them, a tensor at a time, and let it take them up.

        Raises `OutputError` where they cannot be written, `EngineError` where the server does not take them.
        """
        if not self.stale:
            return
        file = self.folder / "tmp_model.safetensors"
        failure = made(self.folder) if self.leads else None
        if self.leads or self.sharded:
            unwritten = write_weights(self.model, file if self.leads and failure is None else None, self.dtype)
            failure = failure or unwritten
        lead(lambda: self.send(file, failure))
        self.stale = False

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """Raises `EngineError` when the server refuses, is late, or answers what is not a completion with finite log-probs."""
        if self.stale and self.leads:
            self.sync_weights()
        options = {**sampling_options(decoding, self.eos), **self.restriction}

        def write(request: Request) -> Rollout:
            ids, logp = self.complete(self.model_name, request.prompt.ids, options, request_seed(request, stream, self.seed))
            return make_rollout(request, ids, logp, decoding, self.eos, self.vocabulary)

        pool, rollouts = ThreadPoolExecutor(self.connections), []
        try:
            for rollout in pool.map(write, requests):
                signals.check()
                rollouts.append(rollout)
            return rollouts
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def complete(self, model: str, prompt: Sequence[int], options: dict[str, Any], seed: int) -> tuple[list[int], list[float]]:
        """The ids of a completion, as they were drawn, and their log-probs."""
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

    def send(self, file: Path, failure: OSError | None) -> None:
        """Let the server read the weights in `file` and forget the keys and values of the old ones. failure: why they are not there."""
        try:
            if failure is not None:
                raise failure
            file.replace(self.folder / "model.safetensors")
        except OSError as error:
            raise OutputError(
                f"sampling.vllm.weights_folder: {self.folder}: the weights could not be written ({error}); name another folder"
            ) from error
        self.server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        answer = self.server.post("/reset_prefix_cache")
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise self.server.error(
                f"it did not drop the cache of the old weights ({short(json.dumps(answer).encode())}): do others use it?"
            )
