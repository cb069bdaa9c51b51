"""The commands of a warm start, for a student that is hardly ever right: the teacher's completions first, then training on them."""

import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from opd.config.schema import Config
from opd.data.given import warm_start

FILE = Path("teacher.jsonl")
KEPT = ("data.max_prompt_tokens", "data.chat_template_kwargs")  # of the options that the file's replace


def warm_start_commands(config: Config) -> str:
    """Return the two commands, with the words of this one; for several datasets in general, as each has a file of its own."""
    if config.data.mix:
        options = "data.mix.LABEL={source: jsonl, train_path: FILE, completion: completion}"
        return f"opd sample … --out FILE with the options of one dataset and its teacher, then {options} and train.given_share above 0"
    words = [str(word) for word in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    sample = ["opd", "sample", *words, "--out", str(FILE)]
    kept = [word for word in words if not is_replaced(word.lstrip("+~").partition("=")[0])]
    return f"{shlex.join(sample)} && {shlex.join(['opd', 'train', *kept, *warm_start(config, FILE)])}"


def is_replaced(option: str) -> bool:
    """Return whether the options of `warm_start` replace a word with this option."""
    return option in ("data", "train.given_share") or (option.startswith("data.") and not option.startswith(KEPT))
