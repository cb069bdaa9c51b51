"""On-policy distillation from Python, on the same runner as the command line."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opd.config.compose import refuse_unread, removed, to_unchecked_config
from opd.config.options import Quantization, TeacherWeights, naming_teacher
from opd.config.schema import Config
from opd.config.templates import columns_of
from opd.data.rewards import best
from opd.data.rows import extract_answers
from opd.errors import ConfigError
from opd.runs.folder import FINAL
from opd.runs.reader import open_run
from opd.training import runner
from opd.training.events import Evaluated, Event, StepDone
from opd.training.inputs import Given
from opd.training.logs import evaluation_metrics

Model = str | Path | PreTrainedModel
Reward = str | Callable[[str, str], float | None]


@dataclass(slots=True)
class TrainerState:
    """Where a run stands. `log_history`: metrics of each step and evaluation, as dictionaries with their `step`."""

    global_step: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)


class OnPolicyDistillationTrainer:
    """Trains `model` towards `teacher_model` on completions that it samples itself.

    Args:
        model, teacher_model: A hub id, a folder, or a loaded causal language model; the student is trained in place and ends in float32.
        train_dataset, eval_dataset: Rows with `prompt` (a text or a list of chat messages) and, where they are judged, `answer` (or
            a list of accepted ones) or `get_reward`, a function from the completion's text to a float or None. Rows are mappings, or
            objects with these attributes, and those that `teacher.prompt` and `teacher.contrast` name.
        tokenizer: Needed with a loaded model whose folder is not known.
        eval_steps: Steps between evaluations; 0 for only before and after training.
        reward: Judges completions of rows with an `answer`: `exact`, `number`, `math`, `module:function`, or a function of completion and
            answer.
        ppo_steps: Optimizer steps on each batch of completions.
        clip_eps: PPO's clip range.
        batch_size: Prompts per process and step, each sampled `samples_per_prompt` times.
        output_dir: The run folder; a run that was interrupted there is resumed.
        use_accelerate: False requires a single process; it is an error under a launcher of several.
        callbacks: Called with every event of the run (`opd.training.events.Event`).
        options: Any other option of the configuration by its dotted name, for example {"ppo.advantage_clip": 2.0, "seed": 1}.

    Raises:
        ConfigError: Options are wrong or do not fit together.
    """

    def __init__(
        self,
        model: Model,
        teacher_model: Model,
        train_dataset: Sequence[Any],
        eval_dataset: Sequence[Any] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_steps: int = 50,
        reward: Reward = "number",
        ppo_steps: int = 1,
        clip_eps: float = 0.2,
        sampling_temperature: float = 0.7,
        max_new_tokens: int = 256,
        batch_size: int = 4,
        samples_per_prompt: int = 4,
        max_grad_norm: float = 1.0,
        learning_rate: float = 1e-5,
        max_steps: int = 200,
        output_dir: str | Path = "runs/from-python",
        use_accelerate: bool = True,
        callbacks: Sequence[Callable[[Event], None]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if not use_accelerate and processes > 1:
            raise ConfigError(f"use_accelerate=False, but a launcher started {processes} processes: set use_accelerate=True")
        self.output_dir = Path(output_dir)
        self.callbacks = list(callbacks)
        self.state = TrainerState()
        texts = ("teacher.prompt", "teacher.contrast", "data.prompt", "data.system")
        named = [name for option in texts for name in columns_of((options or {}).get(option))]
        named += [name for option in ("data.completion", "data.system") if (name := (options or {}).get(option)) is not None]
        self.given = Given(
            student=model if isinstance(model, PreTrainedModel) else None,
            teacher=teacher_model if isinstance(teacher_model, PreTrainedModel) else None,
            tokenizer=tokenizer,
            train_rows=as_rows(train_dataset, reward, named),
            eval_rows=as_rows(eval_dataset or [], reward, named),
        )
        self.config: Config = from_options(
            {
                "name": self.output_dir.name,
                "model.path": path_of(model),
                "teacher.path": path_of(teacher_model),
                "data.source": "python",
                "data.path": None,
                "data.subset": None,
                "data.prompt": "prompt",
                "data.answer": "answer",
                "data.answer_after": None,
                "eval.steps": eval_steps,
                "eval.reward": reward if isinstance(reward, str) else "exact",
                "eval.max_new_tokens": max_new_tokens,
                "ppo.steps": ppo_steps,
                "ppo.clip_eps": clip_eps,
                "sampling.temperature": sampling_temperature,
                "sampling.max_new_tokens": max_new_tokens,
                "sampling.n": samples_per_prompt,
                "train.batch_size": batch_size,
                "train.max_steps": max_steps,
                "optim.max_grad_norm": max_grad_norm,
                "optim.lr": learning_rate,
                **(options or {}),
            },
            options or {},
        )
        if self.config.launch.several:
            raise ConfigError("launch: processes for Python code are started by a launcher: accelerate launch YOUR_SCRIPT")

    def train(self) -> dict[str, Any]:
        """Train to the end and return the summary, which is also in `output_dir/summary.json`.

        A loaded model holds the trained weights afterwards, also when the run was finished before.

        Raises:
            OpdError: Anything but a defect of opd.
        """
        summary = runner.train(self.config, self.output_dir, self.given, self.on_event)
        if not self.state.log_history:  # the run was finished before
            self.state = TrainerState(summary["steps"], list(open_run(self.output_dir).metrics))
            if self.given.student is not None and self.config.lora.rank == 0:
                load_model(self.given.student.float(), str(self.output_dir / FINAL / "model.safetensors"), strict=False)
        return summary

    def evaluate(self) -> dict[str, float]:
        """Evaluate the model as it is now and return `eval/reward`, `eval/length` and `eval/kl`, as far as they are configured."""
        with tempfile.TemporaryDirectory() as folder:
            given, config = self.given, self.config
            if given.student is None and (self.output_dir / FINAL).is_dir():
                final = str((self.output_dir / FINAL).resolve())
                model = replace(config.model, path=final, revision=None, gguf_file=None)
                # Adapters are merged in it.
                config = replace(config, model=replace(model, adapter=None, quantization=Quantization.none))
            for label, part in config.parts_by_teacher.items():
                was_made = part.teacher_weights in (TeacherWeights.base, TeacherWeights.ema)
                if was_made and (self.output_dir / FINAL).is_dir():
                    remedy = f"the teacher was made from the student during the run and is gone: opd eval {self.output_dir}"
                    raise ConfigError(f"{naming_teacher(label)(part.weights_option)}: {remedy}")
            return runner.evaluate(config, Path(folder), given)

    @property
    def model(self) -> PreTrainedModel:
        """The student: the module that was given, else what the run exported."""
        if self.given.student is not None:
            return self.given.student
        exported: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.final_folder())
        return exported

    def save_model(self, folder: str | Path) -> None:
        """Write the trained model and its tokenizer as a Hugging Face folder."""
        AutoModelForCausalLM.from_pretrained(self.final_folder()).save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.final_folder()).save_pretrained(folder)

    def final_folder(self) -> Path:
        folder = self.output_dir / FINAL
        if not folder.is_dir():
            raise ConfigError(f"output_dir={self.output_dir}: the run has not finished; call train() first")
        return folder

    def on_event(self, event: Event) -> None:
        """Keep the metrics of the event and pass it on to the callbacks."""
        match event:
            case StepDone():
                self.state.global_step = event.step
                self.state.log_history.append({"step": event.step, **event.metrics})
            case Evaluated():
                self.state.log_history.append({"step": event.evaluation.step, **evaluation_metrics(event.evaluation)})
        for callback in self.callbacks:
            callback(event)


def as_rows(dataset: Sequence[Any], reward: Reward, named: Sequence[str] = ()) -> list[Mapping[str, Any]]:
    """Return the items of a dataset as mappings, judged by `reward` where it is a function. Raises `ConfigError` for other items.

    Args:
        named: Attributes of objects that are columns too.
    """
    rows: list[Mapping[str, Any]] = []
    for index, item in enumerate(dataset):
        row: dict[str, Any]
        if isinstance(item, Mapping):
            row = dict(item)
        else:
            row = {name: getattr(item, name) for name in ("prompt", "answer", "get_reward", *named) if hasattr(item, name)}
        if "prompt" not in row and not isinstance(item, Mapping):
            raise ConfigError(
                f"train_dataset, eval_dataset: item {index} is a {type(item).__name__}; give mappings with `prompt` and `answer`, or "
                "objects with these attributes"
            )
        if callable(reward) and row.get("answer") is not None and row.get("get_reward") is None:
            row["get_reward"] = bind_answers(
                reward, extract_answers(row["answer"], None, f"train_dataset, eval_dataset: item {index}: answer")
            )
        rows.append(row)
    return rows


def bind_answers(reward: Callable[[str, str], float | None], answers: tuple[str, ...]) -> Callable[[str], float | None]:
    return lambda completion: best(reward(completion, answer) for answer in answers)


def path_of(model: Model) -> str:
    """Return the hub id or folder of a model that was named or loaded."""
    return str(model.name_or_path or type(model).__name__) if isinstance(model, PreTrainedModel) else str(model)


def from_options(options: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Config:
    """Return the config with these options by dotted name, all others at their defaults. Raises `ConfigError`.

    Args:
        given: Those of `options` that must be read; None for all.
    """
    config = OmegaConf.structured(Config)
    for key, value in options.items():
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(removed(f"{key}={value}") or f"{key}={value!r}: {str(error).splitlines()[0]}") from None
    typed = to_unchecked_config(config)
    refuse_unread(typed, list(options if given is None else given), only_typed=True)
    return typed
