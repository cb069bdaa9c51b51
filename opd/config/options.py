"""The options of each group: their defaults, choices and bounds, and the checks within a group.

`schema.Config` has the groups, and `rules` what involves several of them. The defaults are a starting point for distilling
Qwen2.5-1.5B-Instruct into Qwen2.5-0.5B-Instruct on GSM8K; `conf/` has the same values as commented YAML. The dataclasses are not frozen
because Hydra merges overrides into them.
"""

import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from opd.config.section import Section, bounded
from opd.config.several import Renaming, overlay
from opd.config.templates import require_template

SERVER = re.compile(r"https?://[^/\s]+/?")

Device = StrEnum("Device", "auto cpu cuda")
Control = StrEnum("Control", "none constant shuffled self")

Dtype = StrEnum("Dtype", "auto float32 bfloat16")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
Quantization = StrEnum("Quantization", "none int8 nf4")


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section, prefix="model."):
    path: str = "Qwen/Qwen2.5-0.5B-Instruct"
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Dtype = Dtype.auto
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    quantization: Quantization = Quantization.none

    def __post_init__(self) -> None:
        self.require("path", bool(self.path.strip()), "must be a hub id or a local folder")
        self.require("adapter", self.adapter is None or bool(self.adapter.strip()), "must be the folder of an adapter, or null")
        if self.gguf_file is not None:
            why = f"does not work with {self.PREFIX}gguf_file, which is dequantized on loading"
            self.require_value("quantization", Quantization.none, why)
        remedy = f"runs code from the model repository: pin the commit with {self.PREFIX}revision=COMMIT"
        self.require("trust_remote_code", not self.trust_remote_code or self.revision is not None, remedy)


# Whose weights: of the model at teacher.path; the student's at the start of the run; its present ones; a moving average of them.
TeacherWeights = StrEnum("TeacherWeights", "own base current ema")
TokenAlignment = StrEnum("TokenAlignment", "ids spans")
Placement = StrEnum("Placement", "same device sharded offload")


@dataclass(kw_only=True, slots=True)
class TeacherConfig(ModelConfig, prefix="teacher."):
    path: str = "Qwen/Qwen2.5-1.5B-Instruct"
    weights: TeacherWeights = TeacherWeights.own
    ema: float = bounded(0.99, above=0, below=1, hint="0.99 averages about the last 100 steps")
    url: Any = None
    timeout: float = bounded(600.0, above=0, hint="seconds")
    canary_every: int = bounded(10, at_least=0, hint="steps; 0: only before each checkpoint")
    alignment: TokenAlignment = TokenAlignment.ids
    system: str | None = None
    prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    contrast: str | None = None
    placement: Placement = Placement.same
    device: str | None = None

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        has_device = self.placement is not Placement.device or self.device is not None
        self.require("device", has_device, "teacher.placement=device needs one, for example teacher.device=cuda:1")
        known = self.device is None or re.fullmatch(r"cpu|cuda:\d+", self.device) is not None
        self.require("device", known, "must be cpu or a GPU with its number, for example cuda:1")
        whole = self.placement in (Placement.same, Placement.device) or self.quantization is Quantization.none
        self.require("quantization", whole, f"does not work with teacher.placement={self.placement.value}: set teacher.placement=same")
        if self.url is not None:
            known = bool(self.urls) and all(isinstance(url, str) and SERVER.fullmatch(url) for url in self.urls)
            self.require("url", known, "must be a server such as http://127.0.0.1:8000, a list of servers, or null for a local teacher")
            here = self.placement is Placement.same and self.quantization is Quantization.none
            self.require("url", here, "the server has the weights: set teacher.placement=same teacher.quantization=none")
            self.require_value("adapter", None, "the server has the weights")
        for option in ("prompt", "contrast"):
            require_template(self, option)
        self.require("contrast", self.contrast is None or self.contrast != self.prompt, "must be another text than teacher.prompt, or null")

    @property
    def has_own_tokens(self) -> bool:
        """Whether the teacher reads texts in tokens of its own."""
        return self.alignment is TokenAlignment.spans

    @property
    def has_own_view(self) -> bool:
        """Whether the teacher reads another chat than the student."""
        return self.system is not None or self.prompt is not None or bool(self.chat_template_kwargs)

    @property
    def urls(self) -> list[str]:
        """The servers, none for a local teacher."""
        return [] if self.url is None else [self.url] if isinstance(self.url, str) else list(self.url)


@dataclass(kw_only=True, slots=True)
class LoraConfig(Section, prefix="lora."):
    rank: int = bounded(0, at_least=0, hint="0 trains all weights, 16 is usual for adapters")
    alpha: int = bounded(32, at_least=1)
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        self.require("targets", bool(self.targets), "must name layers, for example [q_proj,v_proj], or [all-linear]")


Source = StrEnum("Source", "arithmetic gym hub jsonl parquet python")


@dataclass(kw_only=True, slots=True)
class DataConfig(Section, prefix="data."):
    source: Source = Source.hub
    path: str | None = "openai/gsm8k"
    subset: str | None = "main"
    train_split: str = "train"
    eval_split: str = "test"
    train_path: str | None = None
    eval_path: str | None = None
    prompt: str = "question"
    answer: str | None = "answer"
    completion: str | None = None
    answer_after: str | None = "####"
    system: str | None = None
    max_prompt_tokens: int = bounded(512, at_least=1)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    size: int | None = bounded(None, at_least=2)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    mix: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = all(re.fullmatch(r"[\w-]+", label) for label in self.mix)
        self.require("mix", named, "its labels name datasets; use letters, digits, _ and - only")
        for option in ("prompt", "system"):
            require_template(self, option)
        if self.mix:
            return  # `Config.parts` checks the datasets
        name = self.source.value
        if self.source in (Source.jsonl, Source.parquet):
            self.require("train_path", self.train_path is not None, f"data={name} needs data.train_path=FILE.{name}")
        if self.source is Source.hub:
            self.require("path", bool(self.path), "data=hub needs data.path=OWNER/DATASET")
        if self.source is Source.gym:
            self.require("path", self.path is not None, "data=gym needs data.path=TASK, for example data.path=chain_sum")

    @property
    def evaluated(self) -> str:
        """What evaluation prompts are read from, for titles."""
        files = self.eval_path or self.train_path
        name = files if self.source in (Source.jsonl, Source.parquet) else self.path if self.source in (Source.hub, Source.gym) else None
        return ", ".join(self.mix) or name or self.source.value

    @property
    def datasets(self) -> dict[str, "DatasetConfig"]:
        """The options of each dataset of `mix`, by label, in alphabetical order."""
        own = {item.name: getattr(self, item.name) for item in fields(DataConfig) if item.name != "mix"}
        datasets = {}
        for label in sorted(self.mix):
            with naming_dataset(label):
                datasets[label] = overlay(DatasetConfig, own, self.mix[label], f"data.mix.{label}", DATASET_OPTIONS)
        return datasets


@dataclass(kw_only=True, slots=True)
class DatasetConfig(DataConfig):
    """One dataset of `data.mix`."""

    weight: float = bounded(1.0, above=0, hint="relative to the other datasets")
    loss_weight: float = bounded(1.0, above=0, hint="relative to the other datasets")


DATASET_OPTIONS: dict[str, Any] = {item.name: item.type for item in fields(DatasetConfig) if item.name != "mix"}
TEACHER_OPTIONS: dict[str, Any] = {item.name: item.type for item in fields(TeacherConfig)}


def naming_dataset(label: str) -> Renaming:
    """Name options `data.mix.LABEL.path`, not `data.path`; for an empty label change nothing."""
    return Renaming("data.", f"data.mix.{label}." if label else "data.", DATASET_OPTIONS)


def naming_teacher(label: str) -> Renaming:
    """Name options `teachers.LABEL.path`, not `teacher.path`; for an empty label change nothing."""
    return Renaming("teacher.", f"teachers.{label}." if label else "teacher.", TEACHER_OPTIONS)


@dataclass(kw_only=True, slots=True)
class VllmConfig(Section, prefix="sampling.vllm."):
    url: str | None = None
    weights_folder: str | None = None
    timeout: float = bounded(600.0, above=0, hint="seconds")

    def __post_init__(self) -> None:
        known = self.url is None or SERVER.fullmatch(self.url) is not None
        self.require("url", known, "must be a server such as http://127.0.0.1:8000, or null for an engine in this process")


Engine = StrEnum("Engine", "auto generate vllm")
SamplingDtype = StrEnum("SamplingDtype", "auto trainer bfloat16")
Truncated = StrEnum("Truncated", "keep mask drop")
GuardAction = StrEnum("GuardAction", "none warn stop")


@dataclass(kw_only=True, slots=True)
class SamplingConfig(Section, prefix="sampling."):
    engine: Engine = Engine.auto
    dtype: SamplingDtype = SamplingDtype.auto
    temperature: float = bounded(0.7, above=0, hint="0.6 to 1.0 is usual; the objective needs random samples")
    top_p: float = bounded(1.0, above=0, at_most=1, hint="1 is off")
    top_k: int = bounded(0, at_least=0, hint="0 is off")
    n: int = bounded(1, at_least=1)
    max_new_tokens: int = bounded(256, at_least=1)
    truncated: Truncated = Truncated.keep
    batch_size: int = bounded(64, at_least=1)
    memory_share: float = bounded(0.3, above=0, below=1, hint="0.3 is usual")
    max_gap: float = bounded(0.1, above=0, hint="nats")
    lag: int = bounded(0, at_least=0, at_most=1, hint="steps")
    guard: GuardAction = GuardAction.warn
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        remedy = "needs a vLLM server: set sampling.engine=vllm sampling.vllm.url=URL, or sampling.lag=0"
        self.require("lag", self.lag == 0 or self.vllm.url is not None, remedy)

    @property
    def by_server(self) -> bool:
        """Whether a separate vLLM server samples, to which the student's weights are sent."""
        return self.engine is Engine.vllm and self.vllm.url is not None


Estimator = StrEnum("Estimator", "sampled exact topk")
Divergence = StrEnum("Divergence", "reverse_kl forward_kl jsd")
Reduction = StrEnum("Reduction", "token sequence")


@dataclass(kw_only=True, slots=True)
class PPOConfig(Section, prefix="ppo."):
    estimator: Estimator = Estimator.sampled
    divergence: Divergence = Divergence.reverse_kl
    temperature: float | None = bounded(None, above=0, hint="null: sampling.temperature")
    steps: int = bounded(1, at_least=1)
    clip_eps: float = bounded(0.2, above=0, below=1, hint="0.2 is usual")
    advantage_clip: float | None = bounded(5.0, above=0)
    importance_cap: float | None = bounded(2.0, above=0)
    reduction: Reduction = Reduction.token
    beta: float = bounded(0.5, at_least=0, at_most=1, hint="0 is the forward KL, 1 the reverse KL")
    k: int = bounded(64, at_least=1, hint="16 to 64 is usual")
    baseline: bool = False
    discount: float = bounded(0.0, at_least=0, at_most=1, hint="0: each token counts only its own advantage")
    loss_prefix: int | None = bounded(None, at_least=1)
    reward_coef: float = bounded(0.0, at_least=0, hint="0 is off")
    reference_coef: float = bounded(0.0, at_least=0, hint="0 is off")


OptimizerName = StrEnum("OptimizerName", "adamw adamw8bit")
Schedule = StrEnum("Schedule", "constant linear cosine")


@dataclass(kw_only=True, slots=True)
class OptimConfig(Section, prefix="optim."):
    name: OptimizerName = OptimizerName.adamw
    lr: float | None = bounded(None, above=0, hint="1e-5 to 5e-5 is usual when all weights are trained")
    weight_decay: float = bounded(0.0, at_least=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = bounded(1e-8, above=0)
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = bounded(10, at_least=0)
    max_grad_norm: float = bounded(1.0, above=0, hint="1.0 is usual")

    def __post_init__(self) -> None:
        pair = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self.require("betas", pair, "must be two numbers in [0, 1), for example [0.9,0.95]")


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section, prefix="train."):
    max_steps: int | None = bounded(200, at_least=1, hint="then set train.epochs=NUMBER")
    epochs: float | None = bounded(None, above=0)
    batch_size: int = bounded(16, at_least=1, hint="prompts per process")
    given_share: Any = 0.0
    max_tokens_per_micro_batch: int = bounded(8192, at_least=1, hint="a longer sequence is a micro-batch of its own")
    packing: bool | None = None
    activation_checkpointing: bool | None = None
    compile: bool = False
    watchdog_minutes: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        one = (self.max_steps is None) != (self.epochs is None)
        self.require("max_steps", one, "set one of train.max_steps and train.epochs, and the other to null")
        shares, steps = self.given_shares.values(), self.given_shares.keys()
        known = all(isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1 for share in shares)
        rule = "must be a share from 0 to 1, or shares by the step from which they count, such as {0: 1.0, 50: 0.25, 100: 0}"
        self.require("given_share", known and "0" in steps and all(re.fullmatch(r"0|[1-9]\d*", step) for step in steps), rule)
        if isinstance(self.given_share, dict):
            self.given_share = self.given_shares  # as JSON stores it, so that a resumed run finds the same

    @property
    def given_shares(self) -> dict[str, float]:
        """The shares of rows that take given completions, by the first step at which they count."""
        share = self.given_share
        return {str(step): value for step, value in share.items()} if isinstance(share, dict) else {"0": share}

    def given_share_at(self, step: int) -> float:
        """Return the share at a step (0-based): that of the last listed step up to it."""
        return float(self.given_shares[str(max(int(first) for first in self.given_shares if int(first) <= step))])

    @property
    def takes_given(self) -> bool:
        """Whether rows take given completions at any step."""
        return any(self.given_shares.values())


@dataclass(kw_only=True, slots=True)
class EvalConfig(Section, prefix="eval."):
    steps: int = bounded(50, at_least=0, hint="0: only before and after training")
    limit: int | None = bounded(200, at_least=1)
    reward: str | None = "number"
    reward_seconds: float = bounded(5.0, above=0)
    reward_memory: int = bounded(1024, at_least=1, hint="MiB")
    temperature: float = bounded(0.0, at_least=0, hint="0 is greedy")
    max_new_tokens: int = bounded(512, at_least=1)
    batch_size: int = bounded(256, at_least=1)
    kl_prompts: int = bounded(32, at_least=0, hint="0 is off")
    kl_max_new_tokens: int = bounded(128, at_least=1)
    samples: int = bounded(1, at_least=1)

    def __post_init__(self) -> None:
        remedy = "greedy answers are all the same: set eval.temperature=0.7, or eval.samples=1"
        self.require("samples", self.samples == 1 or self.temperature > 0, remedy)


Best = StrEnum("Best", "keep final drop")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Section, prefix="checkpoint."):
    every: int = bounded(50, at_least=1)
    keep_last: int = bounded(2, at_least=0, hint="0: none once the run is done")
    best: Best = Best.keep
    background: bool | None = None


Tracker = StrEnum("Tracker", "none tensorboard wandb trackio mlflow swanlab")


@dataclass(kw_only=True, slots=True)
class TrackConfig(Section, prefix="track."):
    tool: Tracker = Tracker.none
    project: str = "opd"
    rollouts_per_step: int = bounded(2, at_least=0)


@dataclass(kw_only=True, slots=True)
class LaunchConfig(Section, prefix="launch."):
    processes: int | None = bounded(None, at_least=1)
    config_file: str | None = None

    @property
    def several(self) -> bool:
        """Whether the run has to be started through a launcher."""
        return (self.processes or 1) > 1 or self.config_file is not None


Direction = StrEnum("Direction", "maximize minimize")
AUTO = "auto"
# The metrics of summary.json and, where one value is better than another, the direction.
METRICS: dict[str, Direction | None] = {
    **dict.fromkeys(("reward_before", "reward_after", "reward_teacher", "gap_closed"), Direction.maximize),
    **dict.fromkeys(("eval_kl_before", "eval_kl_after", "reverse_kl_first", "reverse_kl_last"), Direction.minimize),
    **dict.fromkeys(("best_step", "steps", "graded_tokens", "prompts", "rows"), None),
    "seconds": Direction.minimize,
    "tokens_per_second": Direction.maximize,
    "peak_memory_bytes": Direction.minimize,
    "seed": None,
}


@dataclass(kw_only=True, slots=True)
class SweepConfig(Section, prefix="sweep."):
    metric: str = AUTO

    def __post_init__(self) -> None:
        comparable = [name for name, direction in METRICS.items() if direction is not None]
        known = self.metric == AUTO or self.metric in comparable
        self.require("metric", known, f"must be {AUTO} or a number of summary.json: {', '.join(comparable)}")

    @property
    def direction(self) -> Direction:
        """Which values are better."""
        return METRICS.get(self.metric) or Direction.maximize
