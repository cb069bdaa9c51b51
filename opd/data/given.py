"""Given completions: rows of a step that take a text of the column `data.completion` instead of sampling one.

Training on a share of them is GKD's lambda (Agarwal et al. 2024, arXiv 2306.13649), and at its start a warm start: a student whose own
completions are never right learns nothing from them.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from opd.config.files import eval_file
from opd.config.options import Truncated, naming_dataset
from opd.config.schema import Config
from opd.data.order import derive_seed
from opd.data.prompts import Prompt
from opd.data.rollouts import FinishReason, Request, Rollout
from opd.errors import DataError

log = logging.getLogger(__name__)


def takes_given(seed: int, row: int, share: float) -> bool:
    """Return whether a row takes a given completion.

    Of any rows in succession the share does, up to one row: those where `row * share` passes a whole number. They are spread evenly, so
    that with a share of 1/n one of the n completions of each prompt is given.

    Args:
        seed: The run's, which shifts the choice.
        row: Number of the row among those of its dataset, over all steps and processes, from 0.
        share: From 0 to 1.
    """
    shift = derive_seed("given", seed) / 2**63
    return math.floor((row + 1) * share + shift) > math.floor(row * share + shift)


def given_rollout(request: Request, max_new_tokens: int) -> Rollout:
    """Return the rollout of the prompt's given completion, cut off as a sampled one. The completions of one prompt take turns."""
    texts = request.prompt.given
    ids = texts[(request.epoch + request.attempt) % len(texts)]
    finish = FinishReason.length if len(ids) > max_new_tokens else FinishReason.stop
    ids = ids[:max_new_tokens]
    return Rollout(request, ids, torch.zeros(len(ids)), finish, given=True)


def check_given(prompts: Sequence[Prompt], config: Config, label: str = "") -> None:
    """Log what is not trained on as it stands in the column. Raises `DataError` where it has no text.

    Args:
        config: Of a run on this dataset alone.
        label: The dataset's in `data.mix`, for messages.
    """
    rename, limit = naming_dataset(label), config.sampling.max_new_tokens
    option = rename(f"data.completion={config.data.completion}")
    given = [ids for prompt in prompts for ids in prompt.given]
    if not given:
        remedy = rename("data.completion=null")
        raise DataError(f"{option}: no training prompt has a text in this column; name another, or set {remedy}")
    if missing := sum(not prompt.given for prompt in prompts):
        log.warning(f"{option}: {missing} of {len(prompts)} training prompts have no text there and are always sampled for")
    if long := sum(len(ids) > limit for ids in given):
        handling = config.sampling.truncated
        what = {
            Truncated.keep: "are cut off there and trained on",
            Truncated.mask: "are not trained on (sampling.truncated=mask)",
            Truncated.drop: "are left out (sampling.truncated=drop)",
        }
        log.warning(f"{option}: {long} of {len(given)} texts have more than sampling.max_new_tokens={limit} tokens and {what[handling]}")
    if not config.train.takes_given:
        log.warning(f"{option}: is not used with train.given_share=0; set a share, such as train.given_share=0.25")


def warm_start(config: Config, out: Path) -> list[str]:
    """Return the options of a run that starts on the file that `opd sample --out` wrote: alone for a quarter of its steps, then few.

    Without `train.max_steps` the number of steps is not known, and a quarter of all completions are taken from it.
    """
    steps = config.train.max_steps
    shares = 0.25 if steps is None else {0: 1.0, max(1, steps // 4): 0.25, max(2, steps // 2): 0}
    system = [] if config.data.system is None else ["data.system=system"]
    files = [f"data.train_path={out}", f"data.eval_path={eval_file(out)}"]
    return ["data=jsonl", *files, "data.completion=completion", *system, f"train.given_share={shares}"]
