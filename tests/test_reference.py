"""Compare short training runs with stored reference results.

The runs get command lines and are read back from their run folders, so the test does not depend on how the package is organised. The
reference is in tests/reference, one JSON file for each run: the metrics and the sampled token ids of each step, and the digest, sum and
norm of each final weight.

Each file also holds a fingerprint: digests of a few fixed computations on the machine that wrote it. Where the fingerprint of this machine
is the same, results must be bitwise equal. Elsewhere the metrics and the sum and norm of each weight must agree within a tolerance, and the
sampled ids are compared for the first step only.

Only metrics and rollouts that are in the reference are compared, so new ones may be added. When a metric is renamed, rename it in the JSON
files too.

Write the reference again, for all runs or for those named, after a change that is meant to alter the results:

    python tests/test_reference.py --write [RUN ...]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

REFERENCE = Path(__file__).resolve().parent / "reference"
# Every option that affects the numbers is given, so that another default does not change them. The micro-batches are small, so that a step
# has several. The learning rate is high, so that the ratio is clipped in the second inner step. Some gradients are clipped, others not.
OPTIONS = {
    "experiment": "debug",
    "hydra.run.dir": "run",
    "name": "reference",
    "seed": 0,
    "device": "cpu",
    "resume": "auto",
    "model.path": "bundled:tiny-student",
    "model.dtype": "float32",
    "model.attn_implementation": "sdpa",
    "teacher.path": "bundled:tiny-teacher",
    "teacher.dtype": "float32",
    "teacher.attn_implementation": "sdpa",
    "teacher.placement": "same",
    "teacher.quantization": "none",
    "lora.rank": 0,
    "data.source": "arithmetic",
    "data.size": 8100,
    "data.seed": 0,
    "data.max_prompt_tokens": 32,
    "sampling.engine": "generate",
    "sampling.dtype": "trainer",
    "sampling.temperature": 0.9,
    "sampling.top_p": 1.0,
    "sampling.top_k": 0,
    "sampling.n": 2,
    "sampling.max_new_tokens": 8,
    "sampling.truncated": "keep",
    "sampling.batch_size": 64,
    "sampling.lag": 0,
    "ppo.estimator": "sampled",
    "ppo.divergence": "reverse_kl",
    "ppo.steps": 2,
    "ppo.clip_eps": 0.2,
    "ppo.advantage_clip": 2.0,
    "ppo.importance_cap": 2.0,
    "ppo.reduction": "token",
    "ppo.baseline": "false",
    "ppo.discount": 0.0,
    "ppo.loss_prefix": "null",
    "ppo.reward_coef": 0.0,
    "optim.lr": 1e-3,
    "optim.weight_decay": 0.01,
    "optim.betas": "[0.9,0.95]",
    "optim.eps": 1e-6,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 1,
    "optim.max_grad_norm": 10.0,
    "train.max_steps": 5,
    "train.epochs": "null",
    "train.batch_size": 4,
    "train.max_tokens_per_micro_batch": 40,
    "train.packing": "false",
    "train.activation_checkpointing": "false",
    "train.compile": "false",
    "eval.steps": 0,
    "eval.reward": "null",
    "eval.kl_prompts": 0,
    "checkpoint.every": 100,
    "checkpoint.keep_last": 9,
    "checkpoint.best": "drop",
    "checkpoint.background": "false",
    "track.tool": "none",
    "track.rollouts_per_step": 100,
}
# Relative and absolute difference that is allowed between machines whose arithmetic differs.
RELATIVE, ABSOLUTE = 1e-3, 1e-4
TIMING = re.compile(r"(time|memory|perf)/.*|.*(per_second|seconds|bytes).*")
SHOWN_DIFFERENCES = 20
STOPPED = 75  # exit code of a run that a signal stopped


@dataclass(frozen=True)
class Run:
    """Describe one run of the reference.

    Args:
        options: What it sets besides `OPTIONS`.
        processes: Number of processes; `OPTIONS` is for one, and several share its batch.
        needs: Package without which it is skipped.
    """

    options: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    needs: str | None = None

    def words(self) -> list[str]:
        """Return the options as words of the command line."""
        shared = {"train.batch_size": OPTIONS["train.batch_size"] // self.processes}
        options = {**OPTIONS, **shared, **self.options}
        if options["ppo.estimator"] == "exact":
            del options["ppo.advantage_clip"]  # which it does not read
        return [f"{key}={value}" for key, value in options.items()]


RUNS = {
    "sampled": Run(),
    "sampled_two_processes": Run(processes=2),
    "exact": Run({"ppo.estimator": "exact"}),
    "exact_two_processes": Run({"ppo.estimator": "exact"}, processes=2),
    "lora": Run({"lora.rank": 4, "lora.alpha": 8, "lora.targets": "[all-linear]"}, needs="peft"),
    "top_p": Run({"sampling.top_p": 0.8}),
}
# Runs of more than ten seconds.
SLOW = {"sampled_two_processes", "exact_two_processes"}


def train(folder: Path, run: Run) -> dict[str, Any]:
    """Train from a command line.

    Args:
        folder: Empty folder to work in.
        run: The run.

    Returns:
        Its results, as `results` reads them.
    """
    forked.trained(folder, run.words(), run.processes)
    return results(folder / "run")


def stop_after(updates: int) -> None:
    """Let this process send itself SIGTERM after so many updates of any optimizer; nothing of the package is replaced."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(count)


def results(folder: Path) -> dict[str, Any]:
    """Read the results of a finished run.

    Args:
        folder: Its run folder.

    Returns:
        metrics: The lines of metrics.jsonl without times and memory.
        rollouts: The sampled ids of the stored rollouts by step.
        weights: By name the digest of each final weight, and its sum and norm in float64.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    weights = load_file(folder / "final" / "model.safetensors")
    return {
        "metrics": [{key: value for key, value in line.items() if not TIMING.fullmatch(key)} for line in lines],
        "rollouts": {str(int(file.stem.removeprefix("step_"))): sampled(file) for file in files},
        "weights": {name: weight(weights[name]) for name in sorted(weights)},
    }


def sampled(file: Path) -> dict[str, list[int]]:
    """Return the sampled ids in a file of rollouts, by the sample, epoch and attempt that they are for."""
    rollouts = [json.loads(line) for line in file.read_text().splitlines()]
    return {f"{rollout['sample_id']}/{rollout['epoch']}/{rollout['attempt']}": rollout["ids"] for rollout in rollouts}


def weight(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the digest of a tensor, and its sum and norm in float64."""
    return {"sha256": digest(tensor), "sum": float(tensor.double().sum()), "norm": float(tensor.double().norm())}


def digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes."""
    described = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return sha256(described + tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint() -> dict[str, str]:
    """Return versions, and digests of fixed float32 computations in the sizes of the bundled models.

    Call it in a process of its own with the variables of `environment`: threads and settings of the caller would change it.
    """

    def values(*shape: int) -> torch.Tensor:
        numbers = torch.arange(torch.Size(shape).numel()) * 7919 % 1009
        return (numbers.float() / 1009 - 0.5).reshape(shape)

    found: dict[str, torch.Tensor] = {}
    for name, hidden, inner in (("student", 64, 128), ("teacher", 128, 320)):
        found[f"linear_{name}"] = torch.nn.functional.linear(values(30, hidden), values(inner, hidden))
        found[f"head_{name}"] = torch.nn.functional.linear(values(30, hidden), values(261, hidden))
        query, key, value = values(3, 4, 12, 3 * hidden // 4).chunk(3, dim=-1)
        found[f"sdpa_{name}"] = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = 20 * values(30, 261)
    found |= {"exp": scores.exp(), "softmax": scores.softmax(-1), "log_softmax": scores.log_softmax(-1), "sum": scores.sum(-1)}
    found |= {"silu": torch.nn.functional.silu(scores), "rms": (scores.pow(2).mean(-1) + 1e-6).rsqrt()}
    parameter = torch.nn.Parameter(values(261, 64))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01, fused=True)
    torch.nn.functional.linear(values(30, 64), parameter).log_softmax(-1)[:, 7].sum().backward()
    optimizer.step()
    found |= {"gradient": parameter.grad, "adamw": parameter}
    return {"torch": torch.__version__, "transformers": version("transformers"), **{name: digest(found[name]) for name in found}}


def differences(name: str, found: dict[str, Any], reference: dict[str, Any], exact: bool) -> list[str]:
    """Compare the results of a run with the reference.

    Args:
        name: Name of the run.
        found: Its results.
        reference: What they should be.
        exact: Whether they should be bitwise equal, and not only close.

    Returns:
        A line for each difference, which names run, step and key.
    """
    compare = compare_exactly if exact else compare_closely
    steps = [line["step"] for line in reference["metrics"]]
    if [line["step"] for line in found["metrics"]] != steps:
        return [f"{name}: metrics.jsonl has the steps {[line['step'] for line in found['metrics']]}, reference {steps}"]
    lines = []
    for line, expected in zip(found["metrics"], reference["metrics"], strict=True):
        step = expected["step"]
        if exact or step == steps[0]:
            ids = found["rollouts"].get(str(step))
            lines += compare_exactly(f"{name}: step {step}: sampled ids", ids, reference["rollouts"][str(step)])
        lines += compare(f"{name}: step {step}", line, expected)
    if found["weights"].keys() != reference["weights"].keys():
        return [*lines, f"{name}: final weights: other names: {sorted(found['weights'].keys() ^ reference['weights'].keys())}"]
    for key, expected in reference["weights"].items():
        own, where = found["weights"][key], f"{name}: final weights: {key}"
        if exact and own["sha256"] != expected["sha256"]:
            lines.append(f"{where}: other bytes (sum {own['sum']}, reference {expected['sum']}; norm {own['norm']}, {expected['norm']})")
        if not exact:
            lines += [
                f"{where}: {part}: {own[part]}, reference {expected[part]}"
                for part in ("sum", "norm")
                if abs(own[part] - expected[part]) > ABSOLUTE + RELATIVE * expected["norm"]
            ]
    return lines


def walk(where: str, found: Any, reference: Any) -> Iterator[tuple[str, Any, Any]]:
    """Go through two JSON values side by side.

    Args:
        where: What to call them.
        found: One value.
        reference: The other; of an object only its keys count.

    Yields:
        Name and both values of each pair that is not two objects or two lists of one length; "missing" for a key that is not there.
    """
    if isinstance(found, dict) and isinstance(reference, dict):
        for key, value in reference.items():
            yield from walk(f"{where}: {key}", found.get(key, "missing"), value)
    elif isinstance(found, list) and isinstance(reference, list) and len(found) == len(reference):
        for index, value in enumerate(reference):
            yield from walk(f"{where}[{index}]", found[index], value)
    else:
        yield where, found, reference


def compare_exactly(where: str, found: Any, reference: Any) -> list[str]:
    """Return a line for each value that is not equal to the reference's."""
    return [f"{name}: {own}, reference {other}" for name, own, other in walk(where, found, reference) if own != other]


def compare_closely(where: str, found: Any, reference: Any) -> list[str]:
    """Return a line for each number that is not close to the reference's, and each other value that is not equal to it."""

    def is_close(own: Any, other: Any) -> bool:
        numbers = isinstance(own, int | float) and isinstance(other, int | float)
        return own == other or (numbers and abs(own - other) <= ABSOLUTE + RELATIVE * abs(other))

    return [f"{name}: {own}, reference {other}" for name, own, other in walk(where, found, reference) if not is_close(own, other)]


def check(found: list[str], exact: bool) -> None:
    """Fail with the first differences, if there are any."""
    if found:
        shown = found[:SHOWN_DIFFERENCES] + ["…"] * (len(found) > SHOWN_DIFFERENCES)
        kind = "bitwise" if exact else "beyond the tolerance"
        pytest.fail("\n".join([f"{len(found)} differences from the reference ({kind}):", *shown]), pytrace=False)


def stored(name: str) -> dict[str, Any]:
    """Return the reference of a run."""
    reference: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text())
    return reference


def measured_fingerprint(folder: Path) -> dict[str, str]:
    """Return the fingerprint of this machine, from a process of its own that works in `folder`."""
    command, environment = [sys.executable, str(Path(__file__).resolve()), "--fingerprint"], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Measure the fingerprint of this machine once."""
    return measured_fingerprint(tmp_path_factory.mktemp("fingerprint"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return a function that gives the results of a run by its name, and trains at most once for each."""
    known: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = train(tmp_path_factory.mktemp(name), RUNS[name])
        return known[name]

    return get


def test_this_machine_computes_as_the_one_that_wrote_the_reference(machine):
    """Tell, by being skipped, that the other tests of this file compare to a tolerance only."""
    for name in RUNS:
        reference = stored(name)["fingerprint"]
        other = [key for key in reference if machine.get(key) != reference[key]]
        if other:
            pytest.skip(f"{name}: results are compared to a tolerance, because this machine differs in {', '.join(other)}")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RUNS])
def test_a_run_gives_the_results_of_the_reference(name, trained, machine):
    if RUNS[name].needs:
        pytest.importorskip(RUNS[name].needs)
    reference = stored(name)
    exact = machine == reference["fingerprint"]
    check(differences(name, trained(name), reference, exact), exact)


@pytest.mark.slow
def test_a_run_that_was_stopped_between_inner_steps_gives_the_results_of_the_reference(trained, machine, tmp_path):
    """Stop after the first of the two updates of step 3 and resume with the same command."""
    run, reference = RUNS["sampled"], stored("sampled")
    stopped = forked.train(tmp_path, run.words(), before=partial(stop_after, 5))
    assert stopped.codes == [STOPPED], stopped
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002_1"]
    found = train(tmp_path, run)
    check(differences("stopped, compared with the run that was not", found, trained("sampled"), exact=True), exact=True)
    exact = machine == reference["fingerprint"]
    check(differences("stopped", found, reference, exact), exact)


def layout(value: Any, indent: str = "") -> str:
    """Format a JSON value with an entry on each line, but lists of numbers on one."""
    if isinstance(value, dict) and value:
        parts = [f"{json.dumps(key)}: {layout(part, indent + '  ')}" for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        parts = [layout(part, indent + "  ") for part in value]
    else:
        return json.dumps(value)
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n" + ",\n".join(f"{indent}  {part}" for part in parts) + f"\n{indent}{end}"


def write(names: list[str]) -> None:
    """Train and write the reference of the named runs."""
    REFERENCE.mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = {"fingerprint": measured_fingerprint(Path(folder)), **train(Path(folder), RUNS[name])}
        (REFERENCE / f"{name}.json").write_text(layout(found) + "\n")
        print(f"wrote {REFERENCE / name}.json")


def main() -> None:
    """Write the reference, or print the fingerprint of this machine."""
    parser = argparse.ArgumentParser(description="Write the reference results of tests/test_reference.py.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", nargs="*", metavar="RUN", choices=list(RUNS), help="train and write these runs; all if none is named")
    what.add_argument("--fingerprint", action="store_true", help="print the fingerprint of this machine")
    arguments = parser.parse_args()
    if arguments.fingerprint:
        print(json.dumps(fingerprint()))
    else:
        write(arguments.write or list(RUNS))


if __name__ == "__main__":
    main()
