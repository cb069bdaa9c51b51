"""Options that only some choices of other options read, and the values of a config that nothing reads."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from opd.config.options import Divergence, Engine, Estimator, Placement, Source, TeacherWeights, Tracker
from opd.config.settings import Settings


@dataclass(frozen=True, slots=True)
class Reader:
    """What reads an option.

    Args:
        choice: The other options with which it is read, as they are typed.
        holds: Whether a config has them; for `data` and `teacher` one of `Settings.parts`.
        verb: The only verb that reads the option; empty for all.
    """

    choice: str
    holds: Callable[[Settings], bool]
    verb: str = ""


def from_source(*sources: Source) -> Reader:
    return Reader(" or ".join(f"data={source.value}" for source in sources), lambda config: config.data.source in sources)


HUB, FILES = from_source(Source.hub), from_source(Source.jsonl, Source.parquet)
SAMPLED = Reader("ppo.estimator=sampled", lambda config: config.ppo.estimator is Estimator.sampled)
WHOLE = Reader("ppo.estimator=exact or topk", lambda config: config.ppo.estimator is not Estimator.sampled)
ADAPTERS = Reader("lora.rank above 0", lambda config: config.lora.rank > 0)
SERVER = Reader("sampling.engine=vllm and sampling.vllm.url", lambda config: config.sampling.by_server)
SERVED = Reader("teacher.url", lambda config: config.teacher.url is not None)
REWARD = Reader("eval.reward", lambda config: config.eval.reward is not None)
OWN_PROCESS = Reader("eval.reward=math or module:function", lambda config: config.eval.reward not in (None, "exact", "number"))

# Every option that is not read by all runs. An option that is not here is read, or its value is checked by `rules`.
READERS: Mapping[str, Reader] = {
    "data.path": from_source(Source.hub, Source.gym),
    "data.subset": HUB,
    "data.train_split": HUB,
    "data.eval_split": HUB,
    "data.train_path": FILES,
    "data.eval_path": FILES,
    "data.size": from_source(Source.arithmetic, Source.gym),
    "data.options": from_source(Source.gym),
    "data.seed": from_source(Source.arithmetic, Source.gym),
    "data.answer_after": Reader("data.answer", lambda config: config.data.answer is not None),
    "lora.alpha": ADAPTERS,
    "lora.targets": ADAPTERS,
    "teacher.timeout": SERVED,
    "teacher.canary_every": SERVED,
    "teacher.ema": Reader("teacher.weights=ema", lambda config: config.teacher.weights is TeacherWeights.ema),
    "teacher.device": Reader("teacher.placement=device", lambda config: config.teacher.placement is Placement.device),
    "sampling.memory_share": Reader(
        "sampling.engine=vllm, without sampling.vllm.url",
        lambda config: config.sampling.engine is Engine.vllm and not config.sampling.by_server,
    ),
    "sampling.vllm.url": Reader("sampling.engine=vllm", lambda config: config.sampling.engine is Engine.vllm),
    "sampling.vllm.weights_folder": SERVER,
    "sampling.vllm.timeout": SERVER,
    "ppo.divergence": WHOLE,
    "ppo.k": Reader("ppo.estimator=topk", lambda config: config.ppo.estimator is Estimator.topk),
    "ppo.beta": Reader(
        f"{WHOLE.choice}, and ppo.divergence=jsd", lambda config: WHOLE.holds(config) and config.ppo.divergence is Divergence.jsd
    ),
    # At the first inner step the ratio is 1, so that nothing is clipped.
    "ppo.clip_eps": Reader(f"{SAMPLED.choice} and ppo.steps above 1", lambda config: SAMPLED.holds(config) and config.ppo.steps > 1),
    "ppo.advantage_clip": SAMPLED,
    "ppo.importance_cap": SAMPLED,
    "ppo.baseline": SAMPLED,
    "ppo.discount": SAMPLED,
    "ppo.reward_coef": SAMPLED,
    "eval.limit": REWARD,
    "eval.max_new_tokens": REWARD,
    "eval.samples": replace(REWARD, verb="eval"),
    "eval.reward_seconds": OWN_PROCESS,
    "eval.reward_memory": OWN_PROCESS,
    "eval.batch_size": Reader(
        "eval.reward or eval.kl_prompts above 0", lambda config: config.eval.reward is not None or config.eval.kl_prompts > 0
    ),
    "eval.kl_max_new_tokens": Reader("eval.kl_prompts above 0", lambda config: config.eval.kl_prompts > 0),
    "track.project": Reader("track.tool", lambda config: config.track.tool is not Tracker.none),
}


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that differs from the default and that nothing reads. `verb`: the one that would read it, where the present one does not."""

    key: str
    value: Any
    choice: str
    verb: str = ""

    def is_decided_by(self, options: frozenset[str]) -> bool:
        """Return whether one of these options, or of these groups of options, decides what reads the value."""
        return not self.verb and ("experiment" in options or any(option in self.choice for option in options))

    def __str__(self) -> str:
        shown = repr(self.value) if type(self.value) is str else self.value
        if self.verb:
            return f"{self.key}={shown}: is only read by opd {self.verb}: remove it"
        return f"{self.key}={shown}: is only read with {self.choice}: set that, or remove it"


def find_unread(config: Settings, verb: str = "train") -> Iterator[Unread]:
    """Yield the values that `opd VERB` does not read: of options in `READERS`, and of those in the entries of `data.mix` and `teachers`."""
    parts, by_teacher, defaults = config.parts, config.parts_by_teacher, Settings()
    entries = [
        *((f"data.mix.{label}", "data", entry, parts[label]) for label, entry in config.data.mix.items()),
        *((f"teachers.{label}", "teacher", entry, by_teacher[label]) for label, entry in config.teachers.items()),
    ]
    for key, reader in READERS.items():
        value_of, (section, _, name) = attrgetter(key), key.partition(".")
        usual = value_of(defaults)
        usual = (usual, None) if isinstance(usual, str) else (usual,)  # null in place of a text asks for nothing, and is accepted
        if reader.verb not in ("", verb) and value_of(config) not in usual:
            yield Unread(key, value_of(config), reader.choice, reader.verb)
        readers = [config]
        if section == "data":  # by the datasets that have no value of their own
            readers = [part for label, part in parts.items() if name not in config.data.mix.get(label, {})]
        if value_of(config) not in usual and readers and not any(map(reader.holds, readers)):
            yield Unread(key, value_of(config), reader.choice)
        for place, group, entry, part in entries:
            if group == section and name in entry and value_of(part) not in usual and not reader.holds(part):
                choice = re.sub(r"\bdata=", f"{place}.source=", re.sub(rf"\b{group}\.", f"{place}.", reader.choice))
                yield Unread(f"{place}.{name}", value_of(part), choice)
