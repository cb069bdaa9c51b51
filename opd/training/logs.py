"""What a run logs: metrics for trackers and for `log_history`; and the watchdog for a run that hangs."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from opd.config.compose import to_dict
from opd.config.options import Tracker
from opd.config.schema import Config
from opd.errors import INTERNAL, ConfigError
from opd.runs.folder import EVALUATIONS, METRICS, read_lines
from opd.runs.reader import flatten

LAST_RESORT = 60.0  # seconds: faulthandler ends the process when another thread holds the GIL, so that the watchdog's thread cannot run
CHECKS = 20  # how often the watchdog's thread checks within the limit


def check_tracker(tool: Tracker) -> None:
    """Raise `ConfigError` if the tracker's package is not installed."""
    if tool is not Tracker.none and find_spec(tool.value) is None:
        extra = "track" if tool in (Tracker.tensorboard, Tracker.wandb) else tool.value
        raise ConfigError(f"track.tool={tool.value}: the package is not installed: pip install 'opd[{extra}]'")


def start_tracking(config: Config, accelerator: Accelerator, folder: Path) -> None:
    """Start the configured tracker through Accelerate, with all options under dotted names."""
    if config.track.tool is Tracker.none:
        return
    options = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flatten(to_dict(config)).items()}
    arguments = {
        "wandb": {"dir": str(folder), "name": config.name},
        "trackio": {"name": config.name},
        "mlflow": {"run_name": config.name},
        "swanlab": {"experiment_name": config.name, "logdir": str(folder / "swanlab")},
    }
    accelerator.init_trackers(config.track.project, config=options, init_kwargs=arguments)


def evaluation_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return an evaluation, as `Evaluation.to_dict` returns it, as metrics for the tracker."""
    metrics: dict[str, float] = {}
    results = {"eval": evaluation, **{f"eval/{label}": result for label, result in evaluation.get("datasets", {}).items()}}
    for prefix, result in results.items():
        if (rewards := result["rewards"]) is not None:
            metrics |= {f"{prefix}/reward": rewards["mean"], f"{prefix}/length": rewards["length"]}
        if result["kl"] is not None:
            metrics[f"{prefix}/kl"] = result["kl"]
        if (overlap := result.get("overlap")) is not None:
            metrics |= {f"{prefix}/overlap_{name}": overlap[name] for name in ("share", "mass")}
    return metrics


def evaluation_log(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return what `evaluation_metrics` does under the names that transformers gives such metrics: `eval_reward`, not `eval/reward`."""
    return {name.replace("/", "_"): value for name, value in evaluation_metrics(evaluation).items()}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step and of each evaluation of the student that a run folder has, in order of their `step`."""
    steps = [{name: value for name, value in line.items() if name != "by_position"} for line in read_lines(folder / METRICS)]
    found = [line for line in read_lines(folder / EVALUATIONS) if line["model"] == "student"]
    evaluations = [{"step": line["step"], **metrics} for line in found if (metrics := evaluation_log(line))]
    return sorted([*steps, *evaluations], key=lambda line: int(line["step"]))


@contextmanager
def watchdog(minutes: float | None, file: Path, report: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yield a function that must be called at least every `minutes`, or the process ends with exit code 70.

    Args:
        minutes: The limit; None watches nothing.
        file: Gets the stacks of all threads; removed if nothing happens.
        report: Called with the reason before the process ends. Not called if no Python code can run: then the exit code is 1.
    """
    if minutes is None:
        yield lambda: None
        return
    limit, last, over = 60 * minutes, time.monotonic(), threading.Event()

    def beat() -> None:
        nonlocal last
        last = time.monotonic()
        faulthandler.dump_traceback_later(limit + LAST_RESORT, exit=True, file=stacks)

    def watch() -> None:
        while not over.wait(limit / CHECKS):
            if time.monotonic() - last > limit:
                faulthandler.dump_traceback(stacks)
                try:
                    report(f"train.watchdog_minutes={minutes:g}: no step, evaluation or checkpoint finished; see the stacks in {file}")
                finally:
                    os._exit(INTERNAL)

    with file.open("w", encoding="utf-8") as stacks:
        beat()
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        try:
            yield beat
        finally:
            over.set()
            faulthandler.cancel_dump_traceback_later()
    if file.stat().st_size == 0:
        file.unlink()
