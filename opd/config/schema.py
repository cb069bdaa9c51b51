"""The typed configuration: every option with its default, its bounds, and the rules that involve several options.

The defaults are a starting point for distilling Qwen2.5-1.5B-Instruct into Qwen2.5-0.5B-Instruct on GSM8K. `conf/` has the same values as
commented YAML. The dataclasses are not frozen because Hydra merges overrides into them.
"""

import math
import operator
import re
from dataclasses import dataclass, field, fields
from enum import Enum
from types import NoneType
from typing import Any, ClassVar, get_args

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


class Divergence(Enum):
    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    jsd = "jsd"


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
SERVER = re.compile(r"https?://[^/\s]+/?")
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

    def __post_init__(self) -> None:
        self.require("path", bool(self.path.strip()), "must be a hub id or a local folder")
        remedy = f"runs code from the model repository: pin the commit with {self.PREFIX}revision=COMMIT"
        self.require("trust_remote_code", not self.trust_remote_code or self.revision is not None, remedy)


@dataclass(kw_only=True, slots=True)
class TeacherConfig(ModelConfig):
    PREFIX: ClassVar[str] = "teacher."
    path: str = "Qwen/Qwen2.5-1.5B-Instruct"
    url: Any = None
    timeout: float = bounded(600.0, above=0, hint="seconds")
    alignment: TokenAlignment = TokenAlignment.ids
    system: str | None = None
    placement: Placement = Placement.same
    device: str | None = None
    quantization: Quantization = Quantization.none

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
            remedy = "does not work with teacher.gguf_file, which is dequantized on loading: set teacher.quantization=none"
            self.require("quantization", self.gguf_file is None, remedy)
        if self.url is not None:
            known = bool(self.urls) and all(isinstance(url, str) and SERVER.fullmatch(url) for url in self.urls)
            self.require("url", known, "must be a server such as http://127.0.0.1:8000, a list of servers, or null for a local teacher")
            here = self.placement is Placement.same and self.quantization is Quantization.none
            self.require("url", here, "the server has the weights: set teacher.placement=same teacher.quantization=none")

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
    answer_after: str | None = "####"
    system: str | None = None
    max_prompt_tokens: int = bounded(512, at_least=1)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = bounded(2000, at_least=2)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.source.value
        if self.source in (Source.jsonl, Source.parquet):
            self.require("train_path", self.train_path is not None, f"data={name} needs data.train_path=FILE.{name}")
        if self.source is Source.hub:
            self.require("path", bool(self.path), "data=hub needs data.path=OWNER/DATASET")
        if self.source is Source.gym:
            self.require("path", self.path is not None, "data=gym needs data.path=TASK, for example data.path=chain_sum")


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

    def __post_init__(self) -> None:
        for option in ("baseline", "discount", "reward_coef") if self.estimator is not Estimator.sampled else ():
            self.require(option, not getattr(self, option), "only applies to ppo.estimator=sampled: remove it, or set that")


@dataclass(kw_only=True, slots=True)
class OptimConfig(Section):
    PREFIX: ClassVar[str] = "optim."
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
    max_tokens_per_micro_batch: int = bounded(8192, at_least=1, hint="a longer sequence is a micro-batch of its own")
    packing: bool | None = None
    activation_checkpointing: bool | None = None
    compile: bool = False
    watchdog_minutes: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        one = (self.max_steps is None) != (self.epochs is None)
        self.require("max_steps", one, "set one of train.max_steps and train.epochs, and the other to null")


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
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
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

        if self.shares_base:
            remedy = "the teacher is the student without its adapter: set teacher.system='…' for it, or another teacher.path"
            self.require("lora.rank", self.teacher.system is not None, remedy)
            in_place = self.teacher.placement is Placement.same and self.teacher.quantization is Quantization.none
            remedy = "the teacher shares the student's weights: set teacher.placement=same teacher.quantization=none"
            self.require("teacher.placement", in_place, remedy)

        if self.teacher.url is not None:
            remedy = "needs the teacher's whole distributions, which a server does not send: set ppo.estimator=sampled ppo.baseline=false"
            self.require("ppo.estimator", self.ppo.estimator is Estimator.sampled, remedy)
            self.require("ppo.baseline", not self.ppo.baseline, remedy)
            remedy = "with teacher.url, which scores at temperature 1: set ppo.temperature=1, or null"
            self.require("ppo.temperature", self.temperature == 1, remedy)
            remedy = "is not measured with teacher.url: set another metric"
            self.require("sweep.metric", not self.sweep.metric.startswith("eval_kl"), remedy)

        if self.teacher.alignment is TokenAlignment.spans:
            remedy = "compares distributions of one vocabulary, which teacher.alignment=spans does not have: set ppo.estimator=sampled"
            self.require("ppo.estimator", self.ppo.estimator is Estimator.sampled, remedy)
            remedy = "is the KL over one vocabulary, which teacher.alignment=spans does not have: set ppo.baseline=false"
            self.require("ppo.baseline", not self.ppo.baseline, remedy)
            remedy = "would count a span of teacher.alignment=spans once for each of its tokens: set ppo.discount=0"
            self.require("ppo.discount", self.ppo.discount == 0, remedy)
            remedy = "is not measured with teacher.alignment=spans: set another metric"
            self.require("sweep.metric", not self.sweep.metric.startswith("eval_kl"), remedy)

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
        comparable = self.eval.reward is not None and self.sampling.n > 1
        remedy = "compares the rewards of a prompt's completions: set eval.reward=NAME and sampling.n above 1"
        self.require("ppo.reward_coef", self.ppo.reward_coef == 0 or comparable, remedy)

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
        default = self.sampling.temperature if self.teacher.url is None else 1.0  # which is what servers compute at
        return default if self.ppo.temperature is None else self.ppo.temperature

    @property
    def draws_from_scored(self) -> bool:
        """Whether the sampler draws from the distribution that is scored, up to rounding: their log-probs can then be compared."""
        sampling = self.sampling
        return sampling.top_p == 1 and sampling.top_k == 0 and sampling.temperature == self.temperature

    @property
    def shares_base(self) -> bool:
        """Whether the teacher is the student's base model without the adapter, so that only one copy is loaded."""
        base = (self.model.path, self.model.revision, self.model.gguf_file)
        is_local = self.teacher.url is None
        return is_local and self.lora.rank > 0 and base == (self.teacher.path, self.teacher.revision, self.teacher.gguf_file)
