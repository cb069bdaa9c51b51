"""The configured sampler on a model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from opd.config.schema import Config, Engine
from opd.data.prompts import Prompt
from opd.samplers.base import Sampler
from opd.samplers.generate import GenerateSampler
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_server import VllmServerSampler


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and why it was chosen; "" where the config left no choice.

    twin: it samples with a bf16 copy of the weights. static: `generate` has a cache of one size.
    """

    engine: Engine
    twin: bool
    static: bool = False
    why: str = ""

    def __str__(self) -> str:
        cache = " and a static cache" if self.static else ""
        return f"{self.engine.value} with {'a bf16 copy' if self.twin else 'the weights as they are'}{cache}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"engine": self.engine.value}

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> "Choice":
        return Choice(**{**stored, "engine": Engine(stored["engine"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What samplers are made from. eos, vocabulary, bf16: as in `GenerateSampler`. longest: tokens of prompt and completion together.

    leads: whether this process hands weights to a server that several of them ask. sharded: the weights will be.
    """

    config: Config
    model: PreTrainedModel
    eos: Sequence[int]
    pad_id: int
    vocabulary: int
    bf16: bool
    longest: int
    leads: bool = True
    sharded: bool = False


def make_sampler(choice: Choice, material: Material) -> Sampler:
    """Raises `ConfigError` where the engine is missing or cannot run the model, `EngineError` where a server does not answer."""
    return SAMPLERS[choice.engine](material, choice)


def generate(material: Material, choice: Choice) -> Sampler:
    return GenerateSampler(
        material.model,
        material.eos,
        material.pad_id,
        material.vocabulary,
        material.config.seed,
        material.bf16,
        twin=choice.twin,
        static=choice.static,
    )


def vllm(material: Material, choice: Choice) -> Sampler:
    """vLLM in this process or, with `sampling.vllm.url`, the server there. bf16 like the trainer, or where a bf16 copy is asked for."""
    config, options = material.config, material.config.sampling.vllm
    shared = (material.model, material.eos, material.vocabulary, config.seed, material.bf16 or choice.twin)
    if options.url is None:
        batch_size, share = config.sampling.batch_size, config.sampling.memory_share
        return VllmSampler(*shared, longest=material.longest, batch_size=batch_size, memory_share=share)
    return VllmServerSampler(
        *shared,
        url=options.url,
        longest=material.longest,
        connections=config.sampling.batch_size,
        timeout=options.timeout,
        weights_folder=options.weights_folder,
        leads=material.leads,
        sharded=material.sharded,
    )


SAMPLERS: dict[Engine, Callable[[Material, Choice], Sampler]] = {
    Engine.generate: generate,
    Engine.vllm: vllm,
}


def longest(config: Config, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt and the longest completion that may be asked for."""
    new_tokens = max(config.sampling.max_new_tokens, config.eval.max_new_tokens, config.eval.kl_max_new_tokens)
    return max(len(prompt.ids) for prompt in prompts) + new_tokens
