"""Sampling with vLLM in this process: continuous batching and a paged cache, on a copy of the student's weights.

vLLM rounds differently from the trainer, and the last digits of its log-probs may depend on the batch. `behaviour_logp` holds what it drew
from, the metric `engine_gap` shows the difference, and the importance weight corrects it.

It has run on a CPU only. On a GPU the same calls apply, and the engine sleeps outside of `sample` so that training has its memory.
"""

import logging
import math
import os
import random
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from opd import signals
from opd.data.order import derive_seed
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.errors import ConfigError, EngineError, Preempted
from opd.models.device import free_memory
from opd.samplers.adapter_sync import NAME, room_for_adapters, write_adapters
from opd.samplers.base import Decoding, OnDone, OnMain, SamplerSpec, run_here, unchanged
from opd.samplers.weights import checkpoint_weights, plain_config

log = logging.getLogger(__name__)

TESTED = "0.32"

# vLLM reads these on import; values that the user has set stay.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, or weights would have to be sent to another
    "VLLM_CONFIGURE_LOGGING": "0",  # log through opd's handlers
    "VLLM_NO_USAGE_STATS": "1",
}

# Options that vLLM's errors name, and what they are called here.
OPTION_NAMES = {
    "gpu_memory_utilization": "sampling.memory_share",
    "max_model_len": "the longest prompt and the most new tokens",
}


class VllmSampler:
    """Implements `Sampler` with the vLLM engine of this process: there is one at a time, and a new sampler ends the previous one's.

    Args:
        spec: The student. The engine's model has the ids below `spec.vocabulary` and no others.
        bf16: Compute in bf16.
        memory_share: Share of the GPU's memory for the engine's weights and cache, or of a CPU's free memory for its cache.

    Raises:
        ConfigError: vLLM is missing, has an untested version, or cannot run the model.
    """

    def __init__(self, spec: SamplerSpec, bf16: bool, memory_share: float) -> None:
        self.spec = spec
        self.device = spec.model.device
        self.sleeps = self.device.type == "cuda"
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        while running:
            running.pop()()
        self.rank = None if spec.sharded else room_for_adapters(spec.model)
        self.engine = self.start(bf16, memory_share)
        self.folder = Path(tempfile.mkdtemp(prefix="opd-vllm-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        running.append(weakref.finalize(self, shut_down, self.engine))
        self.asleep = False
        self.stale = True  # the engine was started with dummy weights, or without adapters

    def start(self, bf16: bool, memory_share: float) -> Any:
        """Return the engine, without adapters where vLLM refuses them."""
        while True:
            try:
                with isolated(self.device), silenced():
                    return start_engine(self.spec, bf16, memory_share, self.rank)
            except ConfigError as error:
                if self.rank is None:
                    raise
                log.warning("adapters are merged for vLLM: %s", str(error).partition(";")[0])
                self.rank = None

    def refresh(self) -> None:
        """Note that the student's weights changed: the next `sample` copies them."""
        self.stale = True

    def sync_weights(self, on_main: OnMain = run_here) -> None:
        """Copy changed weights into this process's engine; sharded ones are gathered a tensor at a time."""
        if self.stale:
            with isolated(self.device):
                self.wake()
                self.sleep()

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str, on_done: OnDone = unchanged) -> list[Rollout]:
        """Raises `EngineError` unless the engine returns a completion with finite log-probs for each request."""
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        shared = {
            **sampling_options(decoding, self.spec.eos, self.spec.allowed),
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        options = [SamplingParams(**shared, seed=request_seed(request, stream, self.spec.seed)) for request in requests]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt.ids)) for request in requests]
        with isolated(self.device):
            self.wake()
            outputs = self.generate(prompts, options)
            self.sleep()
        rollouts = []
        for request, output in zip(requests, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            logp = [step[token].logprob for token, step in zip(ids, output.outputs[0].logprobs, strict=True)]
            rollouts.append(make_rollout(request, ids, logp, decoding, self.spec))
        return list(on_done(rollouts))

    def generate(self, prompts: Sequence[Any], options: Sequence[Any]) -> list[Any]:
        """Do what the engine's `generate` does, but check for signals between its steps; `Preempted` empties the engine."""
        engine, outputs = self.engine.llm_engine, []
        names = self.engine.enqueue(prompts, options, lora_request=self.adapter(), use_tqdm=False)
        try:
            while engine.has_unfinished_requests():
                signals.check()
                outputs += [output for output in engine.step() if output.finished]
        except Preempted:
            engine.abort_request(names, internal=True)
            raise
        return sorted(outputs, key=lambda output: int(output.request_id))

    def wake(self) -> None:
        """Take the memory back, and the student's weights if they changed: cached keys and values of the old ones are then dropped."""
        if self.asleep:
            self.engine.wake_up()
            self.asleep = False
        if self.stale:
            with silenced():
                if self.rank is None:
                    weights = checkpoint_weights(self.spec.model, self.spec.vocabulary)
                    self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
                else:
                    write_adapters(self.spec.model, self.folder)
                    self.engine.llm_engine.add_lora(self.adapter(load_inplace=True))
            if not self.engine.reset_prefix_cache():
                raise EngineError("sampling.engine=vllm: vLLM did not drop the cache of the old weights; use sampling.engine=generate")
            self.stale = False

    def adapter(self, **options: bool) -> Any:
        """Return vLLM's name for the student's adapters; None where they are merged."""
        if self.rank is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(NAME, 1, str(self.folder), **options)

    def sleep(self) -> None:
        """On a GPU: move the weights to main memory and free the cache."""
        if self.sleeps:
            self.engine.sleep(level=1)
            self.asleep = True


def check_installed() -> None:
    """Raise `ConfigError` unless the tested version of vLLM is installed."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        raise ConfigError(
            "sampling.engine=vllm: the package vllm is not installed; scripts/environment_vllm makes an environment with it"
        ) from None
    if not installed.startswith(f"{TESTED}."):
        raise ConfigError(
            f"sampling.engine=vllm: this is vLLM {installed}; opd is tested with {TESTED}.x: scripts/environment_vllm installs it"
        )


def start_engine(spec: SamplerSpec, bf16: bool, memory_share: float, rank: int | None = None) -> Any:
    """Return a vLLM engine for the model's architecture that has generated a token, with dummy weights.

    With room for adapters of `rank` it has the base model's weights: vLLM cannot exchange them if it has adapters, and they do not change.

    Raises `ConfigError` when vLLM refuses: some shapes it refuses only when it generates.
    """
    model = spec.model
    on_cpu = model.device.type == "cpu"
    config = plain_config(model)
    config.architectures = [type(model).__name__]
    config.get_text_config().vocab_size = spec.vocabulary
    room: dict[str, float] = {"gpu_memory_utilization": memory_share}
    if on_cpu:
        room = {"kv_cache_memory_bytes": min(cache_bytes(spec, bf16), int(memory_share * free_memory(model.device)))}
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
        from vllm.platforms import current_platform

        if current_platform.is_cpu() != on_cpu:
            raise ConfigError(f"device={model.device.type}: this vLLM is built for {current_platform.device_type}")
        with tempfile.TemporaryDirectory(prefix="opd-vllm-") as folder:
            config.save_pretrained(folder)
            adapters: dict[str, Any] = {}
            if rank is not None:
                adapters = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
                base = checkpoint_weights(model, spec.vocabulary, merged=False)
                dtype = torch.bfloat16 if bf16 else torch.float32
                weights = {name: value.to("cpu", dtype, copy=True).contiguous() for name, value in base}
                save_file(weights, Path(folder) / "model.safetensors")
            engine = LLM(
                model=folder,
                load_format="dummy" if rank is None else "auto",
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                dtype="bfloat16" if bf16 else "float32",
                max_model_len=spec.longest,
                max_num_seqs=spec.batch_size,
                enforce_eager=on_cpu,
                enable_sleep_mode=not on_cpu,
                seed=0,
                disable_log_stats=True,
                # One engine per process, inside the run's process group.
                distributed_executor_backend="external_launcher" if has_peers() else None,
                **room,
                **adapters,
            )
        engine.generate(TokensPrompt(prompt_token_ids=[0]), SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return engine
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:400] or type(error).__name__
        names = "".join(f" ({name} is {meaning})" for name, meaning in OPTION_NAMES.items() if name in why)
        raise ConfigError(
            f"sampling.engine=vllm cannot run {type(model).__name__}: {why}{names}; sampling.engine=generate runs every model"
        ) from error


def cache_bytes(spec: SamplerSpec, bf16: bool) -> int:
    """Return the bytes of keys and values of a batch of the longest sequences, and two blocks of 128 tokens more for each."""
    values = spec.model.config.get_text_config().to_dict()
    heads = values.get("num_key_value_heads") or values["num_attention_heads"]
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    per_token = 2 * values["num_hidden_layers"] * heads * width * (2 if bf16 else 4)
    return int(per_token * (spec.longest + 256) * (spec.batch_size + 1))


# Ends the engine of this process, if it has one: two would share vLLM's process-wide state and end together.
running: list[Callable[[], object]] = []


def shut_down(engine: Any) -> None:
    """Free the engine's memory and its process groups, which would make the next engine of this process fail."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory, destroy_model_parallel

    core = engine.llm_engine.engine_core
    if has_peers():  # vLLM's own shutdown would end the run's process group
        core._finalizer.detach()
        core.engine_core.model_executor.shutdown()
        destroy_model_parallel()
    else:
        core.shutdown()
        cleanup_dist_env_and_memory()


def has_peers() -> bool:
    """Return whether the run has several processes, each with an engine."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress vLLM's log lines and what its compiled code prints to stderr, unless VLLM_LOGGING_LEVEL is set."""
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    level = logging.root.manager.disable
    sys.stderr.flush()
    stderr = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Restore the process's random numbers and torch's settings after the block: vLLM seeds and sets them for itself."""
    python, numpy = random.getstate(), np.random.get_state()
    threads, set_num_threads, default_dtype = torch.get_num_threads(), torch.set_num_threads, torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it with a function that only warns
        torch.set_num_threads(threads)
        torch.set_default_dtype(default_dtype)


def request_seed(request: Request, stream: str, seed: int) -> int:
    return derive_seed(stream, seed, request.epoch, request.prompt.sample_id, request.attempt)


def sampling_options(decoding: Decoding, eos: Sequence[int], allowed: list[int] | None = None) -> dict[str, Any]:
    """Return the decoding as vLLM's sampling parameters; everything it could add is neutral or off.

    Args:
        allowed: Ids that may be drawn; None for all. vLLM sets the logits of the others to -inf before anything else.
    """
    return {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": decoding.max_new_tokens,
        "stop_token_ids": list(eos),
        "ignore_eos": True,  # the ids above are all that end a completion
        "logprobs": 0,  # of the drawn token only
        **({} if allowed is None else {"allowed_token_ids": allowed}),
    }


def make_rollout(request: Request, ids: Sequence[int], logp: Sequence[float], decoding: Decoding, spec: SamplerSpec) -> Rollout:
    """Return an engine's completion as a rollout. Raises `EngineError` for one that the request does not allow."""
    ends = [position for position, token in enumerate(ids) if token in spec.eos]
    complete = len(ids) == decoding.max_new_tokens if not ends else ends == [len(ids) - 1] and len(ids) <= decoding.max_new_tokens
    if not complete:
        raise EngineError(
            f"vLLM returned part of a completion: {len(ids)} tokens of at most {decoding.max_new_tokens}, end-of-sequence at "
            f"{ends or 'none'}; see its log"
        )
    if len(logp) != len(ids) or not all(math.isfinite(value) and value < 1e-3 for value in logp):
        raise EngineError(f"vLLM returned invalid log-probs: {list(logp)[:5]} for {len(ids)} tokens; see its log")
    if not all(0 <= token < spec.vocabulary for token in ids):
        raise EngineError(f"vLLM drew id {max(ids)}, beyond the {spec.vocabulary} ids that student and teacher share")
    if spec.masked is not None and (drawn := set(ids).intersection(spec.masked.tolist())):
        raise EngineError(f"vLLM drew id {min(drawn)}, which is not a token of both student and teacher; see its log")
    greedy = decoding.temperature == 0
    behaviour_logp: Tensor = torch.zeros(len(ids)) if greedy else torch.tensor(list(logp), dtype=torch.float32)
    return Rollout(request, tuple(ids), behaviour_logp, FinishReason.stop if ends else FinishReason.length)
