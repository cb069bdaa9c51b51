"""Checks of the data: prompts that fit, answers to judge, and a reward that tells right from wrong."""

from collections.abc import Sequence
from statistics import median

from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rewards import Grader
from opd.data.sources import Rows
from opd.doctor.findings import Finding, fail, ok, warn
from opd.runs.reader import format_value
from opd.training.checks import HELD_OUT, prompt_problems
from opd.training.inputs import can_judge, describe_closing

MAX_GRADED = 200
FEW = 50  # answers: the 95 % interval of a share is then up to 27 points wide
MAX_DROPPED = 0.05  # share of prompts; leaving out more changes what the student is trained on


def check_columns(train: Rows, evaluation: Rows, config: Config) -> list[Finding]:
    """Name the columns and those in use; rows without a configured column are refused on loading."""
    data = config.data
    options = {"prompt": data.prompt, "answer": data.answer, "system": data.system, "completion": data.completion}
    used = ", ".join(f"{option}={column}" for option, column in options.items() if column)
    columns = ", ".join(sorted(train[0]))
    found = [ok("columns", f"{len(train):,} rows to train on, {len(evaluation):,} to evaluate on; columns: {columns}; in use: {used}")]
    if note := describe_closing((train, evaluation), data):
        remedy = f"where it is the reference answer: set data.answer={data.prompt}, or data.completion={data.prompt}"
        found.append(ok("last message", note) if data.prompt in (data.answer, data.completion) else warn("last message", note, remedy))
    return found


def check_lengths(prompts: Sequence[Prompt], rows: int, which: str, config: Config) -> list[Finding]:
    """Summarise lengths in tokens, and how many of the `rows` were left out because of `data.max_prompt_tokens`."""
    lengths, views = (sorted(of_prompt) for of_prompt in zip(*((len(prompt.ids), prompt.longest) for prompt in prompts), strict=True))
    dropped = rows - len(prompts)
    what = f"{lengths[0]} to {lengths[-1]} tokens, median {median(lengths):g}; {dropped:,} of {rows:,} left out"
    if views != lengths:
        what += f"; in the teacher's longest view up to {views[-1]} tokens, median {median(views):g}"
    if dropped > MAX_DROPPED * rows:
        remedy = f"raise data.max_prompt_tokens={config.data.max_prompt_tokens}, unless the run can do without the long ones"
        return [warn(f"{which} prompts", what, remedy)]
    return [ok(f"{which} prompts", what)]


def check_prompts(train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> list[Finding]:
    """Report what a run would warn of before training."""
    found = [warn(*problem) for problem in prompt_problems(train, evaluation)]
    shares_none = all(finding.check != HELD_OUT for finding in found)
    return [*found, ok(HELD_OUT, "no evaluation prompt is trained on")] if shares_none else found


def check_answers(prompts: Sequence[Prompt], config: Config) -> list[Finding]:
    """Count evaluation prompts with an answer to judge by."""
    if config.eval.reward is None:
        return [ok("answers", "eval.reward=null: nothing is judged, only the KL is measured")]
    answered = sum(map(can_judge, prompts))
    what = f"{answered:,} of {len(prompts):,} evaluation prompts have an answer"
    if answered < len(prompts):
        options = f"data.answer={config.data.answer} and data.answer_after={format_value(config.data.answer_after)}"
        return [warn("answers", what, f"check {options}")]
    if answered < FEW:
        return [warn("answers", f"{what}: intervals of the reward will be wide", f"set data.eval_path=FILE, with {FEW} prompts or more")]
    return [ok("answers", what)]


def check_reward(prompts: Sequence[Prompt], grader: Grader | None, config: Config) -> list[Finding]:
    """Grade the reference answers, which should get 1, and empty texts, which should get 0. Raises what the reward raises."""
    judged = [prompt for prompt in prompts if prompt.get_reward is None]
    items = [{**item, "completion": item["answer"]} for prompt in judged for item in prompt.to_grade("")][:MAX_GRADED]
    answers = [item["answer"] for item in items]
    if grader is None or not answers:
        return []
    name, count = f"eval.reward={config.eval.reward}", len(answers)

    check = "reward of reference answers"
    rewards = grader.grade(items)
    wrong = [(answer, reward) for answer, reward in zip(answers, rewards, strict=True) if reward != 1]
    if not wrong:
        findings = [ok(check, f"{name} gives 1 for each of {count}")]
    else:
        answer, reward = wrong[0]
        what = f"{name} gives 1 for {count - len(wrong)} of {count} and cannot judge {rewards.count(None)}; {answer!r} gets {reward}"
        options = "check eval.reward, data.answer and data.answer_after"
        if config.eval.reward == "number":
            options += "; eval.reward=math reads fractions, tuples and formulas"
        if len(wrong) == count:
            findings = [fail(check, what, f"this reward is never 1 and cannot judge anything: {options}")]
        else:
            findings = [warn(check, what, f"no completion can be right for these prompts: {options}")]

    check = "reward of empty texts"
    positive = [reward for reward in grader.grade([{**item, "completion": ""} for item in items]) if reward is not None and reward > 0]
    if positive:
        what = f"{name} gives up to {max(positive):g} for an empty completion ({len(positive)} of {count})"
        return [*findings, fail(check, what, "a student that stops at once would be right: change the reward")]
    return [*findings, ok(check, f"0 for each of {count}")]
