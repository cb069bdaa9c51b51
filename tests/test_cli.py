"""The command line: help without torch, one line with a remedy and an exit code for every mistake, sweeps, tab completion."""

import contextlib
import errno
import io
import json
import logging
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.config_store import ConfigStore

import opd as package
from opd import errors, train, training
from opd.cli import completion, hydra_app, hydra_errors, main
from opd.cli.arguments import prepare_process
from opd.config import compose
from opd.config.schema import Config

HEAVY = {"accelerate", "datasets", "torch", "transformers"}


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "opd", *words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def modules_after(words: list[str], cwd: Path) -> set[str]:
    """The top-level modules that `opd WORDS` imports."""
    code = f"import sys; from opd.cli import main; main.main({words!r}); print('modules', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["opd"])
    for name in ("RANK", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    ConfigStore.instance().repo.pop("teacher", None)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


# Help, verbs, version


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_help_lists_every_verb_with_summary_and_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 0
    shown = capsys.readouterr().out
    for name, verb in main.VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", shown, re.MULTILINE)
        assert verb.example in shown


def test_help_imports_neither_torch_nor_hydra(tmp_path: Path) -> None:
    assert not modules_after(["--help"], tmp_path) & {*HEAVY, "hydra", "omegaconf", "rich", "yaml"}


def test_import_opd_does_not_import_torch() -> None:
    code = "import sys, opd; assert 'reward' in dir(opd) and opd.__version__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & HEAVY


def test_import_opd_exports_reward_and_refuses_unknown_names() -> None:
    from opd.data.rewards import reward

    assert package.reward is reward
    with pytest.raises(AttributeError, match="nonsense"):
        _ = package.nonsense


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--version"]) == 0
    assert re.fullmatch(r"opd \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("trian", "did you mean train?"),
        ("xyz", "choose from train"),
        ("model=qwen05b", "opd train model=qwen05b"),
        ("--wat", "no such verb"),
    ],
)
def test_unknown_verb_is_one_line_with_a_remedy(word: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([word]) == errors.USAGE
    complaint = capsys.readouterr().err
    assert complaint.startswith("opd: error: ")
    assert complaint.count("\n") == 1
    assert remedy in complaint


def test_train_help_names_groups_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["help", "train"]) == 0
    shown = capsys.readouterr().out
    assert "opd train model=qwen05b teacher=qwen15b" in shown
    assert re.search(r"teacher: .*qwen15b", shown)
    assert 'eval "$(opd completion bash)"' in shown
    assert "Hydra" not in shown


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["train", "--cfg", "job"]])
def test_broken_pipe_prints_no_error(words: list[str], tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-m", "opd", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--cfg", "job"],
        ["train", "--help"],
        ["score", "--help"],
        ["report", "--help"],
        ["completion", "--query", "opd train model=q"],
        *(["completion", "--query", f"opd {verb} --"] for verb in ("doctor", "eval", "sample", "score", "export")),
    ],
)
def test_help_cfg_and_completion_do_not_import_torch(words: list[str], tmp_path: Path) -> None:
    assert not modules_after(words, tmp_path) & HEAVY


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "runs/nosuch"],
        ["eval", "runs/killed"],
        ["eval", "bundled:tiny-student", "--best"],
        ["score", "bundled:tiny-student", "teacher=tiny"],
        ["score", "bundled:tiny-student", "teacher=./nosuch", "--text", "11"],
        ["sample", "bundled:tiny-student", "teacher=tiny"],
        ["sample", "bundled:tiny-student", "--out", "there"],
        ["export", "runs/killed", "--out", "new"],
        ["export", "runs/killed", "--best", "--out", "new"],
    ],
)
def test_mistakes_in_words_and_files_are_told_without_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "runs/killed").mkdir(parents=True)
    (tmp_path / "runs/killed/run.json").write_text(json.dumps({"config": {"model": {"path": "bundled:tiny-student"}}}))
    code = (
        f"import sys; from opd.cli import main; code = main.main({words!r}); print(code, *{{name.split('.')[0] for name in sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    result, *modules = done.stdout.splitlines()[-1].split()
    assert int(result) in (errors.USAGE, errors.DATA, errors.OUTPUT) and done.stderr.count("\n") == 1, done.stderr
    assert not set(modules) & HEAVY


def test_cfg_job_prints_the_composed_config(tmp_path: Path) -> None:
    shown = run("train", "model=qwen3b", "--cfg", "job", "optim.lr=3e-5", cwd=tmp_path)
    assert shown.returncode == 0
    assert shown.stderr == ""
    assert "path: Qwen/Qwen2.5-3B-Instruct" in shown.stdout
    assert "lr: 3.0e-05" in shown.stdout
    assert list(tmp_path.iterdir()) == []


# Mistakes

MISTAKES = [
    ("model=qwen05", 64, "did you mean qwen05b"),
    ("model=Qwen2.5-0.5B", 64, "model.path="),
    ("teacher=gpt", 64, "teacher.path="),
    ("data=my.jsonl", 64, "data.train_path="),
    ("experiment=tny", 64, "did you mean tiny"),
    ("modle=qwen05b", 64, "did you mean model?"),
    ("optim.learning_rate=1", 64, "did you mean optim.lr?"),
    ("optim.rate=1", 64, "optim has name, lr, weight_decay"),
    ("temperature=1", 64, "did you mean sampling.temperature or ppo.temperature or eval.temperature?"),
    ("learning_rate=3", 64, "did you mean optim.lr?"),
    ("data.mix={a:{weight:-1}}", 64, "data.mix.a.weight=-1"),
    ("data.mix={a:{size:x}}", 64, "data.mix.a.size=x: must be a whole number"),
    ("data.mix.a.source=jsonl", 64, "data.mix.a.train_path=FILE.jsonl"),
    ("train.num_generations=3", 64, "did you mean sampling.n?"),
    ("optim.lr=abc", 64, "optim.lr=abc: must be a number"),
    ("lora=[1,2]", 64, "lora=[1,2]: lora is chosen by name; choose from default, none"),
    ("optim.eps=null", 64, "must be a number"),
    ("train.max_steps=1.5", 64, "must be a whole number or null"),
    ("model.trust_remote_code=perhaps", 64, "must be true or false"),
    ("model.dtype=float8", 64, "must be one of auto, float32, bfloat16"),
    ("optim.betas=3", 64, "must be a list"),
    ("data=jsonl", 64, "data.train_path=FILE.jsonl"),
    ("data=hub", 64, "data.path="),
    ("optim.lr", 64, "optim.lr=VALUE"),
    ("tiny", 64, "did you mean"),
    ("model.path={a", 64, "'model.path=\"{a\"'"),
    ("data.answer_after=####", 64, "'data.answer_after=\"####\"'"),
    ("optim.lr=1,2", 64, "add -m"),
    ("model=qwen05b,qwen3b", 64, "add -m"),
    ("optim.lr=-1", 64, "must be above 0"),
    ("name=../x", 64, "the run folder"),
    ("name=${oc.env:NO_SUCH_VARIABLE}", 64, "NO_SUCH_VARIABLE"),
    ("+colour=red", 64, "+colour"),
    ("~optim.lr", 64, "~optim.lr"),
    ("model=3", 64, "Config group override must be a string"),
    ("hydra.rn.dir=x", 64, "--cfg hydra"),
    ("--config-dir nowhere", 64, "nowhere"),
    ("--config-name tiny", 64, "experiment=NAME"),
    ("--config-path /nowhere", 64, "config directory"),
    ("--wat", 64, "opd train --help"),
    ("--cfg", 64, "expected one argument"),
    ("--cfg job --info", 64, "Only one of"),
    ("--experimental-rerun x.pickle", 64, "pickle"),
    ("-m name=../x seed=0,1", 64, "the run folder"),
    ("-m model=qwen05b,qwen99", 64, "qwen99"),
    ("hydra.run.dir=/proc/opd", 74, "/proc/opd"),
    ("hydra.run.dir=file", 74, "hydra.run.dir=FOLDER"),
    ("hydra.run.dir=taken", 74, "train.log"),
]


def must_not_run(config: Config, folder: Path) -> None:
    raise AssertionError("the task was started")


@pytest.mark.parametrize(("line", "code", "remedy"), MISTAKES, ids=lambda value: value if isinstance(value, str) and "=" in value else "")
def test_a_mistake_is_one_line_with_a_remedy(
    line: str, code: int, remedy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "train.log").mkdir(parents=True)
    assert hydra_app.run_verb(must_not_run, line.split()) == code
    shown = capfd.readouterr()
    assert re.fullmatch(r"opd: error: [^\n]+\n", shown.err), shown.err
    assert remedy in shown.err
    assert "Traceback" not in shown.out
    assert not (tmp_path / "runs").exists(), "a mistake must leave no run folder behind"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("# @package _global_\noptim:\n  learning_rate: 1\n", "optim.learning_rate: no such option"),
        ("# @package _global_\noptim:\n  lr: abc\n", "optim.lr=abc: must be a number or null (in experiment/mine.yaml)"),
        ("# @package _global_\ndefaults:\n  - override /model: qwen99\n", "model=qwen99"),
        ("# @package _global_\noptim: [\n", "not valid YAML"),
    ],
)
def test_mistake_in_a_user_yaml_file_is_one_line_with_a_remedy(
    text: str, remedy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    assert hydra_app.run_verb(must_not_run, ["--config-dir", "own", "experiment=mine"]) == errors.USAGE
    complaint = capfd.readouterr().err
    assert re.fullmatch(r"opd: error: [^\n]+\n", complaint), complaint
    assert remedy in complaint


@pytest.mark.parametrize(
    ("word", "removed"),
    [
        ("optim.beta1=0.9", "optim.beta1"),
        ("eval.old.nested=1", "eval.old"),
        ("model.dtype='float64'", "model.dtype=float64"),
        ("lora=dora", "lora=dora"),
    ],
)
def test_removed_option_or_value_names_what_to_use(
    word: str, removed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compose, "REMOVED", {removed: "use this"})
    assert hydra_app.run_verb(must_not_run, [word]) == errors.USAGE
    assert capfd.readouterr().err == f"opd: error: {removed}: was removed; use this\n"


def test_removed_options_are_no_longer_options() -> None:
    assert not set(compose.REMOVED) & set(compose.options())


def test_mistake_through_the_real_command_is_one_line(tmp_path: Path) -> None:
    for module in (["-m", "opd", "train"], ["-m", "opd.train"]):
        done = subprocess.run([sys.executable, *module, "modle=x"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == errors.USAGE
        assert done.stdout == ""
        assert done.stderr.startswith("opd: error: modle")
        assert done.stderr.count("\n") == 1


def test_a_mistake_does_not_touch_an_earlier_run(tmp_path: Path) -> None:
    assert hydra_app.run_verb(lambda config, folder: None, ["name=mine"]) == errors.OK
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert hydra_app.run_verb(must_not_run, ["name=mine", "optim.lr=-1"]) == errors.USAGE
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# The task


@pytest.mark.filterwarnings("default")
def test_the_task_gets_the_config_and_the_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def task(config: Config, folder: Path) -> None:
        seen.append((config, folder))
        warnings.warn("somebody else's", stacklevel=1)

    arguments = ["optim.lr=1e-4", "--config-dir", str(tmp_path), "name=mine"]  # flags and overrides in any order
    assert hydra_app.run_verb(task, arguments) == errors.OK
    [(config, folder)] = seen
    assert config.optim.lr == 1e-4
    assert folder == tmp_path / "runs" / "mine"
    assert "somebody else's" in (folder / "train.log").read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "shown_error"),
    [
        (errors.ConfigError("no such\n model"), 64, "opd: error: no such model\n"),
        (errors.DataError("no data"), 65, "opd: error: no data\n"),
        (errors.OutputError("no room"), 74, "opd: error: no room\n"),
        (errors.NumericError("nan"), 77, "opd: error: nan\n"),
        (OSError(28, "No space left on device", "x/y"), 74, "opd: error: x/y: No space left on device\n"),
        (FileNotFoundError(2, "No such file", "x/y"), 70, "opd: internal error: FileNotFoundError"),
        (ZeroDivisionError("odd"), 70, "opd: internal error: ZeroDivisionError: odd; the traceback is in "),
        (KeyboardInterrupt(), 130, "opd: interrupted\n"),
        (SystemExit(75), 75, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_code_and_message_of_a_failing_task(
    error: BaseException, code: int, shown_error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def task(config: Config, folder: Path) -> None:
        raise error

    assert hydra_app.run_verb(task, ["name=mine"]) == code
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == shown_error or (code == 70 and shown.err.startswith(shown_error) and shown.err.count("\n") == 1)
    if code not in (errors.INTERNAL, errors.PREEMPTED, errors.NUMERIC):
        assert not (tmp_path / "runs" / "mine").exists(), "where nothing was begun nothing is left"
        return
    log = (tmp_path / "runs" / "mine" / "train.log").read_text()
    assert ("Traceback" in log) == (code == 70)
    if code == 70:
        assert str(tmp_path / "runs" / "mine" / "train.log") in shown.err
    elif shown_error.startswith("opd: error"):
        assert shown_error.removeprefix("opd: error: ") in log


def test_a_refused_start_removes_no_file_but_its_log(tmp_path: Path) -> None:
    def task(config: Config, folder: Path) -> None:
        (folder / "mine.txt").touch()
        raise errors.ConfigError("no")

    assert hydra_app.run_verb(task, ["name=mine"]) == errors.USAGE
    assert sorted(path.name for path in (tmp_path / "runs/mine").iterdir()) == ["mine.txt", "train.log"]


def test_preempted_run_ends_the_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def task(config: Config, folder: Path) -> float:
        seen.append(config.seed)
        raise errors.Preempted("stopped by SIGTERM")

    assert hydra_app.run_verb(task, ["-m", "seed=0,1,2", "optim.lr=0.1"]) == errors.PREEMPTED
    assert seen == [0]
    assert capfd.readouterr().err == "opd: stopped by SIGTERM\n"


def test_failing_member_does_not_end_a_sweep_and_the_first_exit_code_counts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def task(config: Config, folder: Path) -> float:
        seen.append((config.seed, folder))
        if config.seed == 1:
            raise errors.DataError("no data")
        if config.seed == 2:
            raise ZeroDivisionError
        return 1.0

    assert hydra_app.run_verb(task, ["-m", "seed=0,1,2,3", "optim.lr=0.1"]) == errors.DATA
    sweep = tmp_path / "sweeps" / "qwen05b-from-qwen15b-on-gsm8k"
    assert seen == [(seed, sweep / f"seed={seed}") for seed in range(4)]
    assert "Error executing job" not in capfd.readouterr().err


def test_a_sweep_over_groups_has_one_folder_and_a_member_out_of_range_does_not_end_it(tmp_path: Path) -> None:
    seen = []
    words = ["model=qwen3b,qwen7b", "-m", "optim.lr=1,-1"]
    assert hydra_app.run_verb(lambda config, folder: seen.append(folder), words) == errors.USAGE
    sweep = tmp_path / "sweeps" / "qwen05b-from-qwen15b-on-gsm8k"
    assert seen == [sweep / "model=qwen3b,optim.lr=1", sweep / "model=qwen7b,optim.lr=1"]


def test_sweep_members_over_paths_stay_in_the_sweep_folder(tmp_path: Path) -> None:
    seen = []
    words = ["-m", "name=s", "data=jsonl", "data.train_path=../../../a.jsonl,b/../../../../a.jsonl"]
    assert hydra_app.run_verb(lambda config, folder: seen.append(folder), words) == errors.OK
    assert [folder.resolve().parent for folder in seen] == 2 * [tmp_path / "sweeps" / "s"]


@pytest.mark.parametrize(
    ("error", "shown_error"),
    [
        (None, ""),
        (errors.DataError("no data"), ""),
        (ZeroDivisionError("odd"), "ZeroDivisionError: odd\nopd: [rank 1] internal error: ZeroDivisionError: odd\n"),
    ],
)
def test_other_ranks_write_no_files_and_repeat_no_error(
    error: Exception | None, shown_error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.signals.launched_as", lambda: (1, 2))

    def task(config: Config, folder: Path) -> None:
        if error is not None:
            raise error

    code = hydra_app.run_verb(task, ["name=mine"])
    assert (code == errors.OK) == (error is None)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == shown_error or (shown_error and shown.err.endswith(shown_error))
    assert list((tmp_path / "runs" / "mine").iterdir()) == []


def test_other_ranks_leave_command_line_mistakes_to_rank_0(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.signals.launched_as", lambda: (1, 2))
    assert hydra_app.run_verb(must_not_run, ["modle=x"]) == errors.USAGE
    assert capfd.readouterr() == ("", "")


def test_opd_train_calls_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    runner = SimpleNamespace(run=lambda config, folder: calls.append((config.model.path, folder)))
    monkeypatch.setattr(training, "runner", runner, raising=False)
    assert main.main(["train", "model=qwen3b", "name=mine"]) == errors.OK
    assert train.main(["model=qwen3b", "name=mine"]) == errors.OK
    assert calls == 2 * [("Qwen/Qwen2.5-3B-Instruct", tmp_path / "runs" / "mine")]


# Completion


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("opd ", {"train", "completion"}, set()),
        ("opd tr", {"train"}, {"completion"}),
        ("opd completion ", {"bash", "zsh", "fish"}, set()),
        ("opd train mod", {"model=", "model."}, {"modle="}),
        ("opd train ", {"model=", "teacher=", "experiment=", "seed=", "optim."}, {"hydra."}),
        ("opd train model=qw", {"model=qwen05b", "model=qwen3b"}, {"model=tiny"}),
        ("opd train teacher=q", {"teacher=qwen15b"}, {"teacher=tiny"}),
        ("opd train optim.l", {"optim.lr="}, {"optim.eps="}),
        ("opd train experiment=tiny -m seed=0,1 optim.w", {"optim.weight_decay=", "optim.warmup_steps="}, set()),
        ("opd train optim.eps=", {"optim.eps=1e-08"}, set()),
        ("opd train model.dtype=", {"model.dtype=auto", "model.dtype=bfloat16"}, set()),
        ("opd train model.dtype=b", {"model.dtype=bfloat16"}, {"model.dtype=auto"}),
        ("opd train model.trust_remote_code=", {"model.trust_remote_code=true"}, set()),
        ("opd train data.train_path=./fi", {"data.train_path=./file"}, set()),
        ("opd train --c", {"--cfg", "--config-dir"}, {"--multirun"}),
        ("opd train -cd own model=m", {"model=mine"}, set()),
        ("opd train -cd own teacher=m", {"teacher=mine"}, set()),
        ("opd train --cfg", {"--cfg"}, set()),
        ("opd train x==y mod", set(), {"model="}),
        ("opd doctor experiment=tiny optim.l", {"optim.lr="}, set()),
        ("opd eval runs/x eval.samp", {"eval.samples="}, {"eval.limit="}),
        ("opd eval --ba", {"--baseline"}, {"--multirun"}),
        ("opd score runs/x --h", {"--html", "--help"}, {"--teacher"}),
        ("opd ls ", {"models", "runs"}, {"train", "--json"}),
        ("opd ls --", {"--json"}, {"models"}),
        ("opd compare runs --", {"--csv", "--metric"}, {"runs", "--svg"}),
        ("opd export --", {"--push", "--dtype"}, set()),
        ("opd cp experiment/t", {"experiment/tiny"}, {"experiment/debug"}),
        ("opd wat ", set(), {"train"}),
        ("", set(), {"train"}),
    ],
)
def test_completion_offers_verbs_flags_groups_and_options(line: str, offered: set[str], not_offered: set[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("path: x\n")
    words = set(completion.query(line))
    assert offered <= words
    assert not not_offered & words
    if not offered:
        assert not words


def test_completion_for_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["completion", "tcsh"]) == errors.USAGE
    assert "bash, zsh, fish" in capsys.readouterr().err
    assert main.main(["completion"]) == errors.USAGE


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(opd completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'eval "$(opd completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "opd completion fish | source"),
}


class Terminal:
    """A shell with a keyboard."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], argv, environment)
        self.shown = ""

    def press(self, keys: str) -> None:
        self.shown = ""
        os.write(self.keyboard, keys.encode())

    def shows(self, text: str, seconds: float = 20.0) -> bool:
        """Whether `text` appears in time; the bell and control sequences do not count."""
        end = time.monotonic() + seconds
        while text not in re.sub(r"\x07|\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown):
            if time.monotonic() > end:
                return False
            if select.select([self.keyboard], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.shown += os.read(self.keyboard, 65536).decode(errors="replace")
        return True

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.keyboard)


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_key_completes_in_a_real_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "bin" / "opd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m opd "$@"\n')
    command.chmod(0o755)
    argv, setup = SHELLS[shell]
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    terminal = Terminal(argv, {**os.environ, "PATH": path, "HOME": str(tmp_path), "TERM": "xterm" if shell == "fish" else "dumb"})
    try:
        terminal.press(f"{setup}; echo re''ady\r")
        assert terminal.shows("ready"), terminal.shown
        for typed, completed in [
            ("opd tr\t", "opd train "),
            ("opd train model=qwen3_0\t", "opd train model=qwen3_06b "),
            ("opd train optim.l\t", "opd train optim.lr="),
            ("opd train model.dtype=bf\t", "opd train model.dtype=bfloat16 "),
        ]:
            terminal.press(typed)
            assert terminal.shows(completed, 8), repr(terminal.shown)
            terminal.press("\x15")
    finally:
        terminal.close()


@pytest.mark.long
@pytest.mark.slow
def test_run_continues_after_a_broken_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opd", "train", "experiment=debug", "device=cpu", "name=run", "train.max_steps=2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        complaints = process.stderr.read()
        assert process.wait(timeout=120) == errors.OK, complaints
    assert complaints == "" and json.loads((tmp_path / "runs/run/status.json").read_text())["status"] == "done"
    assert "without it" in (tmp_path / "runs/run/train.log").read_text()


def test_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def task(config: Config, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    assert hydra_app.run_verb(task, ["experiment=debug"], "doctor") == errors.OUTPUT
    assert capsys.readouterr().err == "opd: error: runs/x/metrics.jsonl: No space left on device\n"


def test_command_runs_beside_modules_with_names_of_others_without_streams_and_in_ascii(tmp_path: Path) -> None:
    for module in ("random", "logging", "datasets", "hydra", "yaml"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(99)")
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    for streams in ("", ">&- 2>&- <&-"):
        command = f"exec {sys.executable} -m opd.train --cfg job 'teacher.system=\"\u00d7\"' {streams}"
        assert subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True).returncode == errors.OK


def test_signs_that_standard_output_cannot_encode_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    prepare_process()
    print("3 \u00d7 4", flush=True)
    assert written.getvalue() == b"3 ? 4\n"


def test_arguments_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "name=\udcc3\udca4"]) == errors.USAGE
    assert "PYTHONUTF8=1" in capsys.readouterr().err


def test_names_from_elsewhere_lead_to_options_that_exist() -> None:
    assert set(hydra_errors.ELSEWHERE.values()) <= compose.options().keys() and not hydra_errors.ELSEWHERE.keys() & {
        name.rpartition(".")[2] for name in compose.options()
    }
