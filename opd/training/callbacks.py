"""What the callbacks of the Python API get: the run's events, or the calls and the state of `transformers.TrainerCallback`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from opd.config.schema import Config
from opd.models.distributed import in_main_process
from opd.training.evaluation import Evaluation
from opd.training.events import Evaluated, Event, Rewound, Saved, StepDone
from opd.training.logs import evaluation_log, read_history

Callback = Callable[[Event], object] | TrainerCallback | type[TrainerCallback]


@dataclass(frozen=True, slots=True)
class CallbackArguments:
    """What a run has of `transformers.TrainingArguments`, under the same names. A real one would start processes of its own.

    `metric_for_best_model`: `eval_reward` where answers are judged, else `eval_kl`.
    """

    output_dir: str
    max_steps: int
    eval_steps: int
    save_steps: int
    per_device_train_batch_size: int
    learning_rate: float | None
    max_grad_norm: float
    seed: int
    metric_for_best_model: str
    greater_is_better: bool
    logging_steps: int = 1
    num_train_epochs: float = 1.0
    eval_strategy: str = "steps"
    save_strategy: str = "steps"
    logging_strategy: str = "steps"
    load_best_model_at_end: bool = False
    disable_tqdm: bool = True

    @classmethod
    def of(cls, config: Config, folder: Path, has_rewards: bool) -> "CallbackArguments":
        """Return those of a run in `folder`. `has_rewards`: whether completions of evaluation prompts are judged."""
        return cls(
            output_dir=str(folder),
            max_steps=config.train.max_steps or -1,
            eval_steps=config.eval.steps,
            save_steps=config.checkpoint.every,
            per_device_train_batch_size=config.train.batch_size,
            learning_rate=config.optim.lr,
            max_grad_norm=config.optim.max_grad_norm,
            seed=config.seed,
            metric_for_best_model="eval_reward" if has_rewards else "eval_kl",
            greater_is_better=has_rewards,
        )


@dataclass(slots=True)
class CallbackHandler:
    """Keeps the state of a run and calls its callbacks with every event.

    Args:
        objects: `model` and `processing_class`, as the callbacks of transformers get them.
        begun: Whether there was an event.
        saved: The step of the last checkpoint.
    """

    callbacks: list[Callable[[Event], object] | TrainerCallback]
    args: CallbackArguments
    objects: Mapping[str, Any]
    state: TrainerState = field(default_factory=TrainerState)
    control: TrainerControl = field(default_factory=TrainerControl)
    begun: bool = False
    saved: int | None = None

    def __call__(self, event: Event) -> bool:
        """Pass an event on. Returns whether a callback asks to stop."""
        if not self.begun:
            self.begin(event)
        match event:
            case StepDone():
                self.state.global_step, self.state.epoch = event.step, event.metrics["epoch"]
                self.state.log_history.append({"step": event.step, **event.metrics})
                self.notify("on_step_end")
                self.notify("on_log", logs=dict(event.metrics))
            case Evaluated():
                if metrics := evaluation_log(event.evaluation.to_dict()):  # none without evaluation prompts
                    self.state.log_history.append({"step": event.evaluation.step, **metrics})
                    self.notify("on_log", logs=dict(metrics))
                    self.notify("on_evaluate", metrics=dict(metrics))
                self.note_best(event.evaluation)
            case Saved():
                if event.step != self.saved:  # the periodic checkpoint, and then the best one
                    self.notify("on_save")
                self.saved = event.step
            case Rewound():
                self.saved = None
                self.state.global_step = event.step
                self.state.log_history = [line for line in self.state.log_history if line["step"] <= event.step]
        for callback in self.callbacks:
            if not isinstance(callback, TrainerCallback):
                callback(event)
        return self.control.should_training_stop

    def begin(self, event: Event) -> None:
        """Start with the history of the steps from which a run is resumed. The event itself may be in the logs already."""
        self.begun, self.saved, self.control, is_evaluation = True, None, TrainerControl(), isinstance(event, Evaluated)
        step = event.evaluation.step if isinstance(event, Evaluated) else event.step
        history = read_history(Path(self.args.output_dir))
        earlier = [line for line in history if line["step"] < step or (is_evaluation and line["step"] == step and "tokens" in line)]
        self.state.global_step = step if is_evaluation else step - 1
        self.state.max_steps, self.state.log_history = self.args.max_steps, earlier
        self.state.is_world_process_zero = self.state.is_local_process_zero = in_main_process()
        self.notify("on_train_begin")

    def notify(self, method: str, **values: Any) -> None:
        for callback in self.callbacks:
            if isinstance(callback, TrainerCallback):
                result = getattr(callback, method)(self.args, self.state, self.control, **self.objects, **values)
                self.control = self.control if result is None else result

    def note_best(self, evaluation: Evaluation) -> None:
        """Keep the best evaluation in the state, after the callbacks that compare with the one before."""
        rewards = evaluation.rewards
        value = (None if rewards is None else rewards.mean) if self.args.greater_is_better else evaluation.kl
        best = self.state.best_metric
        if value is not None and (best is None or (value > best if self.args.greater_is_better else value < best)):
            self.state.best_metric, self.state.best_global_step = value, evaluation.step
