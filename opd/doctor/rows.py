"""Whether the data give prompts that fit, answers that can be judged, and a reward that tells right from wrong."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from opd.config.schema import Config
from opd.data.prompts import Prompt
from opd.data.rewards import Grader
from opd.data.sources import Rows
from opd.doctor.findings import Finding, fail, ok, warn

MOST_GRADED = 200
MOST_DROPPED = 0.05  # share of prompts above which leaving them out changes what is learnt


def check_columns(train: Rows, evaluation: Rows, config: Config) -> list[Finding]:
    """Raises nothing: rows that lack a column are refused where they are loaded."""
    data = config.data
    taken = ", ".join(
        f"{option}={column}" for option, column in (("prompt", data.prompt), ("answer", data.answer), ("system", data.system)) if column
    )
    have = ", ".join(sorted(train[0]))
    return [ok("columns", f"{len(train):,} rows to train on, {len(evaluation):,} to evaluate on, with {have}; taken: {taken}")]


def check_lengths(prompts: Sequence[Prompt], rows: int, which: str, config: Config) -> list[Finding]:
    """Lengths in tokens, and how many of the rows were left out."""
    lengths = sorted(len(prompt.ids) for prompt in prompts)
    limit, dropped = config.data.max_prompt_tokens, rows - len(prompts)
    what = f"{lengths[0]} to {lengths[-1]} tokens, half of them at most {median(lengths):g}; {dropped:,} of {rows:,} left out"
    if dropped > MOST_DROPPED * rows:
        return [warn(f"{which} prompts", what, f"raise data.max_prompt_tokens={limit}, or see that the long ones may be missed")]
    return [ok(f"{which} prompts", what)]


def check_apart(train: Sequence[Prompt], evaluation: Sequence[Prompt]) -> list[Finding]:
    """Prompts that are trained and evaluated on."""
    known = {prompt.ids for prompt in train}
    both = sum(prompt.ids in known for prompt in evaluation)
    if both:
        return [
            warn(
                "held out",
                f"{both:,} of {len(evaluation):,} evaluation prompts are trained on too",
                "what is evaluated is then partly remembered: take them out of the training data",
            )
        ]
    return [ok("held out", "no evaluation prompt is trained on")]


def check_answers(prompts: Sequence[Prompt], config: Config) -> list[Finding]:
    """How many evaluation prompts can be judged."""
    if config.eval.reward is None:
        return [ok("answers", "eval.reward=null: nothing is judged, only the KL is measured")]
    answered = sum(prompt.answer is not None or prompt.get_reward is not None for prompt in prompts)
    what = f"{answered:,} of {len(prompts):,} evaluation prompts have an answer"
    if answered < len(prompts):
        return [warn("answers", what, f"see data.answer={config.data.answer} and data.answer_after={config.data.answer_after}")]
    return [ok("answers", what)]


def check_reward(prompts: Sequence[Prompt], grader: Grader | None, config: Config) -> list[Finding]:
    """The reward on the reference answers, which must be 1, and on empty texts, which must be 0. Raises what the reward does."""
    judged = [prompt for prompt in prompts if prompt.answer is not None and prompt.get_reward is None][:MOST_GRADED]
    if grader is None or not judged:
        return []
    name = config.eval.reward
    right = grader.grade([(prompt.answer or "", prompt.answer or "") for prompt in judged])
    empty = grader.grade([("", prompt.answer or "") for prompt in judged])
    return [*of_reference(name, judged, right), *of_empty(name, empty)]


def of_reference(name: Any, judged: Sequence[Prompt], rewards: Sequence[float | None]) -> list[Finding]:
    check = "reward of reference answers"
    full = sum(reward == 1 for reward in rewards)
    if full == len(rewards):
        return [ok(check, f"eval.reward={name} gives 1 for each of {len(rewards)}")]
    wrong = next(index for index, reward in enumerate(rewards) if reward != 1)
    what = f"eval.reward={name} gives 1 for {full} of {len(rewards)}; the answer {judged[wrong].answer!r} gets {rewards[wrong]}"
    if full == 0:
        return [fail(check, what, "a reward that never fires judges nothing: see eval.reward, data.answer and data.answer_after")]
    return [warn(check, what, "these cannot be answered rightly: see eval.reward, data.answer and data.answer_after")]


def of_empty(name: Any, rewards: Sequence[float | None]) -> list[Finding]:
    check = "reward of empty texts"
    wrong = [reward for reward in rewards if reward is not None and reward > 0]
    if wrong:
        what = f"eval.reward={name} gives up to {max(wrong):g} for saying nothing ({len(wrong)} of {len(rewards)})"
        return [fail(check, what, "a student that stops at once would be right: mend the reward")]
    return [ok(check, f"0 for each of {len(rewards)}")]
