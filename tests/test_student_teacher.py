"""The student as its own teacher: which weights score, that nothing is loaded for it, and that runs with it resume exactly."""

import copy
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import random_model
from safetensors.torch import load_file
from torch.func import functional_call
from training_helpers import rollout_of
from transformers import AutoModelForCausalLM

from opd import signals
from opd.api import OnPolicyDistillationTrainer, from_options
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.options import TeacherWeights
from opd.config.schema import Config
from opd.data.rollouts import Rollout, collate
from opd.errors import OK, ConfigError, DataError, Preempted
from opd.evaluation.target import newest_average, student_as_teacher
from opd.models import load as models
from opd.models.masters import MasterWeights
from opd.models.memory import estimate
from opd.teachers import ChangingTeacher, MovingAverage, teaching_module
from opd.train import main
from opd.training.build import Built, build
from opd.training.checkpoint import AVERAGE, MODEL, Checkpoints, read
from opd.training.checks import Trouble, check_distance
from opd.training.evaluator import exact_kl
from opd.training.inputs import Given
from opd.training.tensors import trained_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
VIEW = {"teacher.system": "12"}
DEBUG = {
    "model.path": "bundled:tiny-student",
    "model.dtype": "float32",
    "teacher.path": "./nowhere",  # is not read
    "data.source": "python",
    "data.path": None,
    "data.prompt": "prompt",
    "data.answer_after": None,
    "device": "cpu",
    "eval.reward": None,
    "eval.kl_prompts": 0,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 0,
    "ppo.steps": 2,
    "sampling.dtype": "trainer",
    "sampling.max_new_tokens": 6,
    "sampling.n": 2,
    "train.batch_size": 2,
    "train.max_steps": 3,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 9,
}
MODES = ("base", "current", "ema")
REWARDED = {"ppo__reward_coef": 0.5, "eval__reward": "exact"}
ROWS = [{"prompt": f"{i}+27=", "answer": str(i + 27)[::-1]} for i in range(10, 30)]


def config(weights: str, **options: Any) -> Config:
    """Return the config of a small run with `teacher.weights`. Options have `__` in place of the dot."""
    values = {name.replace("__", "."): value for name, value in options.items()}
    average = {"teacher.ema": 0.5} if weights == "ema" else {}
    return from_options({**DEBUG, **VIEW, **average, "teacher.weights": weights, **values})


def built(settings: Config, folder: Path) -> Built:
    checkpoints = Checkpoints(folder / "checkpoints", settings.checkpoint.keep_last, keep_best=False)
    return build(settings, Accelerator(cpu=True), checkpoints, Given(train_rows=ROWS, eval_rows=ROWS[:4]), ExitStack(), None)


def trained(run: Built) -> dict[str, torch.Tensor]:
    """Return a copy of the student's trained weights, or of their masters."""
    weights = trained_tensors(run.trainer.student, run.trainer.strategy.masters)
    return {name: weight.clone() for name, weight in weights.items()}


def expected_logp(run: Built, weights: dict[str, torch.Tensor], rollout: Rollout, prompt: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the log-probs of a rollout's tokens by a plain forward pass of the student with these weights.

    Args:
        prompt: None for the teacher's.
    """
    student = copy.deepcopy(run.trainer.student)
    if prompt is None:
        prompt = rollout.request.prompt.seen_by_teacher
        assert prompt != rollout.request.prompt.ids
    ids = torch.tensor([prompt + rollout.completion])
    weights = {name: weight.to(student.dtype) for name, weight in weights.items()}
    with torch.no_grad():
        logits = functional_call(student, weights, (), {"input_ids": ids}).logits[0, len(prompt) - 1 : -1]
    logp = (logits.float() / run.trainer.config.temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]


@pytest.mark.parametrize("options", [{}, {"lora__rank": 2}, {"model__dtype": "bfloat16"}, {"ppo__estimator": "exact", "ppo__steps": 1}])
@pytest.mark.parametrize("weights", MODES)
def test_the_teacher_scores_with_its_weights_and_its_own_prompt(tmp_path, weights, options):
    run = built(config(weights, **options), tmp_path)
    trainer, start = run.trainer, trained(run)
    average = start
    for _ in range(2):
        now = trained(run)
        done = trainer.train_step()
        used = {"base": start, "current": now, "ema": average}[weights]
        bf16 = "model__dtype" in options
        for index, rollout in enumerate(done.tokens.rollouts):
            scored = done.tokens.of_rollout(index)["teacher_logp"]
            assert torch.allclose(scored, expected_logp(run, used, rollout), atol=0.1 if bf16 else 1e-4)
        average = {name: 0.5 * average[name] + 0.5 * weight for name, weight in trained(run).items()}
    moved = {name: float((weight - start[name]).abs().max()) for name, weight in trained(run).items()}
    assert max(moved.values()) > 1e-4
    assert (trainer.average is None) == (weights != "ema")


@pytest.mark.parametrize(("weights", "rank", "copies"), [("base", 0, True), ("base", 2, False), ("current", 0, False), ("ema", 2, True)])
def test_nothing_is_loaded_for_the_teacher_and_its_copy_shares_what_is_not_trained(tmp_path, monkeypatch, weights, rank, copies):
    loaded = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args: loaded.append(args[1]) or load(*args))
    settings = config(weights, lora__rank=rank)
    run = built(settings, tmp_path)
    assert loaded == ["model"]
    student, teacher = run.trainer.student, run.teacher.model
    assert (teacher is not student) == copies
    theirs = {weight.data_ptr(): weight.nbytes for weight in teacher.parameters()}
    for weight in student.parameters():
        shared = theirs.pop(weight.data_ptr(), None) is not None
        assert shared == (not copies or not weight.requires_grad)
    assert estimate(settings, 1, CPU).resident["teacher"] == sum(theirs.values())


def test_the_average_is_a_geometric_sum_of_the_weights():
    student = random_model().double()
    settings = config("ema")
    average = MovingAverage(teaching_module(settings, student, sharded=False), trained_tensors(student), decay=0.9)
    history = [{name: weight.clone() for name, weight in trained_tensors(student).items()}]
    for _ in range(5):
        for weight in student.parameters():
            weight.data.add_(torch.randn_like(weight))
        history.append({name: weight.clone() for name, weight in trained_tensors(student).items()})
        average.update(trained_tensors(student))
    for name, weight in average.averages.items():
        terms = [0.9**5 * history[0][name], *(0.1 * 0.9 ** (5 - step) * history[step][name] for step in range(1, 6))]
        assert torch.allclose(weight, torch.stack(terms).sum(0), rtol=0, atol=1e-14)


def test_the_head_of_an_average_on_another_device_follows_it():
    """`meta` stands for the student's device, to which the head is copied; so does cpu:0, of one process of several, for cpu."""
    teacher = ChangingTeacher(random_model(), 23, device=torch.device("meta"))
    before = teacher.head
    inputs = collate([rollout_of((2, 3), (4, 1))], [0], 0).inputs
    assert teacher.states(inputs).head.weight_VH is not before.weight_VH


def test_the_average_follows_the_float32_masters_and_computes_in_bf16():
    student = random_model()
    masters = MasterWeights(student)
    model = teaching_module(config("ema"), student, sharded=False)
    average = MovingAverage(model, trained_tensors(student, masters), decay=0.5)
    start = [master.detach().clone() for master in masters.masters]
    for _ in range(3):
        for master in masters.masters:
            master.data.mul_(1 + 2**-12)  # lost in bf16
        masters.update_module()
        average.update(trained_tensors(student, masters))
    growth = 1 + 2**-12
    factor = 0.125 + 0.125 * growth + 0.25 * growth**2 + 0.5 * growth**3
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    for own, before, weight in zip(average.averages.values(), start, model.parameters(), strict=True):
        assert own.dtype == torch.float32 and torch.allclose(own, factor * before, rtol=1e-6)
        assert torch.equal(weight, own.bfloat16())


def stop_at_check(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a signal arrive just before the trainer looks for one the `number`-th time, from 0."""
    checks = iter(range(1000))
    monkeypatch.setattr(signals, "requested", lambda: next(checks) == number)


def everything(run: Built) -> dict[str, torch.Tensor]:
    """Return a copy of the student's weights and of the teacher's average."""
    average = {} if run.trainer.average is None else run.trainer.average.averages
    return {**trained(run), **{f"average.{name}": weight.clone() for name, weight in average.items()}}


@pytest.mark.parametrize(
    ("weights", "options"),
    [("base", {}), ("current", {}), ("ema", {"ppo__estimator": "topk"}), ("ema", {"lora__rank": 2, "model__dtype": "bfloat16"})],
)
def test_resume_between_inner_steps_and_after_a_step_is_bitwise(tmp_path, monkeypatch, weights, options):
    settings = config(weights, **options)
    straight = built(settings, tmp_path / "straight")
    list(straight.trainer.run())
    stopped = built(settings, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at_check(patch, 5)  # each step looks after sampling, and before each of its two inner steps
        with pytest.raises(Preempted):
            list(stopped.trainer.run())
    between = stopped.trainer.checkpoints.newest()
    assert between.moment == (1, 1)
    for checkpoint in (between, read(straight.trainer.checkpoints.path(2))):
        resumed = built(settings, tmp_path / "resumed" / checkpoint.path.name)
        resumed.trainer.resume(checkpoint)
        while resumed.trainer.step < 3:
            resumed.trainer.train_step()
        wanted, found = everything(straight), everything(resumed)
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    average = read(straight.trainer.checkpoints.path(3)).tensors(AVERAGE)
    assert (average is None) == (weights != "ema")
    if average is not None:
        student = load_file(straight.trainer.checkpoints.path(3) / MODEL)
        assert all(not torch.equal(average[name], student[name]) and average[name].dtype == torch.float32 for name in average)


def test_a_rewind_takes_the_average_back(tmp_path):
    run = built(config("ema", ppo__steps=1), tmp_path)
    events = iter(run.trainer.run())
    while run.trainer.step < 2 or not run.trainer.checkpoints.path(2).is_dir():
        next(events)
    saved = everything(run)
    run.trainer.train_step()
    assert not all(torch.equal(saved[name], tensor) for name, tensor in everything(run).items())
    run.trainer.trouble = Trouble(steps=3, places=[5])
    assert run.trainer.rewind().step == 2
    assert all(torch.equal(saved[name], tensor) for name, tensor in everything(run).items())


def test_a_checkpoint_without_an_average_begins_one_at_its_weights(tmp_path):
    """As with resume_force=true after teacher.weights=base."""
    before = built(config("base"), tmp_path / "before")
    before.trainer.train_step()
    before.trainer.save()
    run = built(config("ema"), tmp_path / "after")
    run.trainer.resume(before.trainer.checkpoints.newest())
    assert all(torch.equal(average, trained(before)[name]) for name, average in run.trainer.average.averages.items())


# Refusals and warnings.


@pytest.mark.parametrize(
    ("weights", "options", "option", "remedy"),
    [
        ("current", {"teacher__system": None}, "teacher.weights=current", "teacher.system="),
        ("current", {"teacher__system": None, **REWARDED}, "teacher.weights=current", "teacher.system="),
        ("base", {"teacher__system": None}, "teacher.weights=base", "ppo.reward_coef"),
        ("base", {"teacher__url": "http://a:1"}, "teacher.url='http://a:1'", "teacher.url=null"),
        ("ema", {"teacher__placement": "offload"}, "teacher.placement=offload", "teacher.placement=same"),
        ("ema", {"teacher__quantization": "nf4"}, "teacher.quantization=nf4", "teacher.quantization=none"),
        ("base", {"teacher__gguf_file": "x.gguf"}, "teacher.gguf_file='x.gguf'", "teacher.gguf_file=null"),
        ("base", {"teacher__dtype": "bfloat16"}, "teacher.dtype=bfloat16", "teacher.dtype=auto"),
        ("current", {"ppo__estimator": "exact"}, "ppo.steps=2", "ppo.steps=1"),
        ("current", {"ppo__baseline": True}, "ppo.steps=2", "teacher.weights=ema"),
        ("ema", {"teacher__ema": 1.0}, "teacher.ema=1.0", "below 1"),
        ("ema", {"teacher__ema": 0.0}, "teacher.ema=0.0", "above 0"),
        ("base", {"teacher__adapter": "a"}, "teacher.adapter='a'", "teacher.adapter=null"),
        ("own", {"control": "self", "teacher__url": "http://a:1"}, "teacher.url='http://a:1'", "control=none"),
        ("ema", {"control": "self"}, "control=self", "teacher.weights=own"),
    ],
)
def test_what_cannot_hold_is_refused_with_the_option_and_a_remedy(weights, options, option, remedy):
    with pytest.raises(ConfigError) as refused:
        config(weights, **options)
    message = str(refused.value)
    assert message.startswith(option) and remedy in message and "\n" not in message


def test_the_arm_without_a_teacher_trains_as_with_the_weights_of_the_start_bitwise(tmp_path):
    runs = [built(settings, tmp_path) for settings in (config("base"), config("own", control="self"))]
    for run in runs:
        run.trainer.train_step()
    arms = [trained(run) for run in runs]
    assert all(torch.equal(weight, arms[1][name]) for name, weight in arms[0].items())
    assert config("own", control="self", teacher__system=None).teaches_itself  # needs no view


@pytest.mark.parametrize("weights", ["base", "own"])
def test_the_start_of_a_student_with_an_adapter_has_it_and_its_base_model_has_not(tmp_path, weights):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / "tiny-student"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    adapted.save_pretrained(tmp_path / "adapter")
    shared = {"teacher__path": "bundled:tiny-student", "model__path": "bundled:tiny-student"}
    lora = {"model__adapter": str(tmp_path / "adapter"), "lora__rank": 4, "lora__alpha": 8}
    settings = config(weights, ppo__reference_coef=0.1, **shared, **lora)
    run = built(settings, tmp_path)
    start = trained(run)
    off = {name: torch.zeros_like(weight) for name, weight in start.items()}
    for _ in range(2):
        done = run.trainer.train_step()
    reference = run.trainer.scoring.reference
    assert (reference is run.teacher) == (weights == "base")
    for index, rollout in enumerate(done.tokens.rollouts):
        own = done.tokens.of_rollout(index)
        assert torch.allclose(own["teacher_logp"], expected_logp(run, start if weights == "base" else off, rollout), atol=1e-4)
        assert torch.allclose(own["reference_logp"], expected_logp(run, start, rollout, rollout.request.prompt.ids), atol=1e-4)
    copied = sum(weight.nbytes for weight in start.values())
    resident = estimate(settings, 1, CPU).resident
    assert (resident["teacher"], resident.get("reference", 0)) == ((copied, 0) if weights == "base" else (0, copied))


def test_options_that_say_the_same_of_the_student_are_accepted():
    assert config("base", teacher__dtype="float32").teaches_itself  # the student's
    for weights in ("base", "ema"):  # hold the student near its start, or its past
        assert config(weights, teacher__system=None, **REWARDED).teacher_weights is TeacherWeights[weights]


def test_a_module_beside_weights_of_the_student_is_refused(tmp_path):
    given = Given(teacher=random_model())
    with pytest.raises(ConfigError, match=r"^teacher\.weights=ema: .*module"), ExitStack() as stack:
        build(config("ema"), Accelerator(cpu=True), Checkpoints(tmp_path, 1, keep_best=False), given, stack, None)


def test_sharded_present_weights_are_refused_where_the_update_needs_their_head():
    with pytest.raises(ConfigError, match=r"^teacher\.weights=current: .*teacher\.weights=ema.*ppo\.estimator=sampled"):
        teaching_module(config("current", ppo__estimator="exact", ppo__steps=1), random_model(), sharded=True)


def test_an_evaluation_has_the_micro_batches_that_the_step_came_to(tmp_path, monkeypatch):
    run, sizes = built(config("base", eval__kl_prompts=2), tmp_path), []
    monkeypatch.setattr("opd.training.evaluator.exact_kl", lambda *given: sizes.append(given[4]) or exact_kl(*given))
    for halved in (False, True):
        run.trainer.scoring.choices["max_tokens"] //= 1 + halved
        list(run.trainer.evaluate())
    assert sizes[0] == 2 * sizes[1] == run.trainer.config.train.max_tokens_per_micro_batch


@pytest.mark.parametrize(
    ("weights", "options", "logged"), [("ema", {}, False), ("current", {}, True), ("ema", {"teacher__system": None}, False)]
)
def test_a_view_that_changes_nothing_is_logged(tmp_path, caplog, monkeypatch, weights, options, logged):
    if logged:  # as with a chat template that leaves the system message out
        monkeypatch.setattr("opd.data.prompts.with_system", lambda messages, system: messages)
    run = built(config(weights, **REWARDED, **options), tmp_path)
    tokens = run.trainer.train_step().tokens
    check_distance(run.trainer.config, tokens)
    assert ("changes none of its scores" in caplog.text) == logged and "they are the same model" not in caplog.text


# Looking at such a run.


def test_eval_measures_the_kl_to_the_teacher_of_the_end_of_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["teacher.weights=ema", "teacher.ema=0.5", "teacher.system='12'", "lora=default", "optim.lr=1e-3", "train.max_steps=2"]
    data = ["data=jsonl", "data.train_path=rows.jsonl", "data.eval_path=rows.jsonl", "eval.steps=0", "eval.limit=2"]
    assert main(["experiment=debug", "device=cpu", "name=run", *data, *words]) == OK
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert "learns from itself (teacher.weights=ema)" in capfd.readouterr().out
    assert cli.main(["eval", "runs/run", "--json"]) == OK
    task = json.loads(capfd.readouterr().out)["tasks"]["evaluation"]
    assert task["models"]["model"]["kl"] == pytest.approx(summary["eval_kl_after"], rel=1e-4)
    assert "the student itself (ema)" in (tmp_path / "runs/run/report.html").read_text()
    assert "itself (teacher.weights=ema)" in (tmp_path / "runs/run/final/README.md").read_text()


def test_other_verbs_take_the_first_or_the_last_weights_as_the_teacher():
    before = from_options({"model.path": "a/before", "model.revision": "r"}).model
    after = {"model__path": "runs/x/final"}
    base, current = (student_as_teacher(config(weights, **after), before) for weights in ("base", "current"))
    assert (base.path, base.revision, base.weights, base.system) == ("a/before", "r", TeacherWeights.own, "12")
    assert (current.path, current.revision) == ("runs/x/final", None)
    assert student_as_teacher(config("base", **after), None).path == "runs/x/final"  # of a model without a run


def test_an_average_that_is_gone_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"average.*there is none.*--teacher"):
        newest_average(tmp_path)


def test_a_trained_module_cannot_be_evaluated_against_its_first_weights(tmp_path):
    rows = [{"prompt": f"{i}+27=", "answer": "1"} for i in range(10, 20)]
    options = {**VIEW, "teacher.weights": "base", "device": "cpu", "model.dtype": "float32", "eval.kl_prompts": 2, "eval.limit": 2}
    trainer = OnPolicyDistillationTrainer(
        "bundled:tiny-student", "bundled:tiny-student", rows, rows[:2], max_steps=1, output_dir=tmp_path / "out", options=options,
        max_new_tokens=4,
    )  # fmt: skip
    assert trainer.evaluate()["eval_kl"] > 0
    trainer.train()
    with pytest.raises(ConfigError, match=r"teacher\.weights.*base.*opd eval"):
        trainer.evaluate()


# Several processes.


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ["teacher.weights=base", "ppo.estimator=exact"],
        ["teacher.weights=current"],
        ["teacher.weights=ema", "ppo.estimator=exact"],
        ["teacher.weights=ema", "lora=default"],
    ],
)
def test_two_processes_with_sharded_weights_train_as_one(tmp_path, words):
    fsdp2 = ["accelerate", "launch", "--main_process_port", "0", "--config_file", str(ROOT / "scripts/accelerate/fsdp2_cpu2.yaml"), "-m"]
    common = ["opd.train", "experiment=debug", "device=cpu", "name=run", "optim.eps=1e-3", "sampling.temperature=1.0", "eval.steps=0"]
    common += ["train.max_steps=3", "teacher.system='12'", "teacher.ema=0.5", *words]
    found = []
    for name, launcher, size in (("one", [sys.executable, "-m"], 4), ("two", fsdp2, 2)):
        (tmp_path / name).mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [*launcher, *common, f"train.batch_size={size}"]
        done = subprocess.run(command, cwd=tmp_path / name, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        run = tmp_path / name / "runs/run"
        files = [run / "final" / MODEL, *(run / "checkpoints/step_000003").glob(AVERAGE)]
        kl = json.loads((run / "summary.json").read_text())["eval_kl_after"]
        found.append(([load_file(file) for file in files], kl))
    (one, kl_of_one), (two, kl_of_two) = found
    assert kl_of_one == pytest.approx(kl_of_two, rel=1e-4) and len(one) == len(two)
    for tensors, others in zip(one, two, strict=True):
        assert max(float((tensors[name] - others[name]).abs().max()) for name in tensors) < 1e-5
