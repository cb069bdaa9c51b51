"""The typed configuration: every option of `opd`, its default, and the checks that need more than one of them.

The defaults are the recommended starting point for Qwen2.5-0.5B-Instruct from Qwen2.5-1.5B-Instruct on GSM8K; `conf/` holds the same
values as commented YAML. Dataclasses are not frozen because Hydra merges overrides into them.
"""

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    continuous = "continuous"
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
    skew = "skew"


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
# The numbers in summary.json, and whether large or small ones are better.
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


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise `ConfigError` naming the option, its value and the rule unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value}: {rule}")


def is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str = "Qwen/Qwen2.5-0.5B-Instruct"
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Dtype = Dtype.auto
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), "path", repr(self.path), "give model.path and teacher.path a hub id or a local folder")
        require(
            not self.trust_remote_code or self.revision is not None,
            "trust_remote_code",
            self.trust_remote_code,
            "code from a model repository runs only at a pinned commit; set revision=COMMIT beside it",
        )


@dataclass(kw_only=True, slots=True)
class TeacherConfig(ModelConfig):
    path: str = "Qwen/Qwen2.5-1.5B-Instruct"
    system: str | None = None
    placement: Placement = Placement.same
    device: str | None = None
    quantization: Quantization = Quantization.none

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        on_another = self.placement is Placement.device
        require(
            on_another == (self.device is not None),
            "teacher.device",
            self.device,
            "teacher.placement=device and the device itself go together, for example teacher.placement=device teacher.device=cuda:1",
        )
        require(
            self.device is None or re.fullmatch(r"cpu|cuda:\d+", self.device) is not None,
            "teacher.device",
            self.device,
            "must be cpu or a GPU by its number, for example cuda:1",
        )
        quantized = self.quantization is not Quantization.none
        require(
            not quantized or self.placement in (Placement.same, Placement.device),
            "teacher.quantization",
            self.quantization.value,
            f"a quantised teacher is small: it is neither sharded nor offloaded; set teacher.placement=same, not {self.placement.value}",
        )
        require(
            not quantized or self.gguf_file is None,
            "teacher.quantization",
            self.quantization.value,
            "a GGUF file is expanded on loading; take the plain weights, or teacher.quantization=none",
        )


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    rank: int = 0
    alpha: int = 32
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "must be 0 (all weights are trained) or a rank (16 is usual)")
        require(self.alpha >= 1, "lora.alpha", self.alpha, "must be at least 1")
        require(bool(self.targets), "lora.targets", self.targets, "must name layers, for example [q_proj,v_proj], or [all-linear]")


@dataclass(kw_only=True, slots=True)
class DataConfig:
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
    max_prompt_tokens: int = 512
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    size: int = 2000
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", self.max_prompt_tokens, "must be at least 1")
        require(self.size >= 2, "data.size", self.size, "must be at least 2")
        name = self.source.value
        if self.source in (Source.jsonl, Source.parquet):
            require(self.train_path is not None, "data.train_path", self.train_path, f"data={name} needs data.train_path=FILE.{name}")
        if self.source is Source.hub:
            require(self.path is not None, "data.path", self.path, "data=hub needs data.path=OWNER/DATASET")
        if self.source is Source.gym:
            require(self.path is not None, "data.path", self.path, "data=gym needs data.path=TASK, for example data.path=chain_sum")


@dataclass(kw_only=True, slots=True)
class VllmConfig:
    url: str | None = None
    weights_folder: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        require(
            self.url is None or re.fullmatch(r"https?://[^/\s]+/?", self.url) is not None,
            "sampling.vllm.url",
            self.url,
            "must be a server's address, for example http://127.0.0.1:8000, or null for an engine in this process",
        )
        require(is_positive(self.timeout), "sampling.vllm.timeout", self.timeout, "must be above 0 seconds")


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    action: GuardAction = GuardAction.warn
    truncated: float = 0.95
    repetition: float = 0.5
    steps: int = 10

    def __post_init__(self) -> None:
        require(0 < self.truncated <= 1, "sampling.guard.truncated", self.truncated, "must be a share above 0 and at most 1")
        require(0 < self.repetition <= 1, "sampling.guard.repetition", self.repetition, "must be a share above 0 and at most 1")
        require(self.steps >= 1, "sampling.guard.steps", self.steps, "must be at least 1")


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    engine: Engine = Engine.auto
    dtype: SamplingDtype = SamplingDtype.auto
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    n: int = 4
    max_new_tokens: int = 256
    max_new_tokens_schedule: dict[int, int] = field(default_factory=dict)
    truncated: Truncated = Truncated.keep
    batch_size: int = 64
    static_cache: bool | None = None
    memory_share: float = 0.3
    max_gap: float = 0.1
    lag: int = 0
    guard: GuardConfig = field(default_factory=GuardConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        require(
            is_positive(self.temperature),
            "sampling.temperature",
            self.temperature,
            "must be above 0: the method needs samples with a log-probability (0.6 to 1.0 is usual)",
        )
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "must be above 0 and at most 1 (1 is off)")
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "must be 0 (off) or a number of tokens")
        require(self.n >= 1, "sampling.n", self.n, "must be at least 1")
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(
            all(step >= 0 and 1 <= tokens <= self.max_new_tokens for step, tokens in self.max_new_tokens_schedule.items()),
            "sampling.max_new_tokens_schedule",
            self.max_new_tokens_schedule,
            f"must give steps and from 1 to sampling.max_new_tokens={self.max_new_tokens} tokens, for example {{0:64,100:256}}",
        )
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "must be at least 1")
        require(
            not self.static_cache or self.engine in (Engine.auto, Engine.generate),
            "sampling.static_cache",
            self.static_cache,
            f"is generate's; sampling.engine={self.engine.value} has a cache of its own",
        )
        require(0 < self.memory_share < 1, "sampling.memory_share", self.memory_share, "must be between 0 and 1 (0.3 is usual)")
        require(is_positive(self.max_gap), "sampling.max_gap", self.max_gap, "must be above 0 nats")
        require(self.lag in (0, 1), "sampling.lag", self.lag, "must be 0 or 1 steps")
        require(
            self.lag == 0 or self.vllm.url is not None,
            "sampling.lag",
            self.lag,
            "the next step is sampled during this one's update only by a server: set sampling.engine=vllm and sampling.vllm.url, or lag=0",
        )

    @property
    def by_server(self) -> bool:
        """Whether another program samples, which needs the student's weights."""
        return self.engine is Engine.vllm and self.vllm.url is not None

    def new_tokens(self, step: int) -> int:
        """The most new tokens of a completion at `step`: those of the last entry of the schedule that has begun, else max_new_tokens."""
        begun = [begin for begin in self.max_new_tokens_schedule if begin <= step]
        return self.max_new_tokens_schedule[max(begun)] if begun else self.max_new_tokens


@dataclass(kw_only=True, slots=True)
class PPOConfig:
    estimator: Estimator = Estimator.sampled
    divergence: Divergence = Divergence.reverse_kl
    steps: int = 1
    clip_eps: float = 0.2
    clip_eps_high: float | None = None
    advantage_clip: float | None = 5.0
    importance_cap: float | None = 2.0
    reduction: Reduction = Reduction.token
    beta: float = 0.5
    alpha: float = 0.1
    k: int = 64
    baseline: bool = False
    discount: float = 0.0
    loss_prefix: int | None = None
    reward_coef: float = 0.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "ppo.steps", self.steps, "must be at least 1")
        require(is_positive(self.clip_eps), "ppo.clip_eps", self.clip_eps, "must be above 0 (0.2 is usual)")
        if self.clip_eps_high is not None:
            require(is_positive(self.clip_eps_high), "ppo.clip_eps_high", self.clip_eps_high, "must be above 0, or null for clip_eps")
        require(0 <= self.discount <= 1, "ppo.discount", self.discount, "must be between 0 (each token by itself) and 1")
        require(math.isfinite(self.reward_coef) and self.reward_coef >= 0, "ppo.reward_coef", self.reward_coef, "must not be negative")
        only_sampled = {"ppo.baseline": self.baseline, "ppo.discount": self.discount, "ppo.reward_coef": self.reward_coef}
        for key, value in only_sampled.items():
            require(
                not value or self.estimator is Estimator.sampled, key, value, "is for ppo.estimator=sampled; the others have no advantage"
            )
        if self.loss_prefix is not None:
            require(self.loss_prefix >= 1, "ppo.loss_prefix", self.loss_prefix, "must be at least 1 token, or null for all")
        if self.advantage_clip is not None:
            require(is_positive(self.advantage_clip), "ppo.advantage_clip", self.advantage_clip, "must be above 0, or null for none")
        if self.importance_cap is not None:
            require(is_positive(self.importance_cap), "ppo.importance_cap", self.importance_cap, "must be above 0, or null for none")
        require(0 <= self.beta <= 1, "ppo.beta", self.beta, "must be between 0 (forward KL) and 1 (reverse KL)")
        require(0 <= self.alpha < 1, "ppo.alpha", self.alpha, "must be at least 0 (reverse KL) and below 1")
        require(self.k >= 1, "ppo.k", self.k, "must be at least 1 (16 to 64 is usual)")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 10
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require(is_positive(self.lr), "optim.lr", self.lr, "must be above 0 (1e-5 to 5e-5 is usual for all weights)")
        require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must not be negative"
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "must be two numbers in [0, 1), for example [0.9,0.95]",
        )
        require(is_positive(self.eps), "optim.eps", self.eps, "must be above 0")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        require(is_positive(self.max_grad_norm), "optim.max_grad_norm", self.max_grad_norm, "must be above 0 (1.0 is usual)")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    max_steps: int | None = 200
    epochs: float | None = None
    batch_size: int = 4
    max_tokens_per_micro_batch: int = 8192
    packing: bool | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    watchdog_minutes: float | None = None

    def __post_init__(self) -> None:
        require(
            (self.max_steps is None) != (self.epochs is None),
            "train.max_steps",
            self.max_steps,
            "set one of train.max_steps and train.epochs, and the other to null",
        )
        if self.max_steps is not None:
            require(self.max_steps >= 1, "train.max_steps", self.max_steps, "must be at least 1")
        if self.epochs is not None:
            require(is_positive(self.epochs), "train.epochs", self.epochs, "must be above 0")
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "must be at least 1 prompt per process")
        require(
            self.max_tokens_per_micro_batch >= 1,
            "train.max_tokens_per_micro_batch",
            self.max_tokens_per_micro_batch,
            "must be at least 1 (a single longer sequence makes a micro-batch of its own)",
        )
        if self.watchdog_minutes is not None:
            require(
                is_positive(self.watchdog_minutes), "train.watchdog_minutes", self.watchdog_minutes, "must be above 0, or null for none"
            )


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    steps: int = 50
    limit: int | None = 500
    reward: str | None = "number"
    temperature: float = 0.0
    max_new_tokens: int = 512
    batch_size: int = 256
    kl_prompts: int = 32
    kl_max_new_tokens: int = 128
    samples: int = 1
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.steps >= 0, "eval.steps", self.steps, "must be 0 (only before and after training) or a number of steps")
        if self.limit is not None:
            require(self.limit >= 1, "eval.limit", self.limit, "must be at least 1, or null for the whole set")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "eval.temperature",
            self.temperature,
            "must be 0 (greedy) or above",
        )
        require(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(self.batch_size >= 1, "eval.batch_size", self.batch_size, "must be at least 1")
        require(self.kl_prompts >= 0, "eval.kl_prompts", self.kl_prompts, "must be 0 (off) or a number of prompts")
        require(self.kl_max_new_tokens >= 1, "eval.kl_max_new_tokens", self.kl_max_new_tokens, "must be at least 1")
        require(self.samples >= 1, "eval.samples", self.samples, "must be at least 1")
        require(
            self.samples == 1 or self.temperature > 0,
            "eval.samples",
            self.samples,
            "greedy answers are all alike: set eval.temperature (0.7 is usual), or eval.samples=1",
        )
        for name, options in self.tasks.items():
            require(
                bool(options) and all(key.split(".")[0] in ("data", "eval") for key in options),
                f"eval.tasks.{name}",
                options,
                "must give options of data and eval, for example {data: arithmetic, eval: arithmetic, data.seed: 1}",
            )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 50
    keep_last: int = 2
    keep_best: bool = True
    background: bool = False

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    tool: Tracker = Tracker.none
    project: str = "opd"
    rollouts_per_step: int = 2
    alternatives: int = 5

    def __post_init__(self) -> None:
        require(self.alternatives >= 0, "track.alternatives", self.alternatives, "must be 0 (none) or a number of tokens (5 is usual)")
        require(self.rollouts_per_step >= 0, "track.rollouts_per_step", self.rollouts_per_step, "must not be negative")


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    processes: int | None = None
    config_file: str | None = None

    def __post_init__(self) -> None:
        if self.processes is not None:
            require(self.processes >= 1, "launch.processes", self.processes, "must be at least 1, or null")

    @property
    def several(self) -> bool:
        """Whether a launcher is asked for."""
        return (self.processes or 1) > 1 or self.config_file is not None


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    metric: str = AUTO
    direction: Direction = Direction.maximize

    def __post_init__(self) -> None:
        require(
            self.metric == AUTO or self.metric in METRICS,
            "sweep.metric",
            self.metric,
            f"must be {AUTO} or a number of summary.json: {', '.join(METRICS)}",
        )
        better = METRICS.get(self.metric, Direction.maximize) or self.direction
        require(
            self.direction is better,
            "sweep.direction",
            self.direction.value,
            f"sweep.metric={self.metric} is the better the {'larger' if better is Direction.maximize else 'smaller'} it is: "
            f"set sweep.direction={better.value}",
        )


@dataclass(kw_only=True, slots=True)
class Config:
    seed: int = 0
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
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be between 0 and 4294967295")
        require(
            re.fullmatch(r"[\w+=,@-][\w.+=,@-]*", self.name) is not None,
            "name",
            repr(self.name),
            "letters, digits and . _ - + = , only: it names the run folder",
        )
        require(
            not self.shares_base or self.teacher.system is not None,
            "lora.rank",
            self.lora.rank,
            "with model.path and teacher.path alike, the teacher is the student without its adapter and has nothing to teach; give it a "
            "prompt of its own with teacher.system='…' (context distillation), or another teacher",
        )
        elsewhere = self.teacher.placement is not Placement.same or self.teacher.quantization is not Quantization.none
        require(
            not self.shares_base or not elsewhere,
            "teacher.placement",
            self.teacher.placement.value,
            "the teacher is the student's own base here, which stays where the student is; set teacher.placement=same and "
            "teacher.quantization=none",
        )
        require(
            self.sampling.lag == 0 or self.ppo.importance_cap is not None,
            "ppo.importance_cap",
            self.ppo.importance_cap,
            "sampling.lag=1 draws with weights of the step before; set an importance_cap (2.0 is usual), or lag=0",
        )
        truncated = self.sampling.top_p < 1 or self.sampling.top_k > 0
        if self.ppo.estimator is Estimator.sampled:
            require(
                self.sampling.top_k != 1,
                "sampling.top_k",
                1,
                "leaves a single token to draw, so the advantage has no expectation to follow",
            )
            require(
                not truncated or self.ppo.importance_cap is not None,
                "ppo.importance_cap",
                self.ppo.importance_cap,
                "top-p and top-k draw from another distribution than is scored; set an importance_cap (2.0 is usual), or top_p=1 top_k=0",
            )
            require(
                not truncated or self.ppo.discount == 0,
                "ppo.discount",
                self.ppo.discount,
                "sums the sampler's log-probs over later tokens, which top-p and top-k distort; set top_p=1 top_k=0, or discount=0",
            )
        require(
            self.ppo.reward_coef == 0 or (self.eval.reward is not None and self.sampling.n > 1),
            "ppo.reward_coef",
            self.ppo.reward_coef,
            "compares the rewards of a prompt's completions: set eval.reward and sampling.n above 1",
        )
        if self.sampling.engine is Engine.vllm:
            for key, temperature in {"sampling.temperature": self.sampling.temperature, "eval.temperature": self.eval.temperature}.items():
                require(
                    temperature == 0 or 0.01 <= temperature <= 2,
                    key,
                    temperature,
                    "vLLM takes temperatures from 0.01 to 2, and 0",
                )
        for metrics, setting, off in (
            (("reward_before", "reward_after", "reward_teacher", "gap_closed"), "eval.reward=null", self.eval.reward is None),
            (("eval_kl_before", "eval_kl_after"), "eval.kl_prompts=0", self.eval.kl_prompts == 0),
        ):
            fits = not (off and self.sweep.metric in metrics)
            require(fits, "sweep.metric", self.sweep.metric, f"is not measured with {setting}")
        require(bool(self.resume.strip()), "resume", repr(self.resume), "must be auto, never or the path of a checkpoint")

    @property
    def shares_base(self) -> bool:
        """Whether the teacher is the student's base with the adapter off, and no second copy is loaded."""
        mine = (self.model.path, self.model.revision, self.model.gguf_file)
        return self.lora.rank > 0 and mine == (self.teacher.path, self.teacher.revision, self.teacher.gguf_file)


# Options of earlier versions, and what to use instead.
REMOVED: dict[str, str] = {}
