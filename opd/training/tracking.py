"""Trackers: what Accelerate is told of a run. `metrics.jsonl` has all of it, whatever is tracked."""

from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator

from opd.config.compose import to_dict
from opd.config.schema import Config, Tracker
from opd.errors import ConfigError
from opd.runs.reader import flatten
from opd.training.evaluate import Evaluation


def check_tracker(tool: Tracker) -> None:
    """Raises `ConfigError` before the run when the tracker's package is missing."""
    if tool is not Tracker.none and find_spec(tool.value) is None:
        extra = "track" if tool in (Tracker.tensorboard, Tracker.wandb) else tool.value
        raise ConfigError(f"track.tool={tool.value}: the package is not installed: pip install 'opd[{extra}]'")


def start_tracking(config: Config, accelerator: Accelerator, folder: Path) -> None:
    if config.track.tool is not Tracker.none:
        own = {
            "wandb": {"dir": str(folder), "name": config.name},
            "trackio": {"name": config.name},
            "mlflow": {"run_name": config.name},
            "swanlab": {"experiment_name": config.name, "logdir": str(folder / "swanlab")},
        }
        accelerator.init_trackers(config.track.project, config=options(config), init_kwargs=own)


def options(config: Config) -> dict[str, int | float | str | bool]:
    """Under dotted names, values that every tracker takes."""
    return {name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in flatten(to_dict(config)).items()}


def tracked(evaluation: Evaluation) -> dict[str, float]:
    values = {} if evaluation.rewards is None else {"eval/reward": evaluation.rewards.mean, "eval/length": evaluation.rewards.length}
    return values if evaluation.kl is None else {**values, "eval/kl": evaluation.kl}
