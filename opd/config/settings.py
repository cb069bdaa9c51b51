"""All groups of options, and what follows from several of them."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from opd.config.options import (
    TEACHER_OPTIONS,
    CheckpointConfig,
    Control,
    DataConfig,
    Device,
    Estimator,
    EvalConfig,
    LaunchConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SamplingConfig,
    SweepConfig,
    TeacherConfig,
    TeacherWeights,
    TrackConfig,
    TrainConfig,
    naming_dataset,
    naming_teacher,
)
from opd.config.section import Section, bounded
from opd.config.several import overlay
from opd.errors import ConfigError


class _KeepsParts(Section):
    """A place for `Settings.parts` that is no option: it is neither compared nor stored, and `replace` leaves it out."""

    __slots__ = ("_parts",)
    _parts: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Settings(_KeepsParts):
    """The options of a run, without the rules between them, which `Config` adds."""

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

    # Several datasets and teachers.

    @property
    def parts(self) -> dict[str, Self]:
        """The run on each dataset of `data.mix` alone, by label, with the teacher of its rows as `teacher`; without any {"": this run}.

        They are made once, of the options as they are then: entries are parsed and checked.
        """
        if not self.data.mix:
            return {"": self}
        if not hasattr(self, "_parts"):
            self._parts = self._make_parts()  # type: ignore[misc]  # a slot of the base class
        return self._parts

    def _make_parts(self) -> dict[str, Self]:
        parts, ppo = {}, replace(self.ppo, temperature=self.temperature)
        for label, data in self.data.datasets.items():
            train = self.train if data.completion is not None else replace(self.train, given_share=0.0)
            with naming_dataset(label), naming_teacher(self.teacher_of(label)):
                parts[label] = replace(self, data=data, teacher=self.labelled_teacher(label), teachers={}, ppo=ppo, train=train)
        return parts

    @property
    def parts_by_teacher(self) -> dict[str, Self]:
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

    @property
    def is_served(self) -> bool:
        """Whether a server has a teacher of the run."""
        own = any(isinstance(entry, dict) and entry.get("url") is not None for entry in self.teachers.values())
        is_used = not self.data.mix or any(label not in self.teachers for label in self.data.mix)
        return own or (is_used and self.teacher.url is not None)
