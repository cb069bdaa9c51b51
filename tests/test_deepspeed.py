"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes on the CPU: what is learnt and saved is what one process without it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_processes import OPTIONS, ROOT, TRAIN, UNEVEN, alone, distance, gradient_norms, launch, weights

from opd.models.zero import is_installed

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason="DeepSpeed is not installed")]

FILES = ROOT / "scripts" / "accelerate"
# As it comes, DeepSpeed keeps weights as few as these whole: through a pass, and small ones always.
BY_LAYER = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "reduce_bucket_size": 5000,
    },
    "gradient_accumulation_steps": 4,  # opd's own take their place
    "gradient_clipping": 0.01,
}
# In the second of three steps a gradient of one process is not finite, in the third a score of the other, whose
# gradient is, as advantages are bounded. It also writes down the most
# up-projections that were whole behind their use in the passes of an update.
FAULTS = """
import os, sys, torch
from pathlib import Path
from opd import train
from opd.models.sharding import ZeroPolicy
from opd.teachers import LocalTeacher
from opd.training import build
from opd.training.loop import Trainer
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

build.ADAM_EPS = 1e-3
now = {"step": 0}
forward, logp, begin, init = Qwen2MLP.forward, LocalTeacher.logp, Trainer.begin, Qwen2MLP.__init__
students, weights, seen = [], [], set()

def computed(self, hidden):
    out = forward(self, hidden)
    if torch.is_grad_enabled() and self in students:
        seen.add(sum(weight.numel() > 0 for weight in weights))
        if os.environ["RANK"] == "1" and now["step"] == 1 and self is students[0]:
            out.register_hook(lambda gradient: gradient * float("inf"))
    return out

def scored(self, batch, temperature):
    bad = os.environ["RANK"] == "0" and now["step"] == 2
    return logp(self, batch, temperature) * (float("inf") if bad else 1.0)

def counted(self):
    now["step"] = self.step
    students[:] = [module for module in self.student.modules() if isinstance(module, Qwen2MLP)]
    weights[:] = [module.up_proj.weight for module in students]  # asking for one in a pass gathers it
    return begin(self)

Qwen2MLP.forward, LocalTeacher.logp, Trainer.begin = computed, scored, counted
code = train.main()
Path("whole" + os.environ["RANK"]).write_text(str(max(seen)))
sys.exit(code)
"""


def by_launcher(file: Path) -> list[str]:
    return ["accelerate", "launch", "--main_process_port", "0", "--config_file", str(file)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[int, Path]:
    """An Accelerate config for each stage: the shipped one, and for ZeRO-3 one with a config of DeepSpeed's own."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "zero3.json").write_text(json.dumps(BY_LAYER))
    machine = (FILES / "zero3_cpu2.yaml").read_text().partition("mixed_precision:")[0]
    (folder / "zero3.yaml").write_text(f"{machine}deepspeed_config:\n  deepspeed_config_file: {folder}/zero3.json\n")
    return {2: FILES / "zero2_cpu2.yaml", 3: folder / "zero3.yaml"}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process of four prompts."""
    folder = tmp_path_factory.mktemp("deepspeed") / "one"
    with pytest.MonkeyPatch.context() as patch:
        assert alone(folder, patch, [*OPTIONS, "train.batch_size=4"]) == 0
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def stage(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def two(stage, files, tmp_path_factory):
    """Two processes of two prompts, which cut different numbers of micro-batches."""
    folder = tmp_path_factory.mktemp("deepspeed") / "two"
    options = [*UNEVEN, "train.batch_size=2", "checkpoint.keep_last=9"]
    done = launch(folder, [*by_launcher(files[stage]), TRAIN, *options])
    assert "(0.1 M parameters)" in done.stdout
    assert f"sharded (ZeRO-{stage}): each process holds {0.1 if stage == 2 else 0.05:.2f} M of the parameters" in done.stdout
    return folder


def test_two_processes_learn_what_one_does(one, two):
    """One global token count, and clipping by the norm of all gradients."""
    assert distance(weights(one), weights(two)) < 1e-6
    assert gradient_norms(two) == pytest.approx(gradient_norms(one), rel=1e-4)


def test_runs_go_on_bitwise_and_one_process_goes_on_from_them(one, two, stage, files, tmp_path, monkeypatch):
    half = f"resume={two / 'runs/run/checkpoints/step_000002'}"
    options = [*UNEVEN, "train.batch_size=2", half, *(["teacher.placement=sharded"] if stage == 3 else [])]
    launch(tmp_path / "two", [*by_launcher(files[stage]), TRAIN, *options])
    assert distance(weights(tmp_path / "two"), weights(two)) == 0.0
    assert alone(tmp_path / "one", monkeypatch, [*OPTIONS, "train.batch_size=4", half]) == 0
    assert distance(weights(tmp_path / "one"), weights(one)) < 1e-6


def test_what_is_not_finite_in_one_process_leaves_weights_and_optimizer_bitwise_as_they_were(stage, files, tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    options = [*UNEVEN, "train.batch_size=2", "train.max_steps=3", "optim.schedule=constant", "eval.steps=0", "checkpoint.every=1"]
    launch(tmp_path / "faulty", [*by_launcher(files[stage]), str(tmp_path / "faults.py"), *options, "checkpoint.keep_last=9"])
    run = tmp_path / "faulty" / "runs" / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["optim/skipped"] for line in metrics] == [0.0, 1.0, 1.0]
    for name in ("model", "optimizer"):
        before, after = (load_file(run / f"checkpoints/step_00000{step}/{name}.safetensors") for step in (1, 3))
        assert distance(before, after) == 0.0
        assert max(float(tensor.abs().max()) for tensor in after.values()) > 0
    assert [int((tmp_path / "faulty" / f"whole{rank}").read_text()) for rank in (0, 1)] == ([2, 2] if stage == 2 else [0, 0])


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that transformers is leaving
def test_adapters_learn_what_they_do_in_one_process_on_a_base_that_is_the_teacher_too(files, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    base = ["model.path=bundled:tiny-teacher", "teacher.path=bundled:tiny-teacher", "teacher.system='27'", "lora=default", "lora.rank=3"]
    options = [*UNEVEN, *base, "optim.lr=1e-3", "optim.schedule=constant", "train.max_steps=3", "eval.steps=0", "ppo.steps=2"]
    launch(tmp_path / "two", [*by_launcher(files[3]), "-m", "opd.train", *options, "train.batch_size=2"])
    assert alone(tmp_path / "one", monkeypatch, [*options, "train.batch_size=4"]) == 0
    assert gradient_norms(tmp_path / "two") == pytest.approx(gradient_norms(tmp_path / "one"), rel=1e-3)
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6


def test_a_run_without_deepspeed_does_not_hear_of_it(tmp_path):
    command = [sys.executable, "-m", "opd", "train", "experiment=debug", "device=cpu", "train.max_steps=1", "eval.steps=0"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "accelerator" not in done.stdout + done.stderr
