"""Sampling with vLLM in this process: continuous batching and a paged cache, on a copy of the student's weights.

vLLM rounds differently than the trainer and its samples may depend on the batch in the last digits of a log-prob; what it drew from is
`behaviour_logp`, and the objective's importance weight makes up for the difference (the metric `engine_gap` shows it).

It was run on a CPU only. On a GPU the same calls apply, and the engine sleeps outside of `sample` so that training has its memory.
"""

import copy
import logging
import math
import os
import random
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd import signals
from opd.data.order import derive_seed
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.errors import ConfigError, EngineError, Preempted
from opd.models.policy import free_memory
from opd.samplers.base import Decoding, Lead, by_itself
from opd.samplers.weights import checkpoint_weights

TESTED = "0.32"

# What vLLM reads from the environment on import; what the user has set stays.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, or the weights would have to be sent to another
    "VLLM_CONFIGURE_LOGGING": "0",  # its lines go where opd's go
    "VLLM_NO_USAGE_STATS": "1",
}

# What vLLM's refusals name, and what it is here.
OURS = {
    "gpu_memory_utilization": "sampling.memory_share",
    "max_model_len": "the longest prompt and the most new tokens",
}


class VllmSampler:
    """Implements `Sampler` with the vLLM engine of this process: there is one at a time, and a new sampler ends that of the one before.

    model: the student as it is trained; eos: ids that end a completion; vocabulary: the engine's model has these ids and no others;
    seed: the run's; bf16: compute in bf16. longest: tokens of prompt and completion together that must fit. batch_size: completions
    decoded side by side. memory_share: of the GPU's memory for the engine's weights and cache, or of a CPU's free memory for its cache.

    Raises `ConfigError` when vLLM is missing, has another version than was tested, or cannot run the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Sequence[int],
        vocabulary: int,
        seed: int,
        bf16: bool,
        *,
        longest: int,
        batch_size: int,
        memory_share: float,
    ) -> None:
        self.model = model
        self.eos = list(eos)
        self.vocabulary = vocabulary
        self.seed = seed
        self.sleeps = model.device.type == "cuda"
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        stop_engine()
        with apart(model.device), silenced():
            self.engine = start_engine(model, vocabulary, bf16, longest, batch_size, memory_share)
        running.append(weakref.finalize(self, shut_down, self.engine))
        self.asleep = False
        self.stale = True  # the engine was started without weights

    def refresh(self) -> None:
        """The student's weights changed: the next `sample` copies them."""
        self.stale = True

    def sync_weights(self, lead: Lead = by_itself) -> None:
        """Each process's engine takes them by itself; what is sharded is gathered for all of them, a tensor at a time."""
        if self.stale:
            with apart(self.model.device):
                self.wake()
                self.sleep()

    def sample(self, requests: Sequence[Request], decoding: Decoding, stream: str) -> list[Rollout]:
        """Raises `EngineError` when what comes back is not a completion of each request with finite log-probs."""
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        shared = {**sampling_options(decoding, self.eos), "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        options = [SamplingParams(**shared, seed=request_seed(request, stream, self.seed)) for request in requests]
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt.ids)) for request in requests]
        with apart(self.model.device):
            self.wake()
            outputs = self.write(prompts, options)
            self.sleep()
        return [self.to_rollout(request, output.outputs[0], decoding) for request, output in zip(requests, outputs, strict=True)]

    def write(self, prompts: Sequence[Any], options: Sequence[Any]) -> list[Any]:
        """As the engine's `generate`, but looks between its steps for signals; on `Preempted` nothing is left in the engine."""
        engine, written = self.engine.llm_engine, []
        names = self.engine.enqueue(prompts, options, use_tqdm=False)
        try:
            while engine.has_unfinished_requests():
                signals.check()
                written += [output for output in engine.step() if output.finished]
        except Preempted:
            engine.abort_request(names, internal=True)
            raise
        return sorted(written, key=lambda output: int(output.request_id))

    def to_rollout(self, request: Request, output: Any, decoding: Decoding) -> Rollout:
        ids = list(output.token_ids)
        logp = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
        return make_rollout(request, ids, logp, decoding, self.eos, self.vocabulary)

    def wake(self) -> None:
        """Memory back, and the student's weights if they changed. Keys and values of the old weights are of no use."""
        if self.asleep:
            self.engine.wake_up()
            self.asleep = False
        if self.stale:
            with silenced():
                weights = checkpoint_weights(self.model, self.vocabulary)
                self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if not self.engine.reset_prefix_cache():
                raise EngineError("vLLM did not drop the cache of the old weights")
            self.stale = False

    def sleep(self) -> None:
        """On a GPU: weights to the host's memory, the cache's memory given back."""
        if self.sleeps:
            self.engine.sleep(level=1)
            self.asleep = True


def check_installed() -> None:
    """Raises `ConfigError` unless vLLM is there in the version that was tested."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise ConfigError(
            "sampling.engine=vllm: the package vllm is not installed; scripts/environment_vllm makes an environment with it"
        ) from None
    check_version(found)


def check_version(found: str) -> None:
    if not found.startswith(f"{TESTED}."):
        raise ConfigError(
            f"sampling.engine=vllm: this is vLLM {found}; opd is tested with {TESTED}.x: scripts/environment_vllm installs it"
        )


def start_engine(model: PreTrainedModel, vocabulary: int, bf16: bool, longest: int, batch_size: int, memory_share: float) -> Any:
    """A vLLM engine for the model's architecture, with weights of no meaning, that has written a token.

    Raises `ConfigError` when vLLM refuses: some shapes it refuses only then.
    """
    on_cpu = model.device.type == "cpu"
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.get_text_config().vocab_size = vocabulary
    room: dict[str, float]
    if on_cpu:
        room = {"kv_cache_memory_bytes": min(cache_bytes(model, bf16, longest, batch_size), int(memory_share * free_memory(model.device)))}
    else:
        room = {"gpu_memory_utilization": memory_share}
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
        from vllm.platforms import current_platform

        if current_platform.is_cpu() != on_cpu:
            raise ConfigError(f"device={model.device.type}: this vLLM is built for {current_platform.device_type}")
        with tempfile.TemporaryDirectory(prefix="opd-vllm-") as folder:
            config.save_pretrained(folder)
            engine = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                dtype="bfloat16" if bf16 else "float32",
                max_model_len=longest,
                max_num_seqs=batch_size,
                enforce_eager=on_cpu,
                enable_sleep_mode=not on_cpu,
                seed=0,
                disable_log_stats=True,
                # In the process group of the run, as one of several engines that know nothing of each other.
                distributed_executor_backend="external_launcher" if one_of_several() else None,
                **room,
            )
        engine.generate(TokensPrompt(prompt_token_ids=[0]), SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return engine
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        why = " ".join(str(error).split())[:400] or type(error).__name__
        ours = "".join(f" ({name} is {meaning})" for name, meaning in OURS.items() if name in why)
        raise ConfigError(
            f"sampling.engine=vllm cannot run {type(model).__name__}: {why}{ours}; sampling.engine=generate runs every model"
        ) from error


def cache_bytes(model: PreTrainedModel, bf16: bool, longest: int, batch_size: int) -> int:
    """Keys and values of `batch_size` sequences of `longest` tokens, and two blocks of 128 tokens more for each."""
    values = model.config.get_text_config().to_dict()
    heads = values.get("num_key_value_heads") or values["num_attention_heads"]
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    per_token = 2 * values["num_hidden_layers"] * heads * width * (2 if bf16 else 4)
    return int(per_token * (longest + 256) * (batch_size + 1))


# How to end the engine of this process, if it has one: two would share what vLLM keeps for the process, and end together.
running: list[Callable[[], object]] = []


def stop_engine() -> None:
    while running:
        running.pop()()


def shut_down(engine: Any) -> None:
    """Frees the engine's memory and the process groups that it made, which the next engine of this process would stumble over."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory, destroy_model_parallel

    core = engine.llm_engine.engine_core
    if one_of_several():  # its own way, also when it is collected, would end the group of them all, which is the run's
        core._finalizer.detach()
        core.engine_core.model_executor.shutdown()
        destroy_model_parallel()
    else:
        core.shutdown()
        cleanup_dist_env_and_memory()


def one_of_several() -> bool:
    """Whether this process is one of several of a run: each has an engine of its own."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@contextmanager
def silenced() -> Iterator[None]:
    """No advice to whoever runs a server, in the log or, from compiled code, on stderr. All of it with VLLM_LOGGING_LEVEL set."""
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    level = logging.root.manager.disable
    sys.stderr.flush()
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
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
def apart(device: torch.device) -> Iterator[None]:
    """What happens inside leaves the process's random numbers and torch's switches as they were: vLLM seeds and sets them for itself."""
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


def sampling_options(decoding: Decoding, eos: Sequence[int]) -> dict[str, Any]:
    """The decoding in vLLM's words; all that it could add is neutral or off."""
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
        "logprobs": 0,  # the drawn token's alone
    }


def make_rollout(
    request: Request, ids: Sequence[int], logp: Sequence[float], decoding: Decoding, eos: Sequence[int], vocabulary: int
) -> Rollout:
    """What an engine wrote, as a rollout. Raises `EngineError` for what no engine can have written by these rules."""
    ends = [position for position, token in enumerate(ids) if token in eos]
    whole = len(ids) == decoding.max_new_tokens if not ends else ends == [len(ids) - 1] and len(ids) <= decoding.max_new_tokens
    if not whole:
        raise EngineError(
            f"vLLM broke off: {len(ids)} tokens of at most {decoding.max_new_tokens}, end-of-sequence at {ends or 'none'}; see its log"
        )
    if len(logp) != len(ids) or not all(math.isfinite(value) and value < 1e-3 for value in logp):
        raise EngineError(f"vLLM gave log-probs that are not any: {list(logp)[:5]} for {len(ids)} tokens; see its log")
    if not all(0 <= token < vocabulary for token in ids):
        raise EngineError(f"vLLM drew id {max(ids)}, beyond the {vocabulary} ids that student and teacher share")
    certain = decoding.temperature == 0
    behaviour_logp: Tensor = torch.zeros(len(ids)) if certain else torch.tensor(list(logp), dtype=torch.float32)
    return Rollout(request, tuple(ids), behaviour_logp, FinishReason.stop if ends else FinishReason.length)
