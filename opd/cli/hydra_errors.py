"""Explain the user's mistakes that Hydra and OmegaConf detect: what is wrong, where, and the remedy, in one line."""

import contextlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import errors as omegaconf_errors

from opd.config.compose import conf_dir, options, removed
from opd.config.several import describe_type, did_you_mean
from opd.errors import ConfigError, OpdError, OutputError
from opd.runs.text import one_line

Result = TypeVar("Result")

YOUR_OWN = {
    "model": "; a hub id or a folder goes in model.path=…",
    "teacher": "; a hub id or a folder goes in teacher.path=…",
    "data": "; a file of your own goes in data=jsonl data.train_path=…",
}
# What transformers, TRL and others call an option.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch",
    "gradient_checkpointing": "train.activation_checkpointing",
    "bf16": "model.dtype",
    "max_completion_length": "sampling.max_new_tokens",
    "max_length": "sampling.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "num_generations": "sampling.n",
    "num_iterations": "ppo.steps",
    "epsilon": "ppo.clip_eps",
    "use_vllm": "sampling.engine",
    "model_name_or_path": "model.path",
    "teacher_model_name_or_path": "teacher.path",
    "dataset_name": "data.path",
    "dataset_config": "data.subset",
    "eval_steps": "eval.steps",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "report_to": "track.tool",
    "output_dir": "name",
    "run_name": "name",
}


def choices() -> dict[str, list[str]]:
    """Return the shipped groups and the names of their files."""
    groups: dict[str, list[str]] = {}
    for file in sorted(conf_dir().glob("*/*.yaml")):
        groups.setdefault(file.parent.name, []).append(file.stem)
    return groups


def unknown_option(key: str) -> str:
    """Return the message for a key that is neither a group nor an option."""
    known = options()
    section, _, last = key.rpartition(".")
    namesakes = [name for name in known if name.rpartition(".")[2] == last]
    if message := removed(key):
        return message
    if not namesakes and last in ELSEWHERE:
        namesakes = [ELSEWHERE[last]]
    if namesakes:
        return f"{key}: no such option; did you mean {' or '.join(namesakes)}?"
    if key.startswith("hydra."):
        return f"{key}: Hydra has no such option; opd train --cfg hydra prints its options"
    if section not in known:
        top = sorted({*choices(), *(name for name in known if "." not in name)})
        return f"{key}: no such group or option; {did_you_mean(key, {*known, *top} if section else top)}choose from {', '.join(top)}"
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    return f"{key}: no such option; {did_you_mean(last, siblings)}{section} has {', '.join(siblings)}"


def missing_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").partition("/")
    if error.options is None:
        if "primary config" in str(error):
            return f"--config-name {group}: no such file; choose a recipe with experiment=NAME"
        return first_line(error)
    if (Path("conf") / group / f"{name}.yaml").is_file():
        return f"{group}={name}: is in ./conf, which is read with --config-dir conf: add that"
    known = [option for option in error.options if option != "schema"]
    message = f"{group}={name}: no such choice; {did_you_mean(name, known)}choose from {', '.join(known)}{YOUR_OWN.get(group, '')}"
    return removed(f"{group}={name}") or message


def unreadable_override(word: str) -> str:
    for group, names in choices().items():
        if word in names:
            return f"{word}: an argument is option=value; did you mean {group}={word}?"
    key, equals, value = word.partition("=")
    if not equals:
        text = "and a text with spaces needs quotes: 'option=\"A TEXT\"'"
        example = f"for example {word}=VALUE" if re.fullmatch(r"[\w.]+", word) else text
        return f"{word}: an argument is option=value, {example}"
    return f"{word}: cannot be parsed; put a value with special characters in two pairs of quotes: {quoted(key, value)}"


def quoted(key: str, text: str) -> str:
    """Return how an option with a text is typed in a shell, whatever is in the text."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), text)  # by the rules of Hydra's grammar
    return shlex.quote(f'{key}="{escaped}"')


def wrong_value(error: omegaconf_errors.ValidationError, override: str | None) -> str:
    key = re.sub(r"\[.*", "", error.full_key or "")
    word = f"{key}={error.value}"
    known = options()
    problem = f"must be {describe_type(known[key])}" if key in known else first_line(error)
    return removed(override or word) or removed(word) or f"{override or word}: {problem}"


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(":") if text else type(error).__name__


def explain(error: Exception) -> OpdError | None:
    """Return the user's mistake behind an exception that was raised while a config was composed or its folder created.

    Returns None if it is no mistake of the user's.
    """
    links: list[BaseException] = []  # the exception, its cause, and so on; OmegaConf hides all of them with `from None`
    link: BaseException | None = error
    while link is not None:
        links.append(link)
        link = link.__cause__ or link.__context__
    if own := next((link for link in links if isinstance(link, OpdError)), None):
        return own  # the outermost: one raised from another has the option's whole name
    messages = [str(link) for link in links]
    override = next((match[1] for match in (re.match(r"Error merging override (.+)", text) for text in messages) if match), None)
    file = next((match[1] for match in (re.match(r"In '([^']+)'", text) for text in messages) if match), None)
    where = f" (in {file}.yaml)" if file not in (None, "config") and override is None else ""
    for link in reversed(links):
        match link:
            case OverrideParseException():
                return ConfigError(unreadable_override(link.override))
            case MissingConfigException():
                return ConfigError(missing_choice(link) + where)
            case OSError(filename=str()):
                return OutputError(f"cannot create {link.filename}: {link.strerror}; choose another folder with hydra.run.dir=FOLDER")
            case omegaconf_errors.OmegaConfBaseException(full_key=None | ""):
                pass  # the next link has the same error with its key
            case omegaconf_errors.MissingMandatoryValue():
                return ConfigError(f"{link.full_key} has no value; add {link.full_key}=VALUE" + where)
            case omegaconf_errors.ConfigKeyError() | omegaconf_errors.ConfigAttributeError():
                return ConfigError(unknown_option(str(link.full_key)) + where)
            case omegaconf_errors.InterpolationResolutionError():
                return ConfigError(f"{link.full_key}: {first_line(link)}" + where)
            case omegaconf_errors.ValidationError():
                return ConfigError(wrong_value(link, override) + where)
            case yaml.YAMLError():
                return ConfigError(f"not valid YAML: {one_line(str(link))}")
    for link in links:
        match link:
            case HydraException() if "requires --multirun" in str(link) or "Ambiguous value" in str(link):
                word = re.search(r"'(.+)'", str(link).splitlines()[0])
                key, _, value = (word[1] if word else "an option").partition("=")
                is_text = options().get(key) in (str, str | None)
                other = f"a text with a comma needs two pairs of quotes: {quoted(key, value)}" if is_text else "a list is [a,b]"
                return ConfigError(f"{word[1] if word else key}: several values make a sweep, add -m; {other}")
            case HydraException() | omegaconf_errors.OmegaConfBaseException() | ValueError():
                cause = first_line(links[-1])
                return ConfigError(first_line(link) + ("" if cause in str(link) else f": {cause}"))
    return None


def explained(compose: Callable[[], Result]) -> Result:
    """Call `compose`, and raise a user's mistake as `OpdError`."""
    try:
        return compose()
    except Exception as error:
        mistake = explain(error)
        if mistake is None or mistake is error:
            raise
        raise mistake from error


def refuse_lists_of_choices(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for a group set to a list of anything but names, on which Hydra fails with an internal error."""
    groups = choices()
    for word in overrides:
        group, equals, value = word.partition("=")
        if equals and group in groups and value.lstrip().startswith("["):
            with contextlib.suppress(HydraException):  # reported when the config is composed
                names = OverridesParser.create().parse_override(word).value()
                if isinstance(names, list) and not all(isinstance(name, str) for name in names):
                    raise ConfigError(f"{word}: {group} is chosen by name; choose from {', '.join(groups[group])}")
