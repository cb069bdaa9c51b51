"""`opd sample` and `opd score`: answers of student and teacher side by side, and their log-probs of a text's tokens."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from opd import errors
from opd.cli.arguments import at_least
from opd.cli.hydra_app import FlagParser
from opd.config.files import local_path
from opd.config.schema import Config
from opd.runs.folder import check_output_path, write_output
from opd.runs.text import format_amount, make_console


def make_sample_parser() -> FlagParser:
    parser = FlagParser("sample", sample, "prompts are given with --prompt TEXT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--file")
    parser.add_argument("--teacher")
    parser.add_argument("-n", "--samples", type=partial(at_least, 1), default=1)
    parser.add_argument("--out", type=local_path)
    parser.add_argument("--only-right", action="store_true")
    return parser


def sample(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Print the answers of both models to each prompt: from `--prompt`, `--file`, or the terminal. With `--out`, write the teacher's."""
    if flags.out is not None or flags.only_right:
        write_teacher(config, folder, flags)
        return
    from opd.evaluation.target import NONE, find_pair, find_target
    from opd.evaluation.texts import read_prompts

    target = find_target(flags.target, config, flags.teacher)
    with_teacher = target.has_teacher if flags.teacher is None else flags.teacher != NONE
    find_pair(target.config, with_teacher)
    console = make_console(80)
    if not flags.prompt and flags.file is None and sys.stdin.isatty():
        console.print("one prompt per line; an empty line ends")
    prompts = read_prompts(flags.prompt, flags.file, input)
    if not prompts:
        raise (errors.DataError if flags.file else errors.ConfigError)("no prompt was given: add --prompt TEXT or --file FILE")

    from opd.evaluation import sample_score
    from opd.evaluation.show import completion_table
    from opd.training import runner  # imports torch, which neither --help nor a mistake needs

    runner.quiet_libraries()
    models = sample_score.load_pair(target.config, with_teacher, target.average)
    if not flags.json:
        console.print(f"answers at sampling.temperature={target.config.sampling.temperature:g}")
    for prompt in prompts:
        answers = sample_score.sample(models, prompt, flags.samples)
        if flags.json:
            print(json.dumps({"prompt": prompt, **answers}, ensure_ascii=False), flush=True)
        else:
            console.print(completion_table(prompt, answers))


def write_teacher(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Write the teacher's completions of the training data to `--out`, and print how to train on them."""
    from opd.evaluation.target import NONE, find_target
    from opd.evaluation.texts import check_request

    if flags.out is None:
        raise errors.ConfigError("--only-right: chooses the rows of a file: add --out FILE.jsonl")
    if flags.prompt or flags.file is not None or flags.teacher == NONE:
        raise errors.ConfigError(
            "--out: takes the teacher's completions of the configured data: leave out --prompt, --file and --teacher none"
        )
    target = find_target(flags.target, config, flags.teacher)
    check_request(target.config, flags.out, flags.only_right)

    from opd.evaluation.completions import describe, write_completions
    from opd.training import runner  # imports torch, which neither --help nor a mistake needs

    runner.quiet_libraries()
    written = write_completions(target.config, folder, flags.out, flags.samples, flags.only_right, target.average)
    if flags.json:
        print(json.dumps({"file": str(flags.out), **asdict(written)}))
        return
    reward = "not judged" if written.reward is None else f"mean reward {format_amount(written.reward, written.reward_is_share)}"
    console = make_console(80)
    console.print(f"{flags.out}: {written.kept:,} of {written.prompts:,} prompts; {reward}, {written.truncated:.1%} cut off and left out")
    if written.left_out:
        console.print(f"prompts without a completion to keep: {describe(written.left_out)}")
    console.print(f"to train on it: opd train … {shlex.join(written.options)}", soft_wrap=True)


def make_score_parser() -> FlagParser:
    parser = FlagParser("score", score, "the text is given with --text TEXT")
    parser.add_argument("--json", action="store_true")
    for flag in ("--text", "--file", "--prompt", "--teacher"):
        parser.add_argument(flag)
    parser.add_argument("--html", type=local_path)
    return parser


def score(config: Config, folder: Path, flags: argparse.Namespace) -> None:
    """Print the log-probs of a text's tokens under both models, as coloured text, JSON or a page."""
    from opd.evaluation.target import find_pair, find_target
    from opd.evaluation.texts import read_text

    if (flags.text is None) == (flags.file is None):
        raise errors.ConfigError("give one text: --text TEXT or --file FILE (- reads standard input)")
    if flags.html is not None:
        check_output_path(flags.html)
    text = flags.text if flags.text is not None else read_text("/dev/stdin" if flags.file == "-" else flags.file)
    target = find_target(flags.target, config, flags.teacher)
    find_pair(target.config, with_teacher=True)

    from opd.evaluation import sample_score
    from opd.evaluation.show import score_page, score_parts
    from opd.training import runner  # imports torch, which neither --help nor a mistake needs

    runner.quiet_libraries()
    scores = sample_score.score(sample_score.load_pair(target.config, average=target.average), text, flags.prompt)
    if flags.html is not None:
        write_output(flags.html, score_page(scores, f"{target.name} and {target.config.teacher.path}"))
    if flags.json:
        print(json.dumps(scores.to_dict(), ensure_ascii=False))
    else:
        console = make_console(80, soft_wrap=True)
        for part in score_parts(scores):
            console.print(part)
        if flags.html is not None:
            console.print(f"written to {flags.html}")
