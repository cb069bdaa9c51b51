"""Several processes on the CPU (DDP, FSDP2, two nodes): the result of one process, one log, one run folder."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import FSDP2, train, trained, work_in_two
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from opd.api import OnPolicyDistillationTrainer
from opd.train import main
from opd.training.loop import Trainer
from opd.training.step import Step
from opd.training.tokens import Slice, Tokens

ROOT = Path(__file__).resolve().parent.parent
# Uneven completions, so that a mean of local means would differ; a large eps, so that AdamW does not amplify rounding errors.
OPTIONS = [
    "experiment=debug",
    "device=cpu",
    "name=run",
    "optim.eps=1e-3",
    "sampling.temperature=1.0",
    "train.max_tokens_per_micro_batch=40",
]

UNEVEN = [*OPTIONS, "train.max_tokens_per_micro_batch=26"]  # the processes have different numbers of micro-batches


def launch(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> int:
    """Run in the test's process, which is faster than a new one."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return main(options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "run" / "final" / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process of four prompts."""
    folder = tmp_path_factory.mktemp("processes") / "one"
    trained(folder, [*OPTIONS, "train.batch_size=4"])
    return folder


def gradient_norms(folder: Path) -> list[float]:
    """Return the norms before clipping, which hides how gradients are scaled."""
    return [json.loads(line)["optim/grad_norm"] for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "two"
    config = str(ROOT / "scripts/accelerate/cpu2.yaml")
    done = launch(folder, ["accelerate", "launch", "--config_file", config, "-m", "opd.train", *OPTIONS, "train.batch_size=2"])
    return folder, done


def test_two_processes_of_two_prompts_train_as_one_of_four(one, two):
    assert distance(weights(one), weights(two[0])) < 1e-6
    assert gradient_norms(two[0]) == pytest.approx(gradient_norms(one), rel=1e-4)
    untrained = load_file(ROOT / "opd/assets/tiny-student/model.safetensors")
    assert distance(weights(one), {name: untrained[name].float() for name in weights(one)}) > 1e-4


def test_two_processes_write_one_log_and_one_folder_and_show_the_effective_batch(two):
    folder, done = two
    assert [path.name for path in (folder / "runs").iterdir()] == ["run"]
    assert done.stdout.count("2 prompts × 2 processes × 2 completions = 8 rollouts") == 1
    assert done.stdout.count("evaluation after step 0") == 1
    metrics = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    evaluations = [json.loads(line) for line in (folder / "runs/run/evaluations.jsonl").read_text().splitlines()]
    assert all(line["rewards"]["count"] == 16 for line in evaluations)  # each prompt once, over both processes
    assert sorted(path.name for path in (folder / "runs/run/.hydra").iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]


@pytest.mark.long
def test_shuffled_scores_are_drawn_over_all_processes(tmp_path):
    shuffled = [*OPTIONS, "control=shuffled"]
    trained(tmp_path / "one", [*shuffled, "train.batch_size=4"])
    trained(tmp_path / "two", [*shuffled, "train.batch_size=2"], 2)
    trained(tmp_path / "sharded", [*shuffled, "train.batch_size=2"], 2, config=FSDP2)
    expected = weights(tmp_path / "one")
    assert distance(weights(tmp_path / "two"), expected) < 1e-6 and distance(weights(tmp_path / "sharded"), expected) < 1e-6


@pytest.mark.long
def test_torchrun_runs_the_same_job(two, tmp_path):
    launch(tmp_path / "two", ["torchrun", "--nproc_per_node", "2", "-m", "opd.train", *OPTIONS, "train.batch_size=2"])
    one, other = weights(two[0]), weights(tmp_path / "two")
    assert all(torch.equal(one[name], other[name]) for name in one)


class StopInOneProcess(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = os.environ["RANK"] == "1" and state.global_step == 2


def train_a_loaded_model(rank: int, folder: Path, port: int) -> None:
    """Train with a frozen first layer until the second process asks to stop, and leave each process's weights."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model = AutoModelForCausalLM.from_pretrained(ROOT / "opd/assets/tiny-student")
    model.base_model.layers[0].requires_grad_(False)
    rows = [{"prompt": f"{number}+27=", "answer": str(number + 27)[::-1]} for number in range(10, 40)]
    trainer = OnPolicyDistillationTrainer(
        model, ROOT / "opd/assets/tiny-teacher", rows, rows[:4], output_dir=folder / "run", max_steps=5, eval_steps=0, batch_size=1,
        max_new_tokens=8, learning_rate=1e-3, callbacks=[StopInOneProcess], options={"device": "cpu", "eval.kl_prompts": 4},
    )  # fmt: skip
    assert trainer.train()["steps"] == 2
    assert model.base_model.layers[1].mlp.up_proj.weight.requires_grad and not model.base_model.layers[0].mlp.up_proj.weight.requires_grad
    save_file({name: value.detach() for name, value in model.named_parameters()}, folder / f"rank{rank}.safetensors")


def test_one_of_two_processes_stops_a_loaded_model_whose_first_layer_is_frozen(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    work_in_two(train_a_loaded_model, tmp_path, port)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    before = load_file(ROOT / "opd/assets/tiny-student/model.safetensors")
    changed = {name for name, value in first.items() if name in before and not torch.equal(value, before[name].float())}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert changed and not any(".layers.0." in name for name in changed)


def test_mistake_is_shown_once_by_two_processes(tmp_path):
    done = train(tmp_path, [*OPTIONS, "model.path=./nowhere"], 2)
    assert done.codes == [64, 64]
    assert done.stderr.count("there is no such folder") == 1
    assert not (tmp_path / "runs/run/status.json").exists()


@pytest.mark.long
def test_sweep_of_two_processes_runs_every_member(tmp_path):
    trained(tmp_path / "sweep", ["-m", *OPTIONS, "train.max_steps=1", "optim.lr=1e-4,2e-4"], 2)
    assert len(list((tmp_path / "sweep" / "sweeps" / "run").glob("*/summary.json"))) == 2


def test_run_resumes_with_another_number_of_processes(tmp_path):
    """Two processes of two prompts resume a run of one process of four, and end with the weights of the uninterrupted run."""
    options = [*OPTIONS, "train.max_steps=4", "checkpoint.every=2", "checkpoint.keep_last=9"]
    trained(tmp_path / "one", [*options, "train.batch_size=4"])
    half = tmp_path / "one" / "runs" / "run" / "checkpoints" / "step_000002"
    trained(tmp_path / "two", [*options, "train.batch_size=2", f"resume={half}"], 2)
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5


def run_out_of_memory(step: int | None = None) -> None:
    """Let one of two processes run out of memory in a forward and in a backward pass, and the other have a bad score in the third step.

    Args:
        step: Where the forward pass fails, instead of in the fourth micro-batch.
    """
    now = {"forward": 0, "step": 0}
    forward = Qwen2MLP.forward

    def failing_forward(self: Qwen2MLP, hidden: Tensor) -> Tensor:
        out = forward(self, hidden)
        if os.environ["RANK"] == "1" and torch.is_grad_enabled() and hidden.shape[1] > 1:
            now["forward"] += 1
            if now["step"] == step if step else now["forward"] == 4:
                raise torch.OutOfMemoryError("made up, forward")
            if now["forward"] == 9:
                out.register_hook(fail)
        return out

    def fail(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("made up, backward")

    Qwen2MLP.forward = failing_forward
    change_scores(now, math.nan)


def lose_numbers() -> None:
    """Let a gradient of one process be infinite in the second of three steps, and in the third a score of the other.

    Its gradient is finite then, because advantages are clipped.
    """
    now = {"step": 0}
    forward = Qwen2MLP.forward

    def infinite_gradient(self: Qwen2MLP, hidden: Tensor) -> Tensor:
        out = forward(self, hidden)
        if torch.is_grad_enabled() and os.environ["RANK"] == "1" and now["step"] == 1:
            out.register_hook(lambda gradient: gradient * math.inf)
        return out

    Qwen2MLP.forward = infinite_gradient
    change_scores(now, math.inf)


def change_scores(now: dict[str, int], factor: float) -> None:
    """Multiply the first process's scores of the third step, and keep the number of the step in `now`."""
    scores, begin_step = Step.teacher_scores, Trainer.begin_step

    def changed_scores(self: Step, part: Slice) -> dict[str, Tensor]:
        is_bad = os.environ["RANK"] == "0" and now["step"] == 2
        return {name: logp * (factor if is_bad else 1.0) for name, logp in scores(self, part).items()}

    def counting_begin_step(self: Trainer) -> Tokens:
        now["step"] = self.step
        return begin_step(self)

    Step.teacher_scores, Trainer.begin_step = changed_scores, counting_begin_step


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two processes of two prompts, each with half of the weights."""
    folder = tmp_path_factory.mktemp("processes") / "sharded"
    started = ["accelerate", "launch", "--main_process_port", "0", "--config_file", str(FSDP2), "-m", "opd.train"]
    done = launch(folder, [*started, *UNEVEN, "train.batch_size=2", "checkpoint.keep_last=9"])
    assert "(0.1 M parameters)" in done.stdout
    assert "sharded (FSDP2): each process holds 0.05 M of the parameters" in done.stdout
    return folder


@pytest.mark.slow
def test_fsdp2_trains_as_one_process(one, sharded):
    """With one global token count, uneven completions and micro-batches, clipping over shards, and an export of the full weights."""
    assert distance(weights(one), weights(sharded)) < 1e-6
    assert gradient_norms(sharded) == pytest.approx(gradient_norms(one), rel=1e-4)


@pytest.mark.slow
def test_fsdp2_run_resumes_bitwise_and_in_one_process_with_any_placement_of_the_teacher(one, sharded, tmp_path):
    half = f"resume={sharded / 'runs/run/checkpoints/step_000002'}"
    trained(tmp_path / "two", [*UNEVEN, "train.batch_size=2", half, "teacher.placement=sharded"], 2, config=FSDP2)
    assert distance(weights(tmp_path / "two"), weights(sharded)) == 0.0
    trained(tmp_path / "one", [*OPTIONS, "train.batch_size=4", half, "teacher.placement=offload"])
    assert distance(weights(tmp_path / "one"), weights(one)) < 1e-6


@pytest.mark.slow
def test_both_of_two_processes_halve_micro_batches_when_one_runs_out_of_memory_and_skip_a_non_finite_step(sharded, tmp_path):
    options = [*OPTIONS, "train.batch_size=2", "train.max_steps=3", "optim.schedule=constant", "eval.steps=0"]
    trained(tmp_path / "faulty", options, 2, before=run_out_of_memory)
    run = tmp_path / "faulty" / "runs" / "run"
    assert (run / "train.log").read_text().count("out of memory") == 2
    assert skipped(run) == [0.0, 0.0, 1.0]
    reference = load_file(sharded / "runs/run/checkpoints/step_000002/model.safetensors")
    assert distance(reference, load_file(run / "checkpoints/step_000003/model.safetensors")) < 1e-6


def skipped(run: Path) -> list[float]:
    return [json.loads(line)["optim/skipped"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_fsdp2_run_out_of_memory_in_one_process_ends_and_resumes_with_smaller_micro_batches(sharded, tmp_path, monkeypatch):
    options = [*OPTIONS, "train.batch_size=2", "train.max_steps=2", "optim.schedule=constant", "eval.steps=0", "checkpoint.every=1"]
    done = train(tmp_path / "faulty", options, 2, config=FSDP2, before=partial(run_out_of_memory, step=1))
    assert done.codes[1] != 0 and done.stderr.count("has too little memory for the update (made up, forward)") == 1
    assert "[rank 1] error" in done.stderr and "lower train.max_tokens_per_micro_batch (now 40)" in done.stderr
    run = tmp_path / "faulty" / "runs" / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    assert alone(tmp_path / "faulty", monkeypatch, [*options, "train.batch_size=4", "train.max_tokens_per_micro_batch=30"]) == 0
    reference = load_file(sharded / "runs/run/checkpoints/step_000002/model.safetensors")
    assert distance(reference, load_file(run / "checkpoints/step_000002/model.safetensors")) < 1e-6


@pytest.mark.slow
@pytest.mark.long
def test_non_finite_numbers_in_one_process_leave_sharded_weights_and_optimizer_bitwise_unchanged(tmp_path):
    options = [*UNEVEN, "train.batch_size=2", "train.max_steps=3", "optim.schedule=constant", "eval.steps=0"]
    options += ["checkpoint.every=1", "checkpoint.keep_last=9"]
    trained(tmp_path / "faulty", options, 2, config=FSDP2, before=lose_numbers)
    run = tmp_path / "faulty" / "runs" / "run"
    assert skipped(run) == [0.0, 1.0, 1.0]
    for name in ("model", "optimizer"):
        before, after = (load_file(run / f"checkpoints/step_00000{step}/{name}.safetensors") for step in (1, 3))
        assert distance(before, after) == 0.0
        assert max(float(tensor.abs().max()) for tensor in after.values()) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft
@pytest.mark.long
def test_adapters_train_under_fsdp2_as_in_one_process_which_resumes_from_them(tmp_path, monkeypatch):
    """The sharded base is the teacher too; the export is merged with it."""
    pytest.importorskip("peft")
    base = ["model.path=bundled:tiny-teacher", "teacher.path=bundled:tiny-teacher", "teacher.system='27'", "lora=default", "lora.rank=4"]
    options = [*OPTIONS, *base, "optim.lr=1e-3", "optim.schedule=constant", "train.max_steps=3", "checkpoint.keep_last=9", "eval.steps=0"]
    trained(tmp_path / "two", [*options, "train.batch_size=2"], 2, config=FSDP2)
    assert alone(tmp_path / "one", monkeypatch, [*options, "train.batch_size=4"]) == 0
    assert gradient_norms(tmp_path / "two") == pytest.approx(gradient_norms(tmp_path / "one"), rel=1e-3)
    half = tmp_path / "two/runs/run/checkpoints/step_000002"
    assert all("lora_" in name for name in load_file(half / "model.safetensors"))
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6
    base_weights = load_file(ROOT / "opd/assets/tiny-teacher/model.safetensors")
    changed = {name for name, tensor in weights(tmp_path / "two").items() if not torch.equal(tensor, base_weights[name].float())}
    assert changed and all("proj" in name for name in changed)
    assert alone(tmp_path / "on", monkeypatch, [*options, "train.batch_size=4", f"resume={half}"]) == 0
    assert distance(weights(tmp_path / "on"), weights(tmp_path / "two")) < 1e-6


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that reach each other over one virtual cable only, as two machines would."""
    names = [f"opd{os.getpid()}{letter}" for letter in "ab"]
    ends = [f"v{os.getpid()}{letter}" for letter in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}")
    for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        commands += [
            f"ip -n {name} addr add 10.77.0.{number}/24 dev {end}",
            f"ip -n {name} link set {end} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            if shutil.which("ip") is None or subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip("needs ip and the right to make network namespaces")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_node(folder: Path, name: str, rank: int, *options: str) -> subprocess.Popen[str]:
    """Start one of two machines with two processes each and a shared folder: nodes2_gpu8.yaml, but on the CPU."""
    config = (ROOT / "scripts/accelerate/nodes2_gpu8.yaml").read_text()
    for there, here in (("use_cpu: false", "use_cpu: true"), ("num_processes: 16", "num_processes: 4"), ("10.0.0.1 ", "10.77.0.1 ")):
        assert there in config
        config = config.replace(there, here)
    (folder / f"node{rank}.yaml").write_text(config.replace("machine_rank: 0", f"machine_rank: {rank}"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name.replace("opd", "v")}
    words = [*OPTIONS, "train.batch_size=1", f"launch.config_file={folder / f'node{rank}.yaml'}", *options]
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "opd", "train", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.slow
def test_two_nodes_train_as_one_process_with_one_folder_and_one_display(one, nodes, tmp_path):
    running = [on_node(tmp_path, name, rank) for rank, name in enumerate(nodes)]
    outputs = [node.communicate(timeout=300) for node in running]
    assert [node.returncode for node in running] == [0, 0], outputs
    assert distance(weights(one), weights(tmp_path)) < 1e-6
    assert outputs[0][0].count("1 prompts × 4 processes × 2 completions = 8 rollouts") == 1 and outputs[1][0] == ""
    assert outputs[0][0].startswith("starting 4 processes\n")
    assert len((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()) == 6
    assert sorted(path.name for path in (tmp_path / "runs/run/.hydra").iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "codes"),
    [
        pytest.param(signal.SIGTERM, [75, 75], marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, [70, -signal.SIGKILL], marks=pytest.mark.long),
    ],
)
def test_end_of_one_node_ends_the_other(nodes, tmp_path, number, codes):
    """After SIGTERM both save; when one is killed with its launcher, the other ends at once."""
    running = [on_node(tmp_path, name, rank, "train.max_steps=5000", "eval.steps=0") for rank, name in enumerate(nodes)]
    for _ in range(1200):
        metrics = tmp_path / "runs/run/metrics.jsonl"
        if metrics.is_file() and '"step": 2,' in metrics.read_text():
            break
        time.sleep(0.1)
    second = subprocess.run(["ip", "netns", "pids", nodes[1]], capture_output=True, text=True, check=True).stdout.split()
    for pid in second if number == signal.SIGKILL else [running[1].pid]:
        os.kill(int(pid), number)
    outputs = [node.communicate(timeout=60) for node in running]
    assert [node.returncode for node in running] == codes, outputs
    assert json.loads((tmp_path / "runs/run/status.json").read_text())["exit_code"] == codes[0]
    assert not subprocess.run(["ip", "netns", "pids", nodes[0]], capture_output=True, text=True, check=True).stdout
