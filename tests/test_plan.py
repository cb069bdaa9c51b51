"""`opd doctor --plan` chooses options that fit a machine, and prints the command of the run."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from opd import errors
from opd.api import from_options
from opd.cli import main as cli
from opd.config.options import Estimator, OptimizerName, Placement, Quantization
from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.doctor.plan import Planner, train_command
from opd.doctor.plan_time import Timing, fit_time
from opd.errors import ConfigError
from opd.models.memory import Memory

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft

GIB = 2**30
PROMPTS = [Prompt(index, (1,) * 100, "", ("1",)) for index in range(8)]
SIZES = {"0.5b": 0.49, "3b": 3.1, "7b": 7.6, "14b": 14.8}  # billion parameters
TINY = {"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-teacher"}


def bytes_of(config: Config) -> Memory:
    """Return a simple estimate in bf16 with float32 masters; that of a run measures layers, a minute for those of a 7B model."""
    student, teacher = (round(SIZES.get(model.path, 0.001) * 1e9) for model in (config.model, config.teacher))
    trained = student // 100 if config.lora.rank else student
    width = {Quantization.none: 2, Quantization.int8: 1, Quantization.nf4: 0.6}[config.model.quantization]
    states = 2 if config.optim.name is OptimizerName.adamw8bit else 8
    has_none = config.teacher.url is not None or config.teaches_itself
    is_there = 0 if has_none else 0.1 if config.teacher.placement is Placement.offload else 1
    tokens = min(config.train.max_tokens_per_micro_batch, 16384)
    activations = tokens * round(student**0.5) * (5 if config.train.activation_checkpointing else 40)
    rows = max(config.sampling.batch_size, config.eval.batch_size)
    resident = {
        "the process": GIB,
        "student": round(width * student) + 4 * trained,
        "teacher": round(2 * teacher * is_there),
        "optimizer": states * trained,
    }
    return Memory(resident, {"KV cache": rows * 50 * 2**20}, {"gradients": 4 * trained, "activations": activations})


def planner(gib: float, typed: tuple[str, ...] = (), device: str = "cuda", host: float | None = None) -> Planner:
    return Planner(typed, device, round(gib * GIB), bytes_of, None if host is None else round(host * GIB))


def of_sizes(student: str, teacher: str, **options: object) -> Config:
    return from_options({"model.path": student, "teacher.path": teacher, **options})


@pytest.mark.parametrize(
    ("student", "teacher", "gib", "lora", "quantization", "optimizer", "placement"),
    [
        ("0.5b", "3b", 80, False, "none", "adamw", "same"),
        ("0.5b", "3b", 24, False, "none", "adamw", "same"),
        ("3b", "7b", 72, False, "none", "adamw", "offload"),
        ("3b", "7b", 55, False, "none", "adamw8bit", "offload"),
        ("7b", "14b", 80, True, "none", "adamw", "same"),
        ("7b", "14b", 24, True, "none", "adamw", "offload"),
        ("7b", "14b", 14, True, "nf4", "adamw", "offload"),
    ],
)
def test_the_largest_training_that_fits_is_chosen(
    student: str, teacher: str, gib: float, lora: bool, quantization: str, optimizer: str, placement: str
) -> None:
    plan = planner(gib)
    config = plan.fit(of_sizes(student, teacher, **{"teacher.system": "Be brief."}))
    found = (config.lora.rank > 0, config.model.quantization.value, config.optim.name.value, config.teacher.placement.value)
    assert found == (lora, quantization, optimizer, placement)
    assert plan.needed(config) <= plan.room < gib * GIB
    assert config.ppo.estimator is Estimator.exact
    assert {choice.subject for choice in plan.choices} >= {"estimator", "training", "optimizer", "teacher", "micro-batch"}
    assert all(choice.reason for choice in plan.choices)


def test_a_smaller_card_recomputes_in_smaller_micro_batches_and_decodes_fewer_rows() -> None:
    config = of_sizes("0.5b", "0.5b")
    roomy, tight = (planner(gib).fit(config) for gib in (80, 12))
    assert roomy.train.activation_checkpointing is False and roomy.train.max_tokens_per_micro_batch == 32768
    assert roomy.eval.batch_size == 256 and roomy.sampling.batch_size == 64
    assert tight.train.activation_checkpointing is True and tight.lora.rank == 0
    assert tight.eval.batch_size < 256 and tight.sampling.batch_size == 64 * tight.eval.batch_size // 256
    on_cpu = planner(80, device="cpu").fit(config)
    assert on_cpu.train.activation_checkpointing is None and on_cpu.train.max_tokens_per_micro_batch == 8192


def test_nothing_fits_in_one_line_that_names_what_was_tried_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"all weights, AdamW .* quantised weights .*launch\.config_file") as refused:
        planner(4).fit(of_sizes("7b", "14b"))
    assert "\n" not in str(refused.value)


def test_typed_options_stay() -> None:
    config = of_sizes("7b", "14b", **{"lora.rank": 4, "model.quantization": "int8", "ppo.estimator": "topk"})
    plan = planner(80, typed=("train.max_tokens_per_micro_batch", "optim"))
    found = plan.fit(config)
    assert (found.lora.rank, found.model.quantization, found.ppo.estimator) == (4, Quantization.int8, Estimator.topk)
    assert (found.train.max_tokens_per_micro_batch, found.optim.lr) == (8192, None)
    with pytest.raises(ConfigError, match="all weights"):
        planner(24, typed=("lora.rank",)).fit(of_sizes("7b", "14b"))  # all of 7B, as typed


def test_teacher_is_kept_in_main_memory_only_where_it_fits_there() -> None:
    config = of_sizes("7b", "14b", **{"lora.rank": 16, "model.quantization": "nf4"})
    assert planner(24, host=64).fit(config).teacher.placement is Placement.offload
    with pytest.raises(ConfigError, match="nothing fits"):
        planner(24, host=16).fit(config)


def test_a_served_teacher_takes_no_memory_and_no_exact_estimator() -> None:
    plan = planner(80)
    served = plan.fit(of_sizes("3b", "7b", **{"teacher.url": "http://127.0.0.1:8000"}))
    assert (served.ppo.estimator, served.teacher.placement, served.optim.name) == (Estimator.sampled, Placement.same, OptimizerName.adamw)
    assert next(choice for choice in plan.choices if choice.subject == "estimator").what == "sampled"


def timed(minutes: float | None, timing: Timing, typed: tuple[str, ...] = (), **options: object) -> Config:
    config = from_options({**TINY, "train.max_steps": 200, "eval.steps": 50, "sampling.max_new_tokens": 256, **options})
    return fit_time(planner(40, typed, "cpu"), config, timing, minutes)


def test_steps_fit_into_the_minutes_with_their_evaluations() -> None:
    timing = Timing(step=6.0, truncated=0.0, steps=200, student=30.0, teacher=60.0)
    assert timed(None, timing).train.max_steps == 200
    assert timed(60, timing).train.max_steps == 200  # 1,440 seconds
    found = timed(10, timing)
    assert found.train.max_steps == 75 and found.sampling.max_new_tokens == 256  # 75 * 6 + 60 + 3 * 30 = 600
    assert timed(10, timing, ("train.max_steps",)).train.max_steps == 200
    epochs = timed(10, Timing(6.0, 0.0, 200), **{"train.max_steps": None, "train.epochs": 1.0})
    assert (epochs.train.max_steps, epochs.train.epochs) == (100, None)


def test_time_that_a_plan_leaves_is_told_with_the_steps_that_would_take_it() -> None:
    config, own = from_options({**TINY, "train.max_steps": 200, "eval.steps": 0}), planner(40, (), "cpu")
    assert fit_time(own, config, Timing(step=1.0, truncated=0.0, steps=200), 10).train.max_steps == 200
    assert own.choices[-1].reason.endswith("10 minutes are a limit, which train.max_steps=600 would reach")


def test_too_little_time_shortens_completions_and_then_refuses() -> None:
    slow = Timing(step=12.0, truncated=0.9, steps=200)
    found = timed(5, slow)
    assert found.sampling.max_new_tokens == 128 and found.train.max_steps == 50  # 6 seconds a step
    assert timed(5, slow, ("sampling.max_new_tokens",)).sampling.max_new_tokens == 256
    assert timed(5, slow, **{"sampling.truncated": "drop"}).sampling.max_new_tokens == 256  # it would not train on shorter ones
    with pytest.raises(ConfigError, match=r"eval\.limit"):
        timed(1, Timing(step=6.0, truncated=0.0, steps=200, student=30.0, teacher=60.0))


def test_completions_that_reach_their_limit_get_a_longer_one_if_there_is_time() -> None:
    assert timed(None, Timing(step=1.0, truncated=0.9, steps=200)).sampling.max_new_tokens == 512
    assert timed(60, Timing(step=1.0, truncated=0.9, steps=200)).sampling.max_new_tokens == 512
    assert timed(None, Timing(step=1.0, truncated=0.2, steps=200)).sampling.max_new_tokens == 256


def test_nothing_is_said_about_time_that_was_not_measured() -> None:
    plan = planner(4, device="cpu")
    config = from_options(TINY)
    assert fit_time(plan, config, None, 1) == config
    assert "not measured" in {choice.what for choice in plan.choices}


def test_command_has_what_was_typed_and_what_differs() -> None:
    before = from_options(TINY)
    planned = from_options({**TINY, "ppo.estimator": "exact", "train.max_steps": None, "train.epochs": 2.0, "lora.rank": 16})
    words = shlex.split(train_command(["data.system=be brief"], before, planned))
    assert words[:3] == ["opd", "train", "data.system=be brief"]
    assert words[3:] == ["ppo.estimator=exact", "lora.rank=16", "train.max_steps=null", "train.epochs=2.0"]


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, Any, str]:
        code = cli.main(["doctor", *words])
        output = capfd.readouterr()
        return code, json.loads(output.out) if output.out.startswith("{") else output.out, output.err

    return run


def test_plan_of_this_machine_measures_a_step_and_its_command_composes(doctor: Any) -> None:
    code, report, err = doctor("--plan", "1", "experiment=debug", "device=cpu", "--prompts", "16", "--json")
    assert (code, err) == (errors.OK, "")
    plan, step = report["figures"]["plan"], report["figures"]["step"]
    assert step["seconds"]["update"] > 0 and report["figures"]["evaluation_seconds"]["student"] > 0
    assert {"estimator", "training", "optimizer", "teacher", "micro-batch", "completions", "time"} == {
        c["subject"] for c in plan["choices"]
    }
    words = shlex.split(plan["command"])
    assert words[:4] == ["opd", "train", "experiment=debug", "device=cpu"] and "ppo.estimator=exact" in words
    assert cli.main([*words[1:], "--cfg", "job"]) == errors.OK


def test_plan_for_another_card_needs_no_gpu_and_no_minutes(doctor: Any) -> None:
    code, printed, err = doctor("--plan", "--memory", "80G", "experiment=debug")
    assert (code, err) == (errors.OK, "")
    assert printed.splitlines()[-1].startswith("opd train experiment=debug ") and "not measured" in printed


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--memory", "80G"], errors.USAGE, ["--memory", "--plan"]),
        (["--plan", "--memory", "lots"], errors.USAGE, ["--memory", "80G"]),
        (["--plan", "0"], errors.USAGE, ["--plan"]),
        (["--plan=soon"], errors.USAGE, ["--plan"]),
        (["--plan", "launch.processes=2"], errors.USAGE, ["--plan", "launch.processes"]),
        (["--plan", "teacher.path=bundled:tiny-teacher,bundled:tiny-student"], errors.USAGE, ["--plan", "teacher"]),
        (["--plan", "--memory", "0.001G"], errors.NOT_READY, ["plan"]),
    ],
)
def test_mistakes_are_one_line(doctor: Any, words: list[str], code: int, parts: list[str]) -> None:
    found, _, err = doctor(*words, "experiment=debug", "device=cpu")
    assert found == code and err.count("\n") == 1
    assert all(part in err for part in parts)
