"""`opd sample --out FILE`: the teacher's completions of the training prompts, as rows to train on with `data.completion`.

While the command runs, FILE.part has its settings in the first line, then a line for each prompt that is done. A command that was killed
continues with the others. At its end FILE has the rows with a completion, and FILE-eval the evaluation rows, both for `data=jsonl`.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config.files import eval_file
from opd.config.schema import Config
from opd.data.chat_template import ChatTemplate
from opd.data.given import warm_start
from opd.data.prompts import Prompt
from opd.data.rollouts import Request
from opd.data.rows import DataRow
from opd.data.sources import Row, Rows, load_rows
from opd.errors import ConfigError, DataError
from opd.evaluation.sample_score import load_teacher
from opd.evaluation.texts import named_columns
from opd.models import load as models
from opd.models.accelerator import make_accelerator
from opd.models.policy import check_positions
from opd.models.shared_ids import SharedIds
from opd.runs.folder import write_output
from opd.runs.intervals import are_shares
from opd.samplers import Decoding, Sampler, SamplerSpec, longest_sequence
from opd.samplers.vllm_server import ServedSampler
from opd.teachers import ServedTeacher, canary_ids
from opd.training.evaluator import make_evaluator
from opd.training.identity import digest, rows
from opd.training.inputs import Given, load_prompts, make_run_grader

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between messages of progress


@dataclass(frozen=True, slots=True)
class Written:
    """The outcome of `write_completions`.

    Attributes:
        prompts: that were answered.
        kept: rows in the file; the others have no completion that may be kept.
        truncated: share of completions that reached the limit, which are left out.
        left_out: why the other prompts have none, with their number by reason.
        reward: mean over all completions; None without rewards.
        reward_is_share: whether all rewards are within 0 and 1.
        options: of a run that starts on the file.
    """

    prompts: int
    kept: int
    truncated: float
    reward: float | None
    reward_is_share: bool
    left_out: dict[str, int]
    options: list[str]


def write_completions(config: Config, folder: Path, out: Path, samples: int, only_right: bool, average: Path | None = None) -> Written:
    """Let the teacher answer all training prompts at the config's sampling settings, and write `out` and its evaluation rows.

    Args:
        config: with the teacher and the data; `texts.check_request` accepts it with `out` and `only_right`.
        folder: for the accelerator, which writes nothing to it.
        samples: completions of each prompt; above 1 `completion` is a list, as is `reward`.
        only_right: keep those with a reward of 1 only.
        average: as in `load_teacher`.

    Raises:
        ConfigError: the options do not go together, there are several datasets, or `out` is of another command.
        DataError: no completion may be kept.
        OutputError: `out` is not writable.
    """
    part = out.with_name(f"{out.name}.part")
    accelerator = make_accelerator(config, folder)
    # A teacher with tokens of its own writes text that the student's tokenizer need not know.
    writer, role = (config.teacher, "teacher") if config.teacher.has_own_tokens else (config.model, "model")
    tokenizer = models.load_tokenizer(writer, role)
    train_rows, eval_rows = load_rows(config.data)
    prompts, eval_prompts = load_prompts(config, tokenizer, Given(train_rows=train_rows, eval_rows=eval_rows))
    sampler, vocabulary = teacher_sampler(config, tokenizer, prompts, average)
    with ExitStack() as stack:
        grader = make_run_grader(config, prompts, stack)
        evaluator = make_evaluator(config, accelerator, tokenizer, [], grader, SharedIds(vocabulary))
        done = begin(part, settings(config, prompts, samples))
        decoding = Decoding.of(config.sampling)
        missing = [prompt for prompt in prompts if prompt.sample_id not in done]
        size, shown_at = max(1, decoding.batch_size // samples), time.monotonic()
        with part.open("a", encoding="utf-8") as stream:
            for start in range(0, len(missing), size):
                chosen = missing[start : start + size]
                rollouts = sampler.sample(
                    [Request(prompt.for_teacher(), 0, attempt) for prompt in chosen for attempt in range(samples)], decoding, "sample"
                )
                rewards = evaluator.judge(rollouts)
                for index, prompt in enumerate(chosen):
                    own = slice(index * samples, (index + 1) * samples)
                    # A completion that was cut off has no end to learn.
                    texts = [None if rollout.truncated else models.decode(tokenizer, rollout.answer) for rollout in rollouts[own]]
                    line = {"row": prompt.sample_id, "texts": texts, "rewards": rewards[own]}
                    done[prompt.sample_id] = line
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                stream.flush()
                if time.monotonic() - shown_at > EVERY:
                    log.warning(f"{len(done):,} of {len(prompts):,} prompts are answered")
                    shown_at = time.monotonic()
    written = [record for prompt in prompts if (record := finished(prompt, train_rows, config, done[prompt.sample_id], only_right))]
    reasons = Counter(why for prompt in prompts if (why := why_left_out(done[prompt.sample_id], only_right)))
    if not written:
        raise DataError(
            f"no completion of the teacher can be kept ({describe(reasons)}); remove {part}, and check teacher.path, eval.reward and "
            f"sampling.max_new_tokens={config.sampling.max_new_tokens}"
        )
    write_output(eval_file(out), lines(columns(prompt, eval_rows, config) for prompt in eval_prompts))
    write_output(out, lines(written))
    part.unlink()
    all_texts = [text for line in done.values() for text in line["texts"]]
    judged = [reward for line in done.values() for reward in line["rewards"] if reward is not None]
    mean = sum(judged) / len(judged) if judged else None
    truncated = all_texts.count(None) / len(all_texts)
    return Written(len(prompts), len(written), truncated, mean, are_shares(judged), dict(reasons), warm_start(config, out))


def teacher_sampler(
    config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], average: Path | None = None
) -> tuple[Sampler, int]:
    """Return a sampler of the local or served teacher, and the number of ids that it may draw."""
    own, kwargs, device = (tokenizer, (tokenizer.eos_token_id,)), config.data.chat_template_kwargs, models.find_device(config.device)
    if config.teacher.url is None:
        teacher = load_teacher(config, device, average)
        vocabulary = models.shared_vocabulary(tokenizer, teacher.model, None)
        overlap = models.check_same_ids(tokenizer, teacher.tokenizer)
        ids = SharedIds.of(vocabulary, overlap, [own, (teacher.tokenizer, teacher.eos)], kwargs, device)
        models.check_known(prompts, tokenizer, vocabulary, ids.overlap)
        lengths = [len(prompt.seen_by_teacher) for prompt in prompts]
        check_positions(teacher.model, "teacher", "sampling.max_new_tokens", lengths, config.sampling.max_new_tokens)
        return teacher.sampler(tokenizer.pad_token_id, ids, config.seed), vocabulary
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    teacher_tokenizer = models.load_tokenizer(config.teacher, "teacher")
    overlap = models.check_same_ids(tokenizer, teacher_tokenizer)
    ids = SharedIds.of(vocabulary, overlap, [own, (teacher_tokenizer, (teacher_tokenizer.eos_token_id,))], kwargs, device)
    longest = longest_sequence(config, [prompt.for_teacher() for prompt in prompts])
    models.check_known(prompts, tokenizer, vocabulary, ids.overlap)
    served = ServedTeacher(config.teacher, tokenizer, vocabulary, longest, canary_ids(tokenizer, prompts, longest), overlap=ids.overlap)
    served.check()
    eos = ids.ends or tuple({tokenizer.eos_token_id, ChatTemplate(tokenizer, kwargs).completion_end()})
    # The server has the model.
    spec: Any = SamplerSpec(
        model=None,  # type: ignore[arg-type]
        eos=eos,
        pad_id=tokenizer.pad_token_id,
        vocabulary=vocabulary,
        seed=config.seed,
        bf16=False,
        batch_size=config.sampling.batch_size,
        masked=ids.masked,
    )
    return ServedSampler(served.servers[0], served.name, spec), vocabulary


def settings(config: Config, prompts: Sequence[Prompt], samples: int) -> dict[str, Any]:
    """Return what decides the completions and their rewards, as JSON."""
    sampling, teacher = config.sampling, config.teacher
    return {
        **{f"teacher.{name}": getattr(teacher, name) for name in ("path", "url", "revision", "gguf_file", "adapter")},
        "teacher.quantization": teacher.quantization.value,
        "data": digest(rows(prompts)),
        "samples": samples,
        "seed": config.seed,
        "eval.reward": config.eval.reward,
        **{f"sampling.{name}": getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
    }


def begin(part: Path, wanted: Mapping[str, Any]) -> dict[int, Any]:
    """Return the lines of an earlier command by row, or begin the file. Drop a last line that is not whole.

    Raises `ConfigError` where the file is of a command with other settings, or no such file.
    """
    content = part.read_bytes() if part.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not content:
        write_output(part, json.dumps(wanted) + "\n")
        return {}
    try:
        stored, *others = map(json.loads, whole.decode().split("\n")[:-1])  # texts have other line separators in them
        changed = [name for name in wanted if stored.get(name) != wanted[name]]
        done = {} if changed else {line["row"]: line for line in others}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ConfigError(f"{part}: is not a file of opd sample --out; remove it, or name another with --out") from None
    if changed:
        raise ConfigError(f"{part}: was begun with another {', '.join(changed)}; repeat those options to continue, or remove it")
    os.truncate(part, len(whole))
    return done


def is_kept(text: str | None, reward: float | None, only_right: bool) -> bool:
    return bool(text) and (reward == 1 or not only_right)


def why_left_out(line: Mapping[str, Any], only_right: bool) -> str:
    """Return why a prompt has no completion to keep; an empty text where it has one."""
    pairs = list(zip(line["texts"], line["rewards"], strict=True))
    if any(is_kept(text, reward, only_right) for text, reward in pairs):
        return ""
    return "not right" if any(line["texts"]) else "empty" if "" in line["texts"] else "cut off"


def describe(reasons: Mapping[str, int]) -> str:
    """Return the numbers of prompts that were left out, by reason, in words."""
    return ", ".join(f"{count:,} {why}" for why, count in reasons.items())


def finished(prompt: Prompt, source: Rows, config: Config, line: Mapping[str, Any], only_right: bool) -> Row | None:
    """Return a prompt's row of the file; None where it has no completion to keep."""
    pairs = zip(line["texts"], line["rewards"], strict=True)
    kept = [(text, reward) for text, reward in pairs if is_kept(text, reward, only_right)]
    if not kept:
        return None
    completion, reward = ([list(column) for column in zip(*kept, strict=True)] if len(line["texts"]) > 1 else kept[0])  # fmt: skip
    return {**columns(prompt, source, config), "completion": completion, "reward": reward}


def columns(prompt: Prompt, source: Rows, config: Config) -> Row:
    """Return the columns in use of a prompt's row, by the names that `data=jsonl` has for them."""
    row, answers = source[prompt.sample_id], list(prompt.answers)
    named = {name: row[name] for name in named_columns(config) if name in row}
    own = DataRow(row, prompt.sample_id, config.data)
    text, system = own.value("prompt"), {} if config.data.system is None else {"system": own.value("system")}
    answer = {} if config.data.answer is None and "answer" in named else {"answer": answers[0] if len(answers) == 1 else answers or None}
    return {**named, "prompt": text if isinstance(text, str) else own.turns()[0], **system, **answer}


def lines(records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)  # dates as their view has them
