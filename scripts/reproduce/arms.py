"""Arms of equal time: `opd train`, or TRL's DistillationTrainer, with logs as those of a run.

`python arms.py FOLDER` is the process of a run of TRL, whose settings are in FOLDER/trl.json.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the opd of this checkout, whether or not another one is installed

from opd.errors import PREEMPTED  # noqa: E402
from opd.runs.folder import CHECKPOINTS, EVALUATIONS, FINAL, METRICS, RUN, STATUS, write_json, write_text  # noqa: E402
from opd.runs.reader import Run, is_run, open_run  # noqa: E402

NEVER = 1_000_000  # steps: the clock ends a run
POLL = 0.2  # seconds
SETTINGS = "trl.json"


def step_seconds(run: Run) -> float:
    """Return the time of the steps so far: evaluations, checkpoints and the start do not count."""
    return sum(line["time/step"] for line in run.metrics)


def train(folder: Path, options: dict[str, Any], enough: Callable[[Run], bool], to_the_end: bool = True) -> None:
    """Run `opd train` until `enough` of its logs, or its last step; continue what was interrupted.

    Args:
        options: Of opd, by their dotted names.
        to_the_end: Whether to end the run then, with an evaluation, rather than to leave it to other options.
    """
    command, log = [sys.executable, "-m", "opd.train", *words_of(options), f"hydra.run.dir='{folder}'"], log_of(folder)
    while not is_done(folder):
        if is_run(folder) and enough(open_run(folder)) and not to_the_end:
            return
        if is_run(folder) and enough(open_run(folder)):  # which is past its last step with this limit: it evaluates, and is done
            execute([*command, f"train.max_steps={len(open_run(folder).metrics)}", "resume_force=true"], log)
        else:
            execute(command, log, lambda: is_run(folder) and enough(open_run(folder)))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # 1.6 GB
    print(f"{folder.name}: done", file=sys.stderr, flush=True)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def words_of(options: dict[str, Any]) -> list[str]:
    """Return options as words of a command line, paths in quotes for Hydra."""
    shown = {name: f"'{value}'" if "/" in str(value) else value for name, value in options.items()}
    return [f"{name}={'null' if value is None else value}" for name, value in shown.items()]


def is_done(folder: Path) -> bool:
    return is_run(folder) and open_run(folder).status == "done"


def execute(command: Sequence[str], log: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Run a command with its output in `log`; send it SIGTERM once `stop` holds. Ends this script where the command fails."""
    log.parent.mkdir(exist_ok=True)
    stopped = False
    with log.open("a") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            while process.poll() is None:
                time.sleep(POLL)
                if not stopped and stop():
                    process.terminate()
                    stopped = True
        except BaseException:
            process.terminate()
            raise
    if process.returncode and not (stopped and process.returncode == PREEMPTED):
        lines = log.read_text().strip().splitlines()
        raise SystemExit(f"{log}: exit code {process.returncode}: {lines[-1] if lines else 'no output'}")


def train_trl(folder: Path, options: Mapping[str, Any], settings: Mapping[str, Any], minutes: float) -> None:
    """Run TRL in a process of its own.

    Args:
        options: Of the arms of opd: models, prompts, the longest completion, the seed, and how a student is evaluated.
        settings: Of TRL's `DistillationConfig` where they are not the defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, {"options": dict(options), "settings": dict(settings), "minutes": minutes})
    execute([sys.executable, __file__, str(folder)], log_of(folder))


def run_trl(folder: Path, options: Mapping[str, Any], settings: Mapping[str, Any], minutes: float) -> None:
    """Train with TRL until the time is over, evaluate as opd does, and leave logs as those of a run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from opd.config.compose import PACKAGE

    def load(path: str) -> Any:
        path = str(PACKAGE / "assets" / path.removeprefix("bundled:")) if path.startswith("bundled:") else path
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)

    (student, tokenizer), (teacher, _) = load(options["model.path"]), load(options["teacher.path"])
    rows = [json.loads(line) for line in Path(options["data.train_path"]).read_text().splitlines()]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row[options["data.prompt"]]}]} for row in rows])
    lines: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            lines.append({"step": state.global_step, "time/step": time.perf_counter() - self.begin, "memory/peak_bytes": peak()})
            if sum(line["time/step"] for line in lines) >= 60 * minutes:
                control.should_training_stop = True

    config = DistillationConfig(
        output_dir=str(folder / CHECKPOINTS),
        max_completion_length=options["sampling.max_new_tokens"],
        seed=options["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = DistillationTrainer(student, teacher, config, prompts, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    student.float().save_pretrained(folder / FINAL)
    tokenizer.save_pretrained(folder / FINAL)
    del trainer, student, teacher

    write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    evaluated = {"model": "student", **evaluate(folder, {**options, "model.path": str(folder / FINAL)}), "step": len(lines)}
    write_text(folder / EVALUATIONS, json.dumps(evaluated) + "\n")
    versions = {name: sys.modules[name].__version__ for name in ("trl", "torch", "transformers")}
    settings = json.loads(config.to_json_string())
    write_json(folder / RUN, {"config": {"seed": options["seed"], "trl": settings}, "content": versions})
    write_json(folder / STATUS, {"status": "done", "reason": "", "exit_code": 0})


def evaluate(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return opd's evaluation of the model that `options` name, with its KL to the teacher."""
    from opd.api import from_options
    from opd.models.accelerator import make_accelerator
    from opd.training.build import build
    from opd.training.checkpoint import Checkpoints
    from opd.training.events import Evaluated
    from opd.training.inputs import Given

    config = from_options(options)
    with ExitStack() as stack:
        built = build(config, make_accelerator(config, folder), Checkpoints(folder, 1, False), Given(), stack, None)
        found = [event.evaluation.to_dict() for event in built.trainer.evaluate() if isinstance(event, Evaluated)]
    return found[0]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_trl(Path(sys.argv[1]), **json.loads((Path(sys.argv[1]) / SETTINGS).read_text()))
