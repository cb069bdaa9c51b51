"""The typed configuration: every option with its default, its bounds, and the rules that involve several options.

The defaults are a starting point for distilling Qwen2.5-1.5B-Instruct into Qwen2.5-0.5B-Instruct on GSM8K. `conf/` has the same values as
commented YAML. The dataclasses are not frozen because Hydra merges overrides into them.
"""

import math
import operator
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from types import NoneType
from typing import Any, ClassVar, get_args

from opd.config.several import Renaming, did_you_mean, overlay
from opd.errors import ConfigError


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Source(Enum):
    arithmetic = "arithmetic"
    gym = "gym"
    hub = "hub"
    jsonl = "jsonl"
    parquet = "parquet"
    python = "python"


class Engine(Enum):
    auto = "auto"
    generate = "generate"
    vllm = "vllm"


class SamplingDtype(Enum):
    auto = "auto"
    trainer = "trainer"
    bfloat16 = "bfloat16"


class Truncated(Enum):
    keep = "keep"
    mask = "mask"
    drop = "drop"


class GuardAction(Enum):
    none = "none"
    warn = "warn"
    stop = "stop"


class Estimator(Enum):
    sampled = "sampled"
    exact = "exact"
    topk = "topk"


class Control(Enum):
    none = "none"
    constant = "constant"
    shuffled = "shuffled"
    self = "self"


class Divergence(Enum):
    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    jsd = "jsd"


class TeacherWeights(Enum):
    own = "own"  # the model at teacher.path
    base = "base"  # the student's at the start of the run
    current = "current"  # the student's present ones
    ema = "ema"  # a moving average of the student's


class TokenAlignment(Enum):
    ids = "ids"
    spans = "spans"


class Placement(Enum):
    same = "same"
    device = "device"
    sharded = "sharded"
    offload = "offload"


class Quantization(Enum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class OptimizerName(Enum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"


class Reduction(Enum):
    token = "token"
    sequence = "sequence"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Tracker(Enum):
    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"
    mlflow = "mlflow"
    swanlab = "swanlab"


class Direction(Enum):
    maximize = "maximize"
    minimize = "minimize"


AUTO = "auto"
# Options of a teacher with weights of its own, which say nothing about a student that is its own teacher.
UNREAD = ("url", "placement", "quantization", "gguf_file", "revision", "adapter", "dtype", "attn_implementation")
STEP = re.compile(r"0|[1-9]\d*")
SERVER = re.compile(r"https?://[^/\s]+/?")
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")  # in a template over the columns of a row: a literal brace, or {column}
# The metrics of summary.json and, where one value is better than another, the direction.
METRICS: dict[str, Direction | None] = {
    "reward_before": Direction.maximize,
    "reward_after": Direction.maximize,
    "reward_teacher": Direction.maximize,
    "gap_closed": Direction.maximize,
    "eval_kl_before": Direction.minimize,
    "eval_kl_after": Direction.minimize,
    "reverse_kl_first": Direction.minimize,
    "reverse_kl_last": Direction.minimize,
    "steps": None,
    "graded_tokens": None,
    "seconds": Direction.minimize,
    "tokens_per_second": Direction.maximize,
    "peak_memory_bytes": Direction.minimize,
    "seed": None,
}

# Options, and values of options, that older versions had. An old command line that uses one is refused with this remedy.
REMOVED: dict[str, str] = {
    "sampling.static_cache": "the device decides it: remove it",
    "sampling.max_new_tokens_schedule": "use one length for all steps: sampling.max_new_tokens=TOKENS",
    "sampling.guard.action": "use sampling.guard=none, sampling.guard=warn or sampling.guard=stop",
    "sampling.guard.truncated": "the limit is 0.95: remove it; sampling.guard=none turns the guard off",
    "sampling.guard.repetition": "the limit is 0.5: remove it; sampling.guard=none turns the guard off",
    "sampling.guard.steps": "the guard acts after 10 steps: remove it; sampling.guard=none turns the guard off",
    "sampling.engine=continuous": "it ran at 0.15 to 0.4 times the speed of generate; use sampling.engine=generate or sampling.engine=vllm",
    "ppo.divergence=skew": "use ppo.divergence=jsd, with ppo.beta near 1 for one close to the reverse KL",
    "ppo.alpha": "it belonged to ppo.divergence=skew; use ppo.divergence=jsd and ppo.beta",
    "ppo.clip_eps_high": "the ratio is clipped symmetrically: use ppo.clip_eps",
    "eval.tasks": "run opd eval once per data set: opd eval TARGET data=NAME eval=NAME",
    "track.alternatives": "5 alternatives are stored: remove it; track.rollouts_per_step=0 stores no rollouts",
}


def removed(key: str, value: object = None) -> str | None:
    """Return the message for an option, or a value of an option, that was removed; None for any other."""
    return next((f"{name}: was removed; {REMOVED[name]}" for name in (key, f"{key}={value}") if name in REMOVED), None)


COMPARISONS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def bounded(default: float | None, *, hint: str = "", **bounds: float) -> Any:
    """Return a dataclass field for a number within `bounds`: at_least, above, at_most, below. Errors show the hint, what is usual."""
    return field(default=default, metadata={"bounds": bounds, "hint": f" ({hint})" if hint else ""})


def is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


class Section:
    """A group of options. `Config` checks the bounds of all numbers; rules that involve several options are in `__post_init__`."""

    __slots__ = ()
    PREFIX: ClassVar[str] = ""

    def require(self, option: str, condition: bool, rule: str) -> None:
        """Raise `ConfigError` with the dotted option, its value and the rule unless `condition` holds."""
        if not condition:
            value = operator.attrgetter(option)(self)
            shown = repr(value) if isinstance(value, str) else getattr(value, "value", value)
            raise ConfigError(f"{self.PREFIX}{option}={shown}: {rule}")

    def check_bounds(self) -> None:
        """Raise `ConfigError` for the first number of this group or its subgroups that is out of bounds or not finite."""
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Section):
                value.check_bounds()
            elif "bounds" in item.metadata and value is not None:
                bounds = [(*COMPARISONS[name], limit) for name, limit in item.metadata["bounds"].items()]
                rule = " and ".join(f"{words} {limit}" for _, words, limit in bounds)
                null = ", or null for none" if NoneType in get_args(item.type) else ""
                within = math.isfinite(value) and all(compare(value, limit) for compare, _, limit in bounds)
                self.require(item.name, within, f"must be {rule}{null}{item.metadata['hint']}")


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section):
    PREFIX: ClassVar[str] = "model."
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
        unpacked = self.quantization is Quantization.none or self.gguf_file is None
        gguf = f"does not work with {self.PREFIX}gguf_file, which is dequantized on loading: set {self.PREFIX}quantization=none"
        self.require("quantization", unpacked, gguf)
        remedy = f"runs code from the model repository: pin the commit with {self.PREFIX}revision=COMMIT"
        self.require("trust_remote_code", not self.trust_remote_code or self.revision is not None, remedy)


@dataclass(kw_only=True, slots=True)
class TeacherConfig(ModelConfig):
    PREFIX: ClassVar[str] = "teacher."
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
        on_device = self.placement is Placement.device
        self.require(
            "device", on_device == (self.device is not None), "set teacher.placement=device and, for example, teacher.device=cuda:1"
        )
        known = self.device is None or re.fullmatch(r"cpu|cuda:\d+", self.device) is not None
        self.require("device", known, "must be cpu or a GPU with its number, for example cuda:1")
        if self.quantization is not Quantization.none:
            whole = self.placement in (Placement.same, Placement.device)
            self.require("quantization", whole, f"does not work with teacher.placement={self.placement.value}: set teacher.placement=same")
        if self.url is not None:
            known = bool(self.urls) and all(isinstance(url, str) and SERVER.fullmatch(url) for url in self.urls)
            self.require("url", known, "must be a server such as http://127.0.0.1:8000, a list of servers, or null for a local teacher")
            here = self.placement is Placement.same and self.quantization is Quantization.none
            self.require("url", here, "the server has the weights: set teacher.placement=same teacher.quantization=none")
            self.require("adapter", self.adapter is None, "the server has the weights: set teacher.adapter=null")
        for option in ("prompt", "contrast"):
            rest = PLACEHOLDER.sub("", getattr(self, option) or "")
            remedy = "has a brace that is not part of a {column}: write a literal brace as {{ or }}"
            self.require(option, "{" not in rest and "}" not in rest, remedy)
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
class LoraConfig(Section):
    PREFIX: ClassVar[str] = "lora."
    rank: int = bounded(0, at_least=0, hint="0 trains all weights, 16 is usual for adapters")
    alpha: int = bounded(32, at_least=1)
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        self.require("targets", bool(self.targets), "must name layers, for example [q_proj,v_proj], or [all-linear]")


@dataclass(kw_only=True, slots=True)
class DataConfig(Section):
    PREFIX: ClassVar[str] = "data."
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
    size: int = bounded(2000, at_least=2)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    mix: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = all(re.fullmatch(r"[\w-]+", label) for label in self.mix)
        self.require("mix", named, "its labels name datasets; use letters, digits, _ and - only")
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


def of_dataset(label: str) -> Renaming:
    """Name options `data.mix.LABEL.path`, not `data.path`; for an empty label change nothing."""
    return Renaming("data.", f"data.mix.{label}." if label else "data.", DATASET_OPTIONS)


def of_teacher(label: str) -> Renaming:
    """Name options `teachers.LABEL.path`, not `teacher.path`; for an empty label change nothing."""
    return Renaming("teacher.", f"teachers.{label}." if label else "teacher.", TEACHER_OPTIONS)


def naming_dataset(label: str) -> AbstractContextManager[None]:
    """Let errors raised in the block name the options of a dataset of `data.mix`."""
    return of_dataset(label).errors()


def naming_teacher(label: str) -> AbstractContextManager[None]:
    """Let errors raised in the block name the options of one of `teachers`."""
    return of_teacher(label).errors()


@dataclass(kw_only=True, slots=True)
class VllmConfig(Section):
    PREFIX: ClassVar[str] = "sampling.vllm."
    url: str | None = None
    weights_folder: str | None = None
    timeout: float = bounded(600.0, above=0, hint="seconds")

    def __post_init__(self) -> None:
        known = self.url is None or SERVER.fullmatch(self.url) is not None
        self.require("url", known, "must be a server such as http://127.0.0.1:8000, or null for an engine in this process")


@dataclass(kw_only=True, slots=True)
class SamplingConfig(Section):
    PREFIX: ClassVar[str] = "sampling."
    engine: Engine = Engine.auto
    dtype: SamplingDtype = SamplingDtype.auto
    temperature: float = bounded(0.7, above=0, hint="0.6 to 1.0 is usual; the objective needs random samples")
    top_p: float = bounded(1.0, above=0, at_most=1, hint="1 is off")
    top_k: int = bounded(0, at_least=0, hint="0 is off")
    n: int = bounded(4, at_least=1)
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


@dataclass(kw_only=True, slots=True)
class PPOConfig(Section):
    PREFIX: ClassVar[str] = "ppo."
    estimator: Estimator = Estimator.sampled
    divergence: Divergence = Divergence.reverse_kl
    temperature: float | None = bounded(None, above=0, hint="null: sampling.temperature")
    steps: int = bounded(1, at_least=1)
    clip_eps: float = bounded(0.2, above=0, hint="0.2 is usual")
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

    def __post_init__(self) -> None:
        for option in ("baseline", "discount", "reward_coef") if self.estimator is not Estimator.sampled else ():
            self.require(option, not getattr(self, option), "only applies to ppo.estimator=sampled: remove it, or set that")


@dataclass(kw_only=True, slots=True)
class OptimConfig(Section):
    PREFIX: ClassVar[str] = "optim."
    name: OptimizerName = OptimizerName.adamw
    lr: float = bounded(1e-5, above=0, hint="1e-5 to 5e-5 is usual when all weights are trained")
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
class TrainConfig(Section):
    PREFIX: ClassVar[str] = "train."
    max_steps: int | None = bounded(200, at_least=1)
    epochs: float | None = bounded(None, above=0)
    batch_size: int = bounded(4, at_least=1, hint="prompts per process")
    given_share: Any = 0.0
    max_tokens_per_micro_batch: int = bounded(8192, at_least=1, hint="a longer sequence is a micro-batch of its own")
    packing: bool | None = None
    activation_checkpointing: bool | None = None
    compile: bool = False
    watchdog_minutes: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        one = (self.max_steps is None) != (self.epochs is None)
        self.require("max_steps", one, "set one of train.max_steps and train.epochs, and the other to null")
        known = all(STEP.fullmatch(step) is not None and is_share(share) for step, share in self.given_shares.items())
        rule = "must be a share from 0 to 1, or shares by the step from which they count, such as {0: 1.0, 50: 0.25, 100: 0}"
        self.require("given_share", known and "0" in self.given_shares, rule)
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
class EvalConfig(Section):
    PREFIX: ClassVar[str] = "eval."
    steps: int = bounded(50, at_least=0, hint="0: only before and after training")
    limit: int | None = bounded(500, at_least=1)
    reward: str | None = "number"
    temperature: float = bounded(0.0, at_least=0, hint="0 is greedy")
    max_new_tokens: int = bounded(512, at_least=1)
    batch_size: int = bounded(256, at_least=1)
    kl_prompts: int = bounded(32, at_least=0, hint="0 is off")
    kl_max_new_tokens: int = bounded(128, at_least=1)
    samples: int = bounded(1, at_least=1)

    def __post_init__(self) -> None:
        remedy = "greedy answers are all the same: set eval.temperature=0.7, or eval.samples=1"
        self.require("samples", self.samples == 1 or self.temperature > 0, remedy)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Section):
    PREFIX: ClassVar[str] = "checkpoint."
    every: int = bounded(50, at_least=1)
    keep_last: int = bounded(2, at_least=1)
    keep_best: bool = True
    background: bool | None = None


@dataclass(kw_only=True, slots=True)
class TrackConfig(Section):
    PREFIX: ClassVar[str] = "track."
    tool: Tracker = Tracker.none
    project: str = "opd"
    rollouts_per_step: int = bounded(2, at_least=0)


@dataclass(kw_only=True, slots=True)
class LaunchConfig(Section):
    PREFIX: ClassVar[str] = "launch."
    processes: int | None = bounded(None, at_least=1)
    config_file: str | None = None

    @property
    def several(self) -> bool:
        """Whether the run has to be started through a launcher."""
        return (self.processes or 1) > 1 or self.config_file is not None


@dataclass(kw_only=True, slots=True)
class SweepConfig(Section):
    PREFIX: ClassVar[str] = "sweep."
    metric: str = AUTO
    direction: Direction = Direction.maximize

    def __post_init__(self) -> None:
        known = self.metric == AUTO or self.metric in METRICS
        self.require("metric", known, f"must be {AUTO} or a number of summary.json: {', '.join(METRICS)}")
        better = METRICS.get(self.metric, Direction.maximize) or self.direction
        self.require("direction", self.direction is better, f"sweep.metric={self.metric} needs sweep.direction={better.value}")


@dataclass(kw_only=True, slots=True)
class Config(Section):
    seed: int = bounded(0, at_least=0, at_most=2**32 - 1)
    name: str = "run"
    resume: str = "auto"
    resume_force: bool = False
    device: Device = Device.auto
    control: Control = Control.none
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        self.check_bounds()
        fits = re.fullmatch(r"[\w+=,@-][\w.+=,@-]*", self.name) is not None
        self.require("name", fits, "it names the run folder; use letters, digits and . _ - + = , only")
        self.require("resume", bool(self.resume.strip()), "must be auto, never or the path of a checkpoint")

        quantized = self.model.quantization is not Quantization.none
        remedy = "quantised weights cannot be trained: set lora=default, which trains adapters, or model.quantization=none"
        self.require("model.quantization", not quantized or self.lora.rank > 0, remedy)
        copies = self.sampling.dtype is SamplingDtype.bfloat16 and self.sampling.engine is not Engine.vllm
        self.require("sampling.dtype", not (quantized and copies), "quantised weights have no bf16 copy: set sampling.dtype=auto")

        for label, entry in self.teachers.items():
            if label not in self.data.mix:
                remedy = did_you_mean(label, self.data.mix) or "label a dataset with data.mix, or set teacher.path=… instead"
                raise ConfigError(f"teachers.{label}: data.mix has no dataset of this label; {remedy}".strip())
            values = entry if isinstance(entry, dict) else {}
            if values.get("alignment") in ("spans", TokenAlignment.spans):
                remedy = "works for one teacher alone: name it as teacher, without teachers, or take one with the student's tokens"
                raise ConfigError(f"teachers.{label}.alignment=spans: {remedy}")
            is_average = values.get("weights") in ("ema", TeacherWeights.ema)
            for option in ["weights"] * is_average + ["contrast"] * (values.get("contrast") is not None):
                remedy = f"leave {label} out of teachers, and set teacher.{option} for all datasets that are left out"
                shown = getattr(values[option], "value", values[option])
                raise ConfigError(f"teachers.{label}.{option}={shown}: only applies to teacher: {remedy}")
        remedy = "subtracts the log-probs of one teacher: set teachers={}, or teacher.contrast=null"
        self.require("teacher.contrast", self.teacher.contrast is None or not self.teachers, remedy)
        if self.teacher.has_own_tokens:
            self.check_spans()
        needs_one = self.control in (Control.shuffled, Control.self)
        self.require("control", not (needs_one and self.teachers), "needs one teacher for all data: set teachers={}, or control=constant")
        if self.data.mix:
            _ = self.parts  # which are checked as they are made
        elif self.teaches_itself:
            self.check_self_teaching()

        if self.is_served and not self.data.mix:
            whole = "needs the teacher's whole distributions, which a server does not send: set "
            self.require("ppo.estimator", self.ppo.estimator is not Estimator.exact, f"{whole}ppo.estimator=sampled or ppo.estimator=topk")
            self.require("ppo.baseline", not self.ppo.baseline, f"{whole}ppo.baseline=false")
            remedy = "with teacher.url, which scores at temperature 1: set ppo.temperature=1, or null"
            self.require("ppo.temperature", self.temperature == 1, remedy)
            remedy = "is not measured with teacher.url: set another metric"
            self.require("sweep.metric", not self.sweep.metric.startswith("eval_kl"), remedy)

        if self.teacher.contrast is not None:
            remedy = "does not work with teacher.contrast, whose advantage needs one log-prob per token: set ppo.estimator=sampled"
            self.require("ppo.estimator", self.ppo.estimator is Estimator.sampled, remedy)
            remedy = "is the mean of the advantage without teacher.contrast: set ppo.baseline=false, or teacher.contrast=null"
            self.require("ppo.baseline", not self.ppo.baseline, remedy)

        corrected, truncated = self.ppo.importance_cap is not None, self.sampling.top_p < 1 or self.sampling.top_k > 0
        remedy = "sampling.lag=1 samples with the previous step's weights: set ppo.importance_cap=2.0, or sampling.lag=0"
        self.require("ppo.importance_cap", corrected or self.sampling.lag == 0, remedy)
        if self.ppo.estimator is Estimator.sampled:
            self.require("sampling.top_k", self.sampling.top_k != 1, "leaves one token to sample: set sampling.top_k=0, or more than 1")
            retempered = self.temperature != self.sampling.temperature
            remedy = f"the sampler draws at another temperature than ppo.temperature={self.temperature:g}: set ppo.importance_cap=2.0, or "
            same = f"sampling.temperature={self.temperature:g}"
            self.require("ppo.importance_cap", corrected or not retempered, remedy + same)
            remedy = f"sums log-probs at the sampler's temperature, which is not ppo.temperature: set {same}, or ppo.discount=0"
            self.require("ppo.discount", self.ppo.discount == 0 or not retempered, remedy)
            off = "sampling.top_p=1 sampling.top_k=0"
            remedy = f"top-p and top-k sample from a truncated distribution: set ppo.importance_cap=2.0, or {off}"
            self.require("ppo.importance_cap", corrected or not truncated, remedy)
            remedy = f"sums log-probs that top-p and top-k distort: set {off}, or ppo.discount=0"
            self.require("ppo.discount", self.ppo.discount == 0 or not truncated, remedy)
        remedy = "rows take the texts of a column: set data.completion=COLUMN (opd sample --out FILE writes one), or train.given_share=0"
        has_column = any(data.completion is not None for data in self.data.datasets.values() or [self.data])
        self.require("train.given_share", has_column or not self.train.takes_given, remedy)
        comparable = self.eval.reward is not None and self.sampling.n > 1
        remedy = "compares the rewards of a prompt's completions: set eval.reward=NAME and sampling.n above 1"
        self.require("ppo.reward_coef", self.ppo.reward_coef == 0 or comparable, remedy)

        if self.control is Control.self:
            takes_start = self.teacher.weights in (TeacherWeights.own, TeacherWeights.base)
            self.require("control", takes_start, "is a teacher with the weights of the start: set teacher.weights=own, or control=none")
        elif self.control is not Control.none:
            remedy = "only applies to ppo.estimator=sampled, where the teacher's part is an advantage: set that, or control=none"
            self.require("control", self.ppo.estimator is Estimator.sampled, remedy)
            remedy = "leaves the teacher out, whose distributions ppo.baseline adds: set ppo.baseline=false, or control=none"
            self.require("control", not self.ppo.baseline, remedy)
        if self.control is Control.shuffled:
            remedy = "takes scores from other completions of the step: set sampling.n=2 or train.batch_size=2"
            self.require("control", self.sampling.n * self.train.batch_size > 1, remedy)

        for section in (self.sampling, self.eval) if self.sampling.engine is Engine.vllm else ():
            allowed = section.temperature == 0 or 0.01 <= section.temperature <= 2
            section.require("temperature", allowed, "must be 0 or between 0.01 and 2 for sampling.engine=vllm")

        judged = self.sweep.metric.startswith("reward_") or self.sweep.metric == "gap_closed"
        remedy = "is not measured with eval.reward=null: set eval.reward=NAME"
        self.require("sweep.metric", not judged or self.eval.reward is not None, remedy)
        remedy = "is not measured with eval.kl_prompts=0: set eval.kl_prompts=32"
        self.require("sweep.metric", not self.sweep.metric.startswith("eval_kl") or self.eval.kl_prompts > 0, remedy)

    @property
    def temperature(self) -> float:
        """The temperature at which student and teacher are scored."""
        default = 1.0 if self.is_served else self.sampling.temperature  # servers compute at 1
        return default if self.ppo.temperature is None else self.ppo.temperature

    @property
    def needs_teacher_states(self) -> bool:
        """Whether the update needs the teacher's whole distributions, and so its output head."""
        return self.ppo.estimator is not Estimator.sampled or self.ppo.baseline

    @property
    def draws_from_scored(self) -> bool:
        """Whether the sampler draws from the distribution that is scored, up to rounding: their log-probs can then be compared."""
        sampling = self.sampling
        return sampling.top_p == 1 and sampling.top_k == 0 and sampling.temperature == self.temperature

    @property
    def teacher_weights(self) -> TeacherWeights:
        """Whose weights the teacher has: also `base` where `teacher.path` is the model that gets adapters, which is then loaded once."""
        if self.control is Control.self:
            return TeacherWeights.base
        if self.names_weights or self.teacher.url is not None or self.lora.rank == 0:
            return self.teacher.weights
        base = (self.model.path, self.model.revision, self.model.gguf_file, None)
        shares_base = base == (self.teacher.path, self.teacher.revision, self.teacher.gguf_file, self.teacher.adapter)
        return TeacherWeights.base if shares_base else TeacherWeights.own

    @property
    def names_weights(self) -> bool:
        return self.control is Control.self or self.teacher.weights is not TeacherWeights.own

    @property
    def weights_option(self) -> str:
        """The option that makes the student its own teacher."""
        return "control=self" if self.control is Control.self else f"teacher.weights={self.teacher_weights.value}"

    @property
    def teaches_itself(self) -> bool:
        """Whether the student is its own teacher: nothing is loaded from `teacher.path`."""
        return self.teacher_weights is not TeacherWeights.own

    @property
    def starts_at_base(self) -> bool:
        """Whether the student starts as its base model, so that its adapters need only be off for the weights of the start."""
        return self.lora.rank > 0 and self.model.adapter is None

    @property
    def teacher_is_start(self) -> bool:
        """Whether the teacher has the weights of the student's start, and not those of its base model below `model.adapter`."""
        return self.teacher_weights is TeacherWeights.base and (self.names_weights or self.starts_at_base)

    @property
    def teacher_files(self) -> ModelConfig:
        """The files that the teacher's tokenizer, and unless a server has them its weights, are loaded from."""
        return self.model if self.teaches_itself else self.teacher

    @property
    def teacher_name(self) -> str:
        return f"itself ({self.weights_option})" if self.teaches_itself else self.teacher.path

    def check_self_teaching(self) -> None:
        """Raise `ConfigError` for what cannot hold where the student is its own teacher, or leaves it nothing to learn."""
        weights, usual = self.teacher_weights, TeacherConfig()
        for option in UNREAD if self.names_weights else ("placement", "quantization"):
            can_hold = getattr(self.teacher, option) in (getattr(usual, option), getattr(self.model, option, None))
            remedy = f"the teacher is the student, with {self.weights_option}: set teacher.{option}="
            shown = getattr(usual, option)
            remedy += f"{getattr(shown, 'value', 'null' if shown is None else shown)}, or "
            remedy += "control=none" if self.control is Control.self else "teacher.weights=own and another teacher.path"
            self.require(f"teacher.{option}", can_hold, remedy)
        rewarded = weights is not TeacherWeights.current and self.ppo.reward_coef > 0
        has_purpose = self.teacher.has_own_view or rewarded or self.control is Control.self
        remedy = "the teacher is the student and reads the same prompts, so that there is nothing to learn: set teacher.prompt='…' or "
        remedy += "teacher.system='…' for it"
        remedy += ", or another teacher" if weights is TeacherWeights.current else ", ppo.reward_coef above 0, or another teacher"
        self.require("teacher.weights" if self.names_weights else "lora.rank", has_purpose, remedy)
        remedy = "teacher.weights=current changes at each inner step, but whole distributions are computed from the weights that it had "
        remedy += "before: set ppo.steps=1, teacher.weights=ema, or ppo.estimator=sampled ppo.baseline=false"
        self.require("ppo.steps", self.ppo.steps == 1 or weights is not TeacherWeights.current or not self.needs_teacher_states, remedy)

    # Several datasets and teachers.

    @property
    def parts(self) -> dict[str, "Config"]:
        """The run on each dataset of `data.mix` alone, by label, with the teacher of its rows as `teacher`; without any {"": this run}."""
        if not self.data.mix:
            return {"": self}
        parts, ppo = {}, replace(self.ppo, temperature=self.temperature)
        for label, data in self.data.datasets.items():
            train = self.train if data.completion is not None else replace(self.train, given_share=0.0)
            with naming_dataset(label), naming_teacher(self.teacher_of(label)):
                parts[label] = replace(self, data=data, teacher=self.labelled_teacher(label), teachers={}, ppo=ppo, train=train)
        return parts

    @property
    def parts_by_teacher(self) -> dict[str, "Config"]:
        """One of `parts` for each teacher that is used, by the teacher's label; the label of `teacher` is empty."""
        return {self.teacher_of(label): part for label, part in self.parts.items()}

    def teacher_of(self, dataset: str) -> str:
        """Return the label of the teacher that scores a dataset's rows; empty for `teacher`."""
        return dataset if dataset in self.teachers else ""

    def labelled_teacher(self, label: str) -> TeacherConfig:
        if label not in self.teachers:
            return self.teacher
        teacher = overlay(TeacherConfig, {}, self.teachers[label], f"teachers.{label}", TEACHER_OPTIONS)
        if "path" not in self.teachers[label] and teacher.weights is TeacherWeights.own:
            raise ConfigError(f"teachers.{label}.path has no value; add teachers.{label}.path=PATH, or teachers.{label}.weights=base")
        return teacher

    def check_spans(self) -> None:
        """Check what does not work with a teacher that has another tokenizer."""
        remedy = "compares distributions of one vocabulary, which teacher.alignment=spans does not have: set ppo.estimator=sampled"
        self.require("ppo.estimator", self.ppo.estimator is Estimator.sampled, remedy)
        remedy = "is the KL over one vocabulary, which teacher.alignment=spans does not have: set ppo.baseline=false"
        self.require("ppo.baseline", not self.ppo.baseline, remedy)
        remedy = "would count a span of teacher.alignment=spans once for each of its tokens: set ppo.discount=0"
        self.require("ppo.discount", self.ppo.discount == 0, remedy)
        remedy = "replaces the advantage of single tokens, not of the spans of teacher.alignment=spans: set control=none"
        self.require("control", self.control is Control.none, remedy)
        remedy = "subtracts log-probs of single tokens, not of the spans of teacher.alignment=spans: set teacher.contrast=null"
        self.require("teacher.contrast", self.teacher.contrast is None, remedy)
        remedy = "the teacher is the student: set teacher.alignment=ids, or teacher.weights=own and another teacher.path"
        self.require("teacher.alignment", not self.teaches_itself, remedy)
        remedy = "works for one teacher alone: set teachers={}, or teacher.alignment=ids"
        self.require("teacher.alignment", not self.teachers, remedy)
        remedy = "is not measured with teacher.alignment=spans: set another metric"
        self.require("sweep.metric", not self.sweep.metric.startswith("eval_kl"), remedy)

    @property
    def is_served(self) -> bool:
        """Whether a server has a teacher of the run."""
        own = any(isinstance(entry, dict) and entry.get("url") is not None for entry in self.teachers.values())
        is_used = not self.data.mix or any(label not in self.teachers for label in self.data.mix)
        return own or (is_used and self.teacher.url is not None)
