"""What people type: home folders, paths as names of models, several slips at a time, sweeps in which all members share one."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from opd import errors
from opd.cli import hydra_errors
from opd.cli import main as cli
from opd.cli.words import explain, readable
from opd.config.compose import options

DEBUG = ["experiment=debug", "device=cpu"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("model.path=~/x", "model.path=/home/me/x"),
        ("model.path=~/x,~/y", "model.path=/home/me/x,/home/me/y"),
        ("model=~/x", "model.path=/home/me/x"),
        ("model=./folder", "model.path=./folder"),
        ("model=OWNER/NAME", "model.path=OWNER/NAME"),
        ("teacher=OWNER/NAME,./y", "teacher.path=OWNER/NAME,./y"),
        ("teacher=tiny,./y", "teacher=tiny,./y"),
        ("model=tiny", "model=tiny"),
        ("data.path=OWNER/NAME", "data.path=OWNER/NAME"),
        ("teacher.system='~/x'", "teacher.system='~/x'"),
        ("~model", "~model"),
        ("model=sub/mine", "model=sub/mine"),
    ],
)
def test_words_are_read_as_they_are_meant(word: str, read: str, tmp_path: Path) -> None:
    (tmp_path / "conf/model/sub").mkdir(parents=True)
    (tmp_path / "conf/model/sub/mine.yaml").touch()
    assert readable(word, [tmp_path / "conf"]) == read


@pytest.mark.parametrize("verb", ["train", "doctor", "eval"])
def test_of_an_option_given_twice_the_last_counts_and_it_is_said(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [verb, *DEBUG, "optim.lr=1e-4", "model=A/B", "seed=1", "seed=1", "optim.lr=-1", "model.path=C/D"]
    assert cli.main(words) == errors.USAGE
    shown = capsys.readouterr().err
    assert "warning: optim.lr=-1 counts, not optim.lr=1e-4" in shown
    assert "warning: model.path=C/D counts, not model.path=A/B" in shown
    assert "seed" not in shown
    assert "must be above 0" in shown


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", *DEBUG, "model=./nothere"], ["model.path=./nothere", "no such folder"]),
        (["train", *DEBUG, "lrr=1", "optm.lr=3", "sampling.n=1"], ["lrr: no such", "optm.lr: no such option; did you mean optim.lr"]),
        (["train", *DEBUG, "teacher.system=You, are right"], ["'teacher.system=\"You, are right\"'"]),
        (["train", *DEBUG, "data.system=It's brief"], ["""'data.system="It'"'"'s brief"'"""]),
        (["train", *DEBUG, "teacher.system=Be", "brief,"], ["brief,: an argument is option=value, and a text with spaces needs quotes"]),
        (["train", *DEBUG, "optim.betas=1,2"], ["a list is [a,b]"]),
        (["train", *DEBUG, "optim.betas=1"], ["for example [0.9,0.95]"]),
        (["train", *DEBUG, "lora.targets=q_proj"], ["a list, for example [a,b]"]),
        (["train", *DEBUG, "~optim.lr"], ["~optim.lr: an option cannot be taken out", "optim.lr=VALUE"]),
        (["train", *DEBUG, "resume=yes"], ["resume=yes", "resume=auto or resume=never"]),
        (["train", *DEBUG, "--resume"], ["the same command resumes"]),
        (["train", *DEBUG, "--max-steps", "3"], ["an option has no dashes: train.max_steps=VALUE"]),
        (["train", *DEBUG, "--seed", "3"], ["an option has no dashes: seed=VALUE;"]),
        (["train", "experiment=mine"], ["--config-dir conf"]),
        (["sample", "runs/a", "--n", "3"], ["--n: no such flag", "-n"]),
        (["sample", "runs/a", "-prompt", "x"], ["-prompt: no such flag", "--prompt"]),
        (["report", "-out", "x"], ["--out"]),
    ],
)
def test_slips_get_one_line_with_the_remedy(words: list[str], parts: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").touch()
    assert cli.main(words) == errors.USAGE
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1 and all(part in shown for part in parts), shown


@pytest.mark.parametrize("text", ["It's brief", 'say "a"', "a, b\\", '\\"', "C:\\new $HOME `x`", "“quoted”"])
def test_the_quoted_remedy_gives_the_text_when_pasted(text: str) -> None:
    (word,) = shlex.split(hydra_errors.quoted("data.system", text))
    assert OverridesParser.create().parse_override(word).value() == text


def test_a_mistake_that_all_members_share_is_refused_once_before_the_first(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "-m", *DEBUG, "optim.lr=-1", "seed=0,1,2"]) == errors.USAGE
    shown = capfd.readouterr()
    assert shown.err.count("optim.lr=-1") == 1 and "member" not in shown.out and not list(tmp_path.iterdir())
    # A mistake of some members does not stop the others.
    assert cli.main(["train", "-m", *DEBUG, "optim.lr=-1,1e-4", "train.max_steps=1", "eval=kl", "eval.kl_prompts=0"]) == errors.USAGE
    assert "1 of 2 done" in capfd.readouterr().out


def test_help_explains_options_and_groups(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "optim.lr", "checkpoint"]) == errors.OK
    first, *lines = capfd.readouterr().out.splitlines()
    assert first.startswith("optim.lr  learning rate. null: ") and first.endswith("(default: null)")
    named = [line.split()[0] for line in lines]
    assert named == ["checkpoint.every", "checkpoint.keep_last", "checkpoint.best", "checkpoint.background", "checkpoint=default"]
    assert cli.main(["train", "--help", "optim.lrr"]) == errors.USAGE
    assert "did you mean lr" in capfd.readouterr().err


def test_help_shows_the_default_of_the_choices_beside_it_or_of_all_choices(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "data.prompt"]) == errors.OK
    assert "(default: question; prompt with data=arithmetic|hub|jsonl|parquet)" in capfd.readouterr().out
    assert cli.main(["train", "data=jsonl", "--help", "data.prompt", "data.source", "model.path"]) == errors.OK
    first, second, third = capfd.readouterr().out.splitlines()
    assert "(default: prompt)" in first and "(default: jsonl)" in second and "(default: Qwen/Qwen2.5-0.5B-Instruct)" in third
    assert cli.main(["train", "data=jsonl", "--help"]) == errors.OK
    assert capfd.readouterr().out.startswith("Usage: opd train")


def test_help_explains_groups_without_options_and_the_folders_of_hydra_and_prints_no_links(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help", "experiment"]) == errors.OK
    assert capfd.readouterr().out.startswith("experiment=debug|") and not capfd.readouterr().err
    assert cli.main(["train", "--help", "hydra.run.dir"]) == errors.OK
    assert "hydra.run.dir=FOLDER" in capfd.readouterr().out
    assert cli.main(["train", "--help", "hydra.job.name"]) == errors.USAGE and "--cfg hydra" in capfd.readouterr().err
    assert "](" not in explain([name for name in options() if "." in name])


def test_every_option_has_a_row_that_help_finds() -> None:
    sections = {name.rpartition(".")[0] for name in options() if "." in name}
    for name in options():
        if name not in sections:
            assert name in explain([name]), name


@pytest.mark.parametrize("verb", ["train", "eval", "sample", "score", "doctor", "ls", "cp", "compare", "report", "export", "completion"])
def test_help_of_all_verbs_has_one_style(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == errors.OK
    out = capfd.readouterr().out
    assert out.startswith(f"Usage: opd {verb}") and "\nExamples:\n  " in out and "\nusage:" not in out
