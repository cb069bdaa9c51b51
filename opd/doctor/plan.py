"""Choose options for a machine: `opd doctor --plan`.

Memory decides first: `Planner.fit` goes through the ways to train, from all weights to adapters on 4-bit weights, and for each through
settings that need less and less, and returns the first whose estimate fits. Then `opd.doctor.plan_time` chooses the length of completions
and the number of steps. Options that are typed on the command line stay as they are, and so do the estimator, the adapters and the learning
rate of an experiment.
"""

import operator
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from importlib.util import find_spec
from typing import Any

from rich.table import Table
from rich.text import Text

from opd.config.options import Estimator, OptimizerName, Placement, Quantization
from opd.config.schema import Config
from opd.doctor.machine import EXTRAS, TIGHT
from opd.errors import ConfigError
from opd.models.memory import Memory
from opd.runs.text import format_bytes, make_console

RANK = 16
# Tokens. On an H100 32,768 with recomputed activations were faster than 8,192 with kept ones, and smaller; a CPU gains nothing.
MICRO_BATCHES = {"cuda": (32768, 16384, 8192, 4096, 2048), "cpu": (8192, 4096, 2048, 1024)}
DECODED, FEWEST = ("sampling.batch_size", "eval.batch_size"), 8  # rows decoded at a time, and how few they may become
LEARNED = ("lora.rank", "model.quantization", "ppo.estimator", "optim.lr")  # kept where an experiment sets them
CHOSEN = (
    *("ppo.estimator", "sampling.max_new_tokens", "lora.rank", "model.quantization", "optim.name", "optim.lr", "teacher.placement"),
    *("train.max_tokens_per_micro_batch", "train.activation_checkpointing", *DECODED, "train.max_steps", "train.epochs"),
)


@dataclass(frozen=True, slots=True)
class Training:
    """A way to train."""

    name: str
    adapters: bool = False
    quantized: bool = False
    small_states: bool = False

    @property
    def missing(self) -> str:
        """Say how to install what it needs and is not there."""
        needed = {"peft": self.adapters, "bitsandbytes": self.quantized or self.small_states}
        extras = [EXTRAS[package] for package, is_needed in needed.items() if is_needed and find_spec(package) is None]
        return f"; to install: pip install 'opd[{','.join(extras)}]'" if extras else ""


# Adapters on int8 weights are not among them: they are larger than on nf4, and their merge has a larger gap.
TRAININGS = (
    Training("all weights, AdamW"),
    Training("all weights, 8-bit AdamW", small_states=True),
    Training("adapters", adapters=True),
    Training("adapters on quantised weights", adapters=True, quantized=True),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen about a subject, and why."""

    subject: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked of a plan.

    Attributes:
        words: options and groups as typed.
        minutes: what the run may take; None for any time.
        memory: bytes of another machine's device; None for this machine.
    """

    words: Sequence[str]
    minutes: float | None = None
    memory: int | None = None

    @property
    def typed(self) -> set[str]:
        return {word.lstrip("+~").partition("=")[0] for word in self.words}


@dataclass(slots=True)
class Planner:
    """Choose options, and record the choices.

    Attributes:
        typed: options and groups on the command line.
        device: `cuda` or `cpu`.
        free: bytes of the device that can still be used.
        memory_of: estimates a config.
        host: free bytes of main memory, for a teacher that is kept there; None for a machine that is not this one.
    """

    typed: Collection[str]
    device: str
    free: int
    memory_of: Callable[[Config], Memory]
    host: int | None = None
    choices: list[Choice] = field(default_factory=list)

    def fit(self, config: Config) -> Config:
        """Return the config with the first settings that fit into the memory.

        Raises:
            ConfigError: None do.
        """
        self.choices.clear()
        config = self.choose_estimator(config)
        too_large: list[str] = []
        for training in TRAININGS:
            settings = list(self.settings(config, training))
            if not settings:
                continue
            # The last one needs least: with a large model each estimate takes a second.
            if self.shrunk(settings[-1]) is None:
                smallest = self.changed(settings[-1], dict.fromkeys(DECODED, FEWEST)) or settings[-1]
                too_large.append(f"{training.name} {format_bytes(self.needed(smallest))} at least")
                continue
            found = next(fitting for setting in settings if (fitting := self.shrunk(setting)) is not None)
            self.explain(config, found, training, too_large)
            return found
        least = ", ".join(too_large) or "the options that are set allow none"
        remedy = "take a smaller student or teacher, lower sampling.max_new_tokens, or shard with launch.config_file"
        raise ConfigError(f"nothing fits into {TIGHT:.0%} of {format_bytes(self.free)} ({least}); {remedy}")

    def choose(self, subject: str, what: str, reason: str) -> None:
        self.choices.append(Choice(subject, what, reason))

    @property
    def room(self) -> int:
        return round(TIGHT * self.free)

    def needed(self, config: Config) -> int:
        return self.memory_of(config).needed

    def is_fixed(self, config: Config, option: str) -> bool:
        """Return whether an option stays as it is."""
        group = option.partition(".")[0]
        is_typed = option in self.typed or (group in self.typed and group in ("lora", "optim"))
        return is_typed or (option in LEARNED and read(config, option) != read(Config(), option))

    def changed(self, config: Config, options: Mapping[str, Any]) -> Config | None:
        """Return the config with those of the options that may change, or None where they do not fit together."""
        try:
            return with_options(config, {option: value for option, value in options.items() if not self.is_fixed(config, option)})
        except ConfigError:
            return None

    def choose_estimator(self, config: Config) -> Config:
        reason = "as configured"
        if not self.is_fixed(config, "ppo.estimator"):
            try:
                config = with_options(config, {"ppo.estimator": Estimator.exact})
                reason = "no sampling noise, for a few percent of a step"
            except ConfigError as error:
                reason = f"exact is not possible: {str(error).partition(': ')[2].partition(': ')[0]}"
        self.choose("estimator", config.ppo.estimator.value, reason)
        return config

    def settings(self, config: Config, training: Training) -> Iterator[Config]:
        """Yield the settings of a way to train, from the fastest to the smallest; none where fixed options exclude it."""
        wanted = {"lora.rank": training.adapters, "model.quantization": training.quantized}
        if not training.adapters:
            wanted["optim.name"] = training.small_states
        for option, value in wanted.items():
            is_on = read(config, option) not in (0, Quantization.none, OptimizerName.adamw)
            if self.is_fixed(config, option) and is_on != value:
                return
        options = {
            "lora.rank": RANK if training.adapters else 0,
            "model.quantization": Quantization.nf4 if training.quantized else Quantization.none,
            "optim.name": OptimizerName.adamw8bit if training.small_states else OptimizerName.adamw,
        }
        ladder: list[dict[str, Any]] = [{"train.max_tokens_per_micro_batch": tokens} for tokens in MICRO_BATCHES[self.device]]
        if self.device == "cuda":
            recomputed = [{**setting, "train.activation_checkpointing": True} for setting in ladder]
            ladder = [{**ladder[0], "train.activation_checkpointing": False}, *recomputed]
        start = self.changed(config, options)
        for placed in () if start is None else self.placements(start):
            yield from filter(None, (self.changed(placed, setting) for setting in ladder))

    def placements(self, config: Config) -> Iterator[Config]:
        """Yield the config with the teacher where it is, and in main memory if that has room for it and a GPU gains by it."""
        yield config
        at_hand = config.teacher.url is None and not config.teachers and config.teacher.placement is Placement.same
        offloaded = self.changed(config, {"teacher.placement": Placement.offload}) if at_hand and self.device == "cuda" else None
        if offloaded is None or offloaded == config:
            return
        size, smaller = (self.memory_of(placed).resident["teacher"] for placed in (config, offloaded))
        if smaller < size and (self.host is None or size <= TIGHT * self.host):
            yield offloaded

    def shrunk(self, config: Config) -> Config | None:
        """Return the config, with fewer rows decoded at a time where it would not fit otherwise; None if it never fits."""
        while True:
            memory = self.memory_of(config)
            if memory.needed <= self.room:
                return config
            of_update = {**memory.resident, **memory.update}
            if sum(of_update.values()) - sum(of_update.get(part, 0) for part in ("the process", "decode line")) > self.room:
                return None
            fewer = {option: max(FEWEST, read(config, option) // 2) for option in DECODED if read(config, option) > FEWEST}
            smaller = self.changed(config, fewer)
            if smaller is None or smaller == config:
                return None
            config = smaller

    def explain(self, before: Config, found: Config, training: Training, too_large: Sequence[str]) -> None:
        """Record the choices that `fit` made."""
        needed = f"needs {format_bytes(self.needed(found))} of {format_bytes(self.free)}"
        reason = f"{needed}; too large: {', '.join(too_large)}" if too_large else needed
        adapters = f", lora.rank={found.lora.rank}" if training.adapters else ""
        quantized = f", {found.model.quantization.value}" if training.quantized else ""
        self.choose("training", f"{training.name}{adapters}{quantized}", reason + training.missing)
        rate = "" if found.optim.lr is None else f", lr {found.optim.lr:g}"
        self.choose("optimizer", f"{found.optim.name.value}{rate}", self.of_optimizer(found, training))
        self.choose("teacher", *self.of_teacher(before, found))
        train = found.train
        recomputed = {True: ", activations recomputed", False: ", activations kept", None: ""}[train.activation_checkpointing]
        largest = train.max_tokens_per_micro_batch >= MICRO_BATCHES[self.device][0] and not train.activation_checkpointing
        reason = "the fastest" if largest else "the largest that fits"
        if self.is_fixed(found, "train.max_tokens_per_micro_batch"):
            reason = "as configured"
        self.choose("micro-batch", f"{train.max_tokens_per_micro_batch:,} tokens{recomputed}", reason)
        if any(read(found, option) != read(before, option) for option in DECODED):
            rows = f"{found.sampling.batch_size} rows, {found.eval.batch_size} in evaluations"
            self.choose("decoding", rows, "the caches of more do not fit")

    def of_optimizer(self, found: Config, training: Training) -> str:
        if training.small_states:
            return "2 bytes a weight in place of 8"
        if training.adapters:
            return "the states of adapters are small"
        return "16 bytes a weight fit" if found.optim.name is OptimizerName.adamw else "as configured"

    def of_teacher(self, before: Config, found: Config) -> tuple[str, str]:
        if found.teachers:
            return "as configured", "several teachers"
        if found.teacher.url is not None:
            return "served", "a server has its weights"
        if found.teaches_itself:
            return "the student", "it has no weights of its own"
        if found.teacher.placement is before.teacher.placement:
            is_same = found.teacher.placement is Placement.same
            return found.teacher.placement.value, "it fits next to the student" if is_same else "as configured"
        return "offload", "it does not fit next to the student: its layers are copied from main memory in turn"

    def to_dict(self, command: str) -> dict[str, Any]:
        return {"choices": [asdict(choice) for choice in self.choices], "command": command}


def read(config: Config, option: str) -> Any:
    return operator.attrgetter(option)(config)


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Return the config with other values of options of its groups. Raises `ConfigError` where they do not fit together."""
    groups: dict[str, Any] = {}
    for option, value in options.items():
        group, _, name = option.partition(".")
        groups.setdefault(group, {})[name] = value
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in groups.items()})


def train_command(words: Sequence[str], before: Config, planned: Config) -> str:
    """Return the command of the planned run: the words that were typed, and the options that differ from what they compose."""
    changed = [option for option in CHOSEN if read(before, option) != read(planned, option)]
    return shlex.join(["opd", "train", *words, *(f"{option}={shown(read(planned, option))}" for option in changed)])


def shown(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else f"{value}"


def show(plan: Mapping[str, Any]) -> None:
    """Print the choices with their reasons, and the command."""
    console, table = make_console(), Table.grid(padding=(0, 2))
    for choice in plan["choices"]:
        table.add_row(Text(choice["subject"]), Text(choice["what"], style="bold"), Text(choice["reason"]))
    console.print(Text("\nplan", style="bold"))
    console.print(table)
    print(f"\n{plan['command']}")
