"""On-policy distillation from Python, on the same runner as the command line."""

import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from opd.config.compose import options as option_types
from opd.config.compose import refuse_unread, removed, to_unchecked_config
from opd.config.options import Quantization, TeacherWeights, naming_teacher
from opd.config.python_names import ARGUMENTS, naming_arguments, naming_unknown
from opd.config.schema import Config
from opd.config.several import describe_type, did_you_mean
from opd.config.templates import columns_of
from opd.data.grading import RewardFunction
from opd.data.python_rows import as_functions, as_rows
from opd.errors import ConfigError, DataError, OutputError
from opd.models.adapters import peft_options
from opd.models.load import load_tokenizer
from opd.runs.folder import CHECKPOINTS, FINAL
from opd.training import runner
from opd.training.callbacks import Callback, CallbackArguments, CallbackHandler
from opd.training.events import Event
from opd.training.inputs import Given
from opd.training.logs import read_history

DEFAULT_FOLDER = Path("runs/from-python")

Model = str | Path | PreTrainedModel


class OnPolicyDistillationTrainer:
    """Trains `model` towards `teacher_model` on completions that it samples itself.

    Args:
        model, teacher_model: A hub id, a folder, or a loaded causal language model. The student is trained in place, without its parameters
            that have `requires_grad=False`, and ends in float32; with `peft_config` its adapters are merged at the end.
        train_dataset, eval_dataset: Rows with `prompt` (a text or a list of chat messages) and, where they are judged, `answer` (or
            a list of accepted ones) or `get_reward`, a function from the completion's text to a float or None. Rows are mappings, or
            objects with these attributes, and those that `teacher.prompt` and `teacher.contrast` name. Any iterable that ends.
        processing_class: The student's tokenizer. Needed with a loaded model whose folder is not known.
        reward_funcs: Judges completions of rows with an `answer`: `exact`, `number`, `math`, `module:function`, or a function of completion
            and answer, or of what its parameters name (`opd.reward`), or several, whose rewards are summed. None: nothing is judged.
        peft_config: A `peft.LoraConfig`: low-rank adapters are trained instead of all weights.
        eval_steps: Steps between evaluations; 0 for only before and after training.
        ppo_steps: Optimizer steps on each batch of completions.
        clip_eps: PPO's clip range.
        learning_rate: AdamW's; None: one that follows from the number of parameters.
        batch_size: Prompts per process and step, each sampled `samples_per_prompt` times.
        output_dir: The run folder; a run that was interrupted there is resumed. None: a new one, `runs/from-python-2` for example.
        use_accelerate: False requires a single process; it is an error under a launcher of several.
        callbacks: As in `add_callback`.
        options: Any other option of the configuration by its dotted name, for example {"ppo.advantage_clip": 2.0, "seed": 1}.

    Raises:
        ConfigError: Arguments are wrong or do not fit together.
        DataError: There is nothing to train on.
    """

    @naming_unknown
    @naming_arguments()
    def __init__(
        self,
        model: Model,
        teacher_model: Model,
        train_dataset: Iterable[Any],
        eval_dataset: Iterable[Any] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_funcs: str | RewardFunction | Sequence[RewardFunction] | None = "number",
        peft_config: Any | None = None,
        eval_steps: int = 50,
        ppo_steps: int = 1,
        clip_eps: float = 0.2,
        sampling_temperature: float = 0.7,
        max_new_tokens: int = 256,
        batch_size: int = 16,
        samples_per_prompt: int = 1,
        max_grad_norm: float = 1.0,
        learning_rate: float | None = None,
        max_steps: int = 200,
        output_dir: str | Path | None = None,
        use_accelerate: bool = True,
        callbacks: Sequence[Callback] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if not use_accelerate and processes > 1:
            raise ConfigError(f"use_accelerate=False, but a launcher started {processes} processes: set use_accelerate=True")
        if output_dir is None and processes > 1:
            raise ConfigError("output_dir: name a folder; several processes cannot each take a new one")
        check_models(model, teacher_model, processing_class)
        check_options(options)
        called = as_callbacks(callbacks)
        rewards = as_functions(reward_funcs)
        texts = ("teacher.prompt", "teacher.contrast", "data.prompt", "data.system")
        named = [name for option in texts for name in columns_of((options or {}).get(option))]
        named += [name for option in ("data.completion", "data.system") if (name := (options or {}).get(option)) is not None]
        self.given = Given(
            student=model if isinstance(model, PreTrainedModel) else None,
            teacher=teacher_model if isinstance(teacher_model, PreTrainedModel) else None,
            tokenizer=processing_class,
            train_rows=as_rows(train_dataset, rewards, named, "train_dataset"),
            eval_rows=as_rows([] if eval_dataset is None else eval_dataset, rewards, named, "eval_dataset"),
            rewards=rewards,
        )
        arguments = {
            "model.path": path_of(model, "model"),
            "teacher.path": path_of(teacher_model, "teacher_model"),
            "eval.steps": eval_steps,
            "eval.reward": "exact" if rewards else reward_funcs,
            "ppo.steps": ppo_steps,
            "ppo.clip_eps": clip_eps,
            "sampling.temperature": sampling_temperature,
            "sampling.max_new_tokens": max_new_tokens,
            "sampling.n": samples_per_prompt,
            "train.batch_size": batch_size,
            "train.max_steps": max_steps,
            "optim.max_grad_norm": max_grad_norm,
            "optim.lr": learning_rate,
        }
        refuse_contradictions(arguments, options or {})
        config = from_options(
            {
                "name": run_name(DEFAULT_FOLDER if output_dir is None else output_dir),
                "data.source": "python",
                "data.path": None,
                "data.subset": None,
                "data.prompt": "prompt",
                "data.answer": "answer",
                "data.answer_after": None,
                "eval.max_new_tokens": max_new_tokens,
                **arguments,
                **({} if peft_config is None else peft_options(peft_config)),
                **(options or {}),
            },
            options or {},
        )
        if config.launch.several:
            raise ConfigError("launch: processes for Python code are started by a launcher: accelerate launch YOUR_SCRIPT")
        if not self.given.train_rows:
            raise DataError("train_dataset: it has no rows")
        self.is_new = output_dir is None
        self.output_dir = new_folder() if output_dir is None else Path(output_dir)
        self.config: Config = replace(config, name=run_name(self.output_dir))
        judged = any(row.get("answer") is not None or row.get("get_reward") is not None for row in self.given.eval_rows or ())
        self.handler = CallbackHandler(
            called,
            CallbackArguments.of(config, self.output_dir, judged and config.eval.reward is not None),
            {"model": self.given.student, "processing_class": processing_class},
        )

    @property
    def state(self) -> TrainerState:
        """Where the run stands. `log_history`: metrics of each step and evaluation, as dictionaries with their `step`."""
        return self.handler.state

    def add_callback(self, callback: Callback) -> None:
        """Add a function that is called with every event of the run (`opd.training.events.Event`), or a `transformers.TrainerCallback`.

        Of the latter `on_train_begin`, `on_step_end`, `on_log`, `on_evaluate`, `on_save` and `on_train_end` are called. They get the
        fields of `CallbackArguments`, and `model` where it was passed as a module. Of the control only `should_training_stop` counts: the
        run ends after the current step, with an evaluation, and its model is exported.

        Raises:
            ConfigError: It is neither.
        """
        self.handler.callbacks += as_callbacks([callback])

    @naming_arguments()
    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Train to the end and return the summary, which is also in `output_dir/summary.json`.

        A loaded model holds the trained weights afterwards, also when the run was finished before.

        Args:
            resume_from_checkpoint: None or True: resume what is in `output_dir`. False: refuse a folder that has a run. A path: one of the
                run's own checkpoints.

        Raises:
            OpdError: Anything but a defect of opd.
        """
        student, self.handler.begun = self.given.student, False
        with keep_requires_grad(student):
            summary = runner.train(self.resuming(resume_from_checkpoint), self.output_dir, self.given, self.handler)
        if self.handler.begun:
            self.handler.notify("on_train_end")
            return summary
        self.state.global_step, self.state.log_history = summary["steps"], read_history(self.output_dir)
        if student is not None:
            load_weights(student, self.output_dir / FINAL)
        return summary

    def resuming(self, start: bool | str | Path | None) -> Config:
        """Return the config with where to start. Raises `ConfigError` for another run's checkpoint."""
        if start is None:
            return self.config
        if start is True and self.is_new:
            raise ConfigError(
                "resume_from_checkpoint=True: pass the output_dir of the run to resume; without one each run has a new folder"
            )
        if isinstance(start, bool):
            return replace(self.config, resume="auto" if start else "never")
        folder = Path(start).resolve()
        if folder == self.output_dir.resolve():
            return self.config
        if folder.parent != (self.output_dir / CHECKPOINTS).resolve() or not folder.is_dir():
            own = self.output_dir / CHECKPOINTS / "step_…"
            raise ConfigError(f"resume_from_checkpoint={start}: not a checkpoint of this run ({own}); set output_dir to the run's folder")
        return replace(self.config, resume=str(folder))

    @naming_arguments()
    def evaluate(self) -> dict[str, float]:
        """Evaluate the model as it is now and return `eval_reward`, `eval_length` and `eval_kl`, as far as they are configured."""
        given, config = self.given, self.config
        if given.student is None and (self.output_dir / FINAL).is_dir():
            final = str((self.output_dir / FINAL).resolve())
            model = replace(config.model, path=final, revision=None, gguf_file=None)
            # Adapters are merged in it.
            config = replace(config, model=replace(model, adapter=None, quantization=Quantization.none))
        if given.student is not None and config.lora.rank:  # `train` adds adapters, and merges them
            config = replace(config, lora=replace(config.lora, rank=0))
        for label, part in config.parts_by_teacher.items():
            was_made = part.teacher_weights in (TeacherWeights.base, TeacherWeights.ema)
            if was_made and (self.output_dir / FINAL).is_dir():
                remedy = f"the teacher was made from the student during the run and is gone: opd eval {self.output_dir}"
                raise ConfigError(f"{naming_teacher(label)(part.weights_option)}: {remedy}")
        with tempfile.TemporaryDirectory() as folder, keep_requires_grad(given.student):
            if given.student is not None and self.config.lora.rank:
                given.student.requires_grad_(True)  # or nothing would be trained, which is refused
            return runner.evaluate(config, Path(folder), given)

    @property
    def model(self) -> PreTrainedModel:
        """The student: the module that was given, else what the run exported."""
        if self.given.student is not None:
            return self.given.student
        exported: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.final_folder())
        return exported

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return self.given.tokenizer or load_tokenizer(self.config.model, "model")

    def save_model(self, output_dir: str | Path) -> None:
        """Write the trained model, its tokenizer and its model card as a Hugging Face folder; the main process does."""
        if is_main_process():
            shutil.copytree(self.final_folder(), output_dir, dirs_exist_ok=True)

    def push_to_hub(self, repo_id: str, **arguments: Any) -> None:
        """Upload the trained model and its tokenizer to the Hugging Face hub; the main process does.

        Args:
            arguments: Of transformers' `push_to_hub`, such as `private`, `token` and `commit_message`.

        Raises:
            OutputError: The hub refuses it or cannot be reached.
        """
        if not is_main_process():
            return
        self.final_folder()
        try:
            parts: tuple[Any, ...] = (self.model, self.processing_class)
            for part in parts:
                part.push_to_hub(repo_id, **arguments)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise OutputError(f"push_to_hub: {repo_id}: {reason}; log in with `hf auth login`, or upload {self.final_folder()}") from error

    def final_folder(self) -> Path:
        folder = self.output_dir / FINAL
        if not folder.is_dir():
            raise ConfigError(f"output_dir={self.output_dir}: the run has not finished; call train() first")
        return folder


# Arguments.


def check_models(model: object, teacher_model: object, processing_class: object) -> None:
    """Raise `ConfigError` for what is no model or tokenizer, and for a loaded student without a known tokenizer."""
    for name, value in (("model", model), ("teacher_model", teacher_model)):
        if isinstance(value, str | Path | PreTrainedModel):
            continue
        if "peft" in sys.modules and isinstance(value, sys.modules["peft"].PeftModel):
            remedy = (
                "pass its base model with peft_config, or save the adapter and pass its folder: "
                f'options={{"{name.removesuffix("_model")}.adapter": FOLDER}}'
            )
            raise ConfigError(f"{name} is a {type(value).__name__}: {remedy}")
        raise ConfigError(f"{name} must be a hub id, a folder or a transformers PreTrainedModel, not {type(value).__name__}")
    if not isinstance(processing_class, PreTrainedTokenizerBase | None):
        raise ConfigError(f"processing_class must be a tokenizer of transformers, not {type(processing_class).__name__}")
    if isinstance(model, PreTrainedModel) and not model.name_or_path and processing_class is None:
        raise ConfigError("model: its folder is not known, and so is its tokenizer: pass processing_class")


def check_options(options: object) -> None:
    """Raise `ConfigError` for options that are not given by name."""
    if not isinstance(options, Mapping | None):
        raise ConfigError(f'options must be a mapping, for example {{"ppo.advantage_clip": 2.0}}, not {type(options).__name__}')


def as_callbacks(callbacks: object) -> list[Callable[[Event], object] | TrainerCallback]:
    """Return callbacks, an instance in place of each class. Raises `ConfigError` for what cannot be called."""
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks must be a list, for example [print], not {type(callbacks).__name__}")
    called = [callback() if isinstance(callback, type) else callback for callback in callbacks]
    for callback in called:
        if not (isinstance(callback, TrainerCallback) or callable(callback)):
            raise ConfigError(f"callbacks: {callback!r} must be a function of an event, or a transformers.TrainerCallback")
    return called


def run_name(folder: str | Path) -> str:
    """Return the name of the run in a folder: the folder's, with `-` for each character that a run's name cannot have."""
    if not str(folder).strip():
        raise ConfigError(f"output_dir={folder!r}: name a folder, or pass None for a new one")
    name = re.sub(r"[^\w.+=,@-]", "-", Path(folder).resolve().name) or "run"
    return f"-{name[1:]}" if name.startswith(".") else name


def new_folder() -> Path:
    """Create and return the first default run folder that does not exist."""
    number = 1
    while True:
        folder = DEFAULT_FOLDER if number == 1 else DEFAULT_FOLDER.with_name(f"{DEFAULT_FOLDER.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise OutputError(f"{folder}: cannot be created ({error.strerror}); set output_dir=FOLDER") from None
        else:
            return folder


# Models.


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a loaded model the weights of a run's export. Raises `ConfigError` where they do not fit."""
    exported = type(model).from_pretrained(folder, dtype="auto")
    try:
        nn.Module.to(model, exported.dtype).load_state_dict(exported.state_dict())
    except RuntimeError:
        raise ConfigError(f"model: the finished run's weights do not fit it; load {folder} instead") from None


@contextmanager
def keep_requires_grad(model: PreTrainedModel | None) -> Iterator[None]:
    """Restore after the block which of the model's parameters require gradients."""
    before = [] if model is None else [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def path_of(model: Model, argument: str) -> str:
    """Return the hub id or folder of a model that was named or loaded; of one from nowhere its class and the argument."""
    nowhere = f"{type(model).__name__} passed as {argument}"  # model and teacher_model are not the same one
    return str(model.name_or_path or nowhere) if isinstance(model, PreTrainedModel) else str(model)


def refuse_contradictions(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where an argument that is not at its default says other than `options`. `arguments`: by the option's name."""
    parameters = inspect.signature(OnPolicyDistillationTrainer).parameters
    for option in arguments.keys() & options.keys():
        value, argument = arguments[option], ARGUMENTS[option]
        if value not in (parameters[argument].default, options[option]):
            raise ConfigError(f"{argument}={value!r}: options has {options[option]!r} for it; leave one out")


def from_options(options: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Config:
    """Return the config with these options by dotted name, all others at their defaults. Raises `ConfigError`.

    Args:
        given: Those of `options` that must be read; None for all.
    """
    config, types = OmegaConf.structured(Config), option_types()
    for key, value in options.items():
        in_mapping = any(get_origin(kind) is dict and key.startswith(f"{name}.") for name, kind in types.items())
        if key not in types and not in_mapping:
            raise ConfigError(
                removed(f"{key}={value}") or f"{key}: no such option; {did_you_mean(key, types).removesuffix(' ')}".rstrip("; ")
            )
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            wrong = "" if key not in types or isinstance(value, Mapping) else f"must be {describe_type(types[key])}"
            reason = wrong or str(error).splitlines()[0]
            raise ConfigError(removed(f"{key}={value}") or f"{key}={value!r}: {reason}") from None
    typed = to_unchecked_config(config)
    refuse_unread(typed, list(options if given is None else given), only_typed=True)
    return typed
