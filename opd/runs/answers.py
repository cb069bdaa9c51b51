"""What was answered in evaluations: `answers.jsonl` of a run, and the file next to the result of `opd eval`."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opd.runs.folder import ANSWERS, RunFolder, read_lines, write_text
from opd.runs.text import cut

log = logging.getLogger(__name__)

MOST = 1000  # answers of each model that are stored
CHARACTERS = 4000  # of a text that are stored


class Answer(NamedTuple):
    """An answer of a model in an evaluation.

    Attributes:
        dataset: The label of the prompt's dataset; empty without `data.mix`.
        reward: None for one that was not judged.
        length: In tokens.
        truncated: Whether it reached the limit of tokens.
        completion: Its text.
        sample_id: The prompt's row in the dataset.
        prompt: The prompt's last message.
        references: The accepted answers.
    """

    dataset: str
    reward: float | None
    length: int
    truncated: bool
    completion: str
    sample_id: int
    prompt: str = ""
    references: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, int]:
        return self.dataset, self.sample_id


def lines_of(answers: Iterable[Answer], **about: Any) -> list[dict[str, Any]]:
    """Return the lines of a file, in the order of the prompts: the first `MOST` answers, each text cut to `CHARACTERS`.

    Args:
        about: What all lines have, such as the model.
    """
    ordered = sorted(answers, key=lambda answer: answer.place)[:MOST]
    return [
        {
            **about,
            **({"dataset": answer.dataset} if answer.dataset else {}),
            "sample_id": answer.sample_id,
            "reward": answer.reward,
            "truncated": answer.truncated,
            "prompt": cut(answer.prompt, CHARACTERS),
            "answer": [cut(reference, CHARACTERS) for reference in answer.references],
            "completion": cut(answer.completion, CHARACTERS),
        }
        for answer in ordered
    ]


def as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def store(run_folder: RunFolder, answers: Sequence[Answer], model: str, step: int) -> None:
    """Store the answers of an evaluation: of the student the first and the newest evaluation, of the teacher the only one."""
    if not run_folder.writes or not answers:
        return
    file = run_folder.path / ANSWERS
    try:
        # A later evaluation of a model replaces all but its first one, which has the answers before training.
        kept = [line for line in read_lines(file) if line["model"] != model or (line["step"] == 0 and step > 0)]
        write_text(file, as_text([*kept, *lines_of(answers, model=model, step=step)]))
    except (OSError, ValueError, KeyError) as error:
        log.error("cannot write %s: %s", file, error)


def file_beside(result: Path) -> Path:
    """Return the file for the answers of the evaluation whose result is in `result`."""
    return result.with_name(f"{result.stem}-{ANSWERS}")
