"""On-policy distillation from Python, on the same runner as the command line."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.compose import to_config
from opd.config.schema import Config, removed
from opd.errors import ConfigError
from opd.training import runner
from opd.training.build import Given

Model = str | Path | PreTrainedModel


class OnPolicyDistillationTrainer:
    """Trains `model` towards `teacher_model` on completions that it samples itself.

    model, teacher_model: a hub id, a folder, or a loaded causal language model (which is trained in place, in float32).
    train_dataset, eval_dataset: rows with `prompt` (a text, or a list of chat messages), and where they are evaluated `answer` (judged by
    `reward`) or `get_reward`, a function from the completion's text to a float or None. tokenizer: needed with a loaded model whose folder
    is not known. eval_steps: steps between evaluations, 0 for only before and after. ppo_steps: optimizer steps on each batch of
    completions. batch_size: prompts per process and step, each sampled `samples_per_prompt` times. output_dir: the run folder; a run that
    was interrupted there goes on. use_accelerate: False promises one process, and raises `ConfigError` under a launcher of several.
    options: any other option of the configuration by its dotted name, for example {"ppo.advantage_clip": 2.0, "seed": 1}.

    Raises `ConfigError` for options that are wrong or do not fit together.
    """

    def __init__(
        self,
        model: Model,
        teacher_model: Model,
        train_dataset: Sequence[Mapping[str, Any]],
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_steps: int = 50,
        reward: str = "number",
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
        options: Mapping[str, Any] | None = None,
    ) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if not use_accelerate and processes > 1:
            raise ConfigError(f"use_accelerate=False, but a launcher started {processes} processes: set use_accelerate=True")
        self.output_dir = Path(output_dir)
        self.given = Given(
            student=model if isinstance(model, PreTrainedModel) else None,
            teacher=teacher_model if isinstance(teacher_model, PreTrainedModel) else None,
            tokenizer=tokenizer,
            train_rows=train_dataset,
            eval_rows=eval_dataset if eval_dataset is not None else [],
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
                "eval.reward": reward,
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
            }
        )

        if self.config.launch.several:
            raise ConfigError("launch: processes for Python code are started by a launcher: accelerate launch YOUR_SCRIPT")

    def train(self) -> dict[str, Any]:
        """Run to the end and return the summary that stands in `output_dir/summary.json`. Raises `OpdError` for all but defects."""
        return runner.train(self.config, self.output_dir, self.given)


def path_of(model: Model) -> str:
    """The hub id or folder of a model that was named or loaded."""
    return str(model.name_or_path or type(model).__name__) if isinstance(model, PreTrainedModel) else str(model)


def from_options(options: Mapping[str, Any]) -> Config:
    """The config with these options by dotted name, all others at their defaults. Raises `ConfigError`."""
    config = OmegaConf.structured(Config)
    for key, value in options.items():
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(removed(key, value) or f"{key}={value!r}: {str(error).splitlines()[0]}") from None
    return to_config(config)
