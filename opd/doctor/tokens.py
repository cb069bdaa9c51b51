"""Whether student and teacher speak about the same tokens, end alike, and read the same prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from opd.config.schema import Config, ModelConfig
from opd.data.prompts import Message, render
from opd.doctor.findings import Finding, fail, ok, warn
from opd.errors import ConfigError
from opd.models import load as models

# What makes generate() draw from another distribution than the model's, and the value that does nothing.
HIDDEN: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
}
DECODING: Mapping[str, Any] = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget")
TURN = "opd looks where this turn ends"


def load_raw(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    """The tokenizer as its folder has it, before `models.load_tokenizer` gives it a padding token."""
    tokenizer: PreTrainedTokenizerBase = models.load_with(AutoTokenizer.from_pretrained, config, role)
    return tokenizer


def check_maps(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[Finding]:
    """Raises `ConfigError` where a token has another id in the other."""
    models.check_same_ids(student, teacher)
    return [ok("tokenizers", f"the same {len(student.get_vocab()):,} tokens have the same ids in student and teacher")]


def check_pad(tokenizer: PreTrainedTokenizerBase, role: str) -> list[Finding]:
    """tokenizer: as `load_raw` gives it."""
    if tokenizer.pad_token_id is None:
        return [
            warn(
                f"padding of the {role}",
                f"the tokenizer has no padding token; {tokenizer.eos_token!r} stands in behind masks",
                "harmless in opd; other programs that pad with the end-of-sequence token unlearn it: set pad_token in its "
                "tokenizer_config.json",
            )
        ]
    return [ok(f"padding of the {role}", f"{tokenizer.pad_token!r} ({tokenizer.pad_token_id})")]


def check_eos(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ours: Sequence[int], theirs: Sequence[int]
) -> list[Finding]:
    """ours, theirs: every id that ends a completion."""
    names = [
        ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids) for tokenizer, ids in ((student, ours), (teacher, theirs))
    ]
    if set(ours) == set(theirs):
        return [ok("end of sequence", f"both end at {names[0]}")]
    return [
        warn(
            "end of sequence",
            f"the student ends at {names[0]}, the teacher at {names[1]}; the teacher may never ask the student to stop",
            "set eos_token_id alike in both generation_config.json, or take the teacher in its chat-tuned form",
        )
    ]


def check_turn_end(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], role: str, kwargs: Mapping[str, Any]) -> list[Finding]:
    """Whether the token that the chat template puts behind an answer ends a completion."""
    if tokenizer.chat_template is None:
        return []
    try:
        chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": TURN}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))
    except (TemplateError, ValueError, TypeError):
        return []  # a template that takes no answers says nothing about their end
    behind = text.rpartition(TURN)[2].strip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind and TURN in text else []
    if not ids or ids[0] in eos:
        return []
    token = tokenizer.convert_ids_to_tokens(ids[0])
    return [
        warn(
            f"end of a turn of the {role}",
            f"its chat template ends an answer with {token!r}, which does not end a completion",
            f"completions run to their limit: add {ids[0]} to eos_token_id in its generation_config.json, or take the tuned model",
        )
    ]


def check_templates(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, messages: Sequence[Message], config: Config
) -> tuple[list[Finding], dict[str, str]]:
    """What the templates make of a real prompt, and the prompt as each renders it."""
    kwargs = config.data.chat_template_kwargs
    seen: dict[str, str] = {}
    found: list[Finding] = []
    for role, tokenizer in (("student", student), ("teacher", teacher)):
        try:
            seen[role] = models.decode(tokenizer, render(messages, tokenizer, kwargs))
        except (TemplateError, TypeError, ValueError) as error:
            found.append(template_refuses(role, error))
            continue
        found += check_template(tokenizer, seen[role], messages, role, kwargs)
    if len(seen) == 2 and seen["student"] == seen["teacher"]:
        found.append(ok("chat templates", "student and teacher render the first prompt alike"))
    elif len(seen) == 2:
        found.append(
            warn(
                "chat templates",
                "student and teacher render the first prompt differently (both below); the teacher scores the student's rendering",
                "a teacher off its own format teaches less: give both the same chat template, the teacher's if it may be changed",
            )
        )
    return found + check_switches(student, teacher, kwargs), seen


def template_refuses(role: str, error: Exception) -> Finding:
    what = f"the chat template of the {role} refuses the first prompt: {' '.join(str(error).split())}"
    if role == "teacher":
        return warn("chat templates", what, "the teacher reads the student's rendering; see that it is a format it knows")
    return fail("chat templates", what, "leave out the system message (data.system=null), or take another chat template")


def check_template(
    tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message], role: str, kwargs: Mapping[str, Any]
) -> list[Finding]:
    """One model's rendering of the messages."""
    check = f"chat template of the {role}"
    if tokenizer.chat_template is None:
        return [
            warn(
                check, "there is none: the prompt is given as bare text", "right for a base model; a chat model's folder lacks its template"
            )
        ]
    found = []
    wanted = messages[-1]["content"].strip()
    if "".join(wanted.split()) not in "".join(text.split()):
        found.append(
            (fail if role == "student" else warn)(
                check,
                "what it renders does not hold the prompt's text",
                "it is not this model's: take the template of the model's own folder",
            )
        )
    closed = tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)
    opened = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **kwargs)
    if closed == opened:
        found.append(
            warn(
                check,
                "it does not open the assistant's turn (add_generation_prompt changes nothing)",
                "the student would go on with the user's text: add the assistant's header to the template",
            )
        )
    ids = tokenizer(str(opened), add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        found.append(warn(check, "it renders tokens that the tokenizer does not know", "take the template of the model's own folder"))
    if tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        found.append(warn(check, f"the prompt begins with {tokenizer.bos_token!r} twice", "take the second out of the chat template"))
    return found


def check_switches(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> list[Finding]:
    """The thinking switches that the templates know."""
    ours, theirs = ([switch for switch in SWITCHES if switch in str(tokenizer.chat_template)] for tokenizer in (student, teacher))
    if not ours and not theirs:
        return []
    told = ", ".join(f"{switch}={kwargs.get(switch, 'the default')}" for switch in sorted({*ours, *theirs}))
    if ours != theirs:
        return [
            warn(
                "thinking",
                f"the student's template knows {', '.join(ours) or 'no switch'}, the teacher's {', '.join(theirs) or 'none'} ({told})",
                "a teacher that thinks and a student that does not disagree from the first token: take two models of one kind",
            )
        ]
    return [ok("thinking", f"both templates know {', '.join(ours)}: {told}; set by data.chat_template_kwargs")]


def check_generation_config(config: ModelConfig, role: str, sampling: str) -> list[Finding]:
    """What the model's own generation_config would have changed. sampling: how opd decodes, in words."""
    check = f"generation_config of the {role}"
    try:
        stored: GenerationConfig = models.load_with(GenerationConfig.from_pretrained, config, role)
    except ConfigError:
        return [ok(check, "none; opd would not follow it either")]
    hidden = changed(stored, HIDDEN)
    decoding = changed(stored, DECODING) if stored.do_sample else []
    if hidden:
        return [
            warn(
                check,
                f"{', '.join([*hidden, *decoding])}: opd follows none of it, other programs do",
                "figures from elsewhere (model cards, generate()) may be of these settings; opd's are of the bare model on both sides",
            )
        ]
    if decoding:
        return [ok(check, f"{', '.join(decoding)}: opd does not follow it, it samples at {sampling}")]
    return [ok(check, "nothing in it that would change what is drawn")]


def changed(stored: GenerationConfig, neutral: Mapping[str, Any]) -> list[str]:
    values = stored.to_dict()
    return [f"{name}={values[name]}" for name, nothing in neutral.items() if values.get(name) not in (nothing, None)]
