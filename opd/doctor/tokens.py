"""Checks of tokenizers, chat templates and generation configs: do student and teacher read and end the same text?"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from opd.config.options import ModelConfig
from opd.config.schema import Config
from opd.data.chat_template import CONTINUE, ChatTemplate, Message, teacher_template, without_template
from opd.data.prompts import Prompt, text_warnings
from opd.data.rows import with_system
from opd.data.token_bytes import TokenBytes, check_student
from opd.doctor.findings import Finding, fail, ok, warn
from opd.errors import ConfigError, OpdError
from opd.models import load as models

# Settings with which generate() samples from another distribution than the model's, and the values that switch them off.
PROCESSORS: Mapping[str, Any] = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": None, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None, "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
}  # fmt: skip
DECODING: Mapping[str, Any] = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
THOUGHTS = 2048  # tokens that thinking takes easily
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget")
# Fields that need no notice: templates leave out earlier thoughts, and have many names for them.
READ = {"role", "content", "reasoning_content", "reasoning", "thinking"}


def load_raw(config: ModelConfig, role: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer as it is stored, without the padding token that `models.load_tokenizer` adds."""
    tokenizer: PreTrainedTokenizerBase = models.load_with(AutoTokenizer.from_pretrained, config, role)
    return tokenizer


def check_maps(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[Finding]:
    """Raise `ConfigError` if a token has different ids in the two tokenizers."""
    overlap = models.check_same_ids(student, teacher)
    if overlap is not None:
        return [ok("tokenizers", overlap.describe())]
    return [ok("tokenizers", f"the same {len(student.get_vocab()):,} tokens have the same ids in student and teacher")]


def check_texts_of_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[Finding]:
    """Count the student's texts that are tokens of the teacher too. Raises `ConfigError` where a tokenizer cannot be aligned."""
    ours, theirs = TokenBytes(student, "model"), TokenBytes(teacher, "teacher")
    check_student(ours)
    pieces = {piece for piece in ours.pieces if piece is not None}
    both = pieces.intersection(piece for piece in theirs.pieces if piece is not None)
    what = f"other vocabularies: {len(both):,} of the student's {len(pieces):,} texts are tokens of the teacher too"
    return [ok("tokenizers", f"{what} ({len(both) / max(1, len(pieces)):.0%})")]


def check_pad(raw: PreTrainedTokenizerBase, role: str) -> list[Finding]:
    """Look for a padding token in the tokenizer that `load_raw` returns."""
    check = f"padding of the {role}"
    if raw.pad_token_id is not None:
        return [ok(check, f"{raw.pad_token!r} ({raw.pad_token_id})")]
    what = f"the tokenizer has no padding token; opd uses {raw.eos_token!r}, always masked"
    remedy = "harmless in opd; programs that mask by id do not train the model to stop: set pad_token in its tokenizer_config.json"
    return [warn(check, what, remedy)]


def check_eos(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, student_eos: Sequence[int], teacher_eos: Sequence[int]
) -> list[Finding]:
    """Compare the ids that end a completion."""
    student_names, teacher_names = (
        ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)
        for tokenizer, ids in ((student, student_eos), (teacher, teacher_eos))
    )
    if set(student_eos) == set(teacher_eos):
        return [ok("end of sequence", f"both end at {student_names}")]
    what = f"the student ends at {student_names}, the teacher at {teacher_names}: the teacher may never favour the student's end"
    remedy = "set the same eos_token_id in both generation_config.json, or take the chat-tuned teacher"
    return [warn("end of sequence", what, remedy)]


def check_turn_end(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], role: str, kwargs: Mapping[str, Any]) -> list[Finding]:
    """Check that the token with which the chat template ends an answer also ends a completion."""
    end = ChatTemplate(tokenizer, kwargs).turn_end()
    if end is None or end in eos:
        return []
    what = f"its chat template ends an answer with {tokenizer.convert_ids_to_tokens(end)!r}, which does not end a completion"
    remedy = f"completions run to their limit: add {end} to eos_token_id in its generation_config.json, or take the chat-tuned model"
    return [warn(f"end of a turn of the {role}", what, remedy)]


def check_texts(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int], prompts: Sequence[Prompt]) -> list[Finding]:
    """Compare the prompts' ids with their text, and look for special tokens in messages and reference answers."""
    remedy = "unless that is meant, change the texts, the tokenizer, or eos_token_id in generation_config.json"
    found = text_warnings(prompts, tokenizer, eos)
    return [warn("texts", what, remedy) for what in found] or [ok("texts", "the ids of each prompt decode to its text")]


def check_templates(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, messages: Sequence[Message], config: Config
) -> tuple[list[Finding], dict[str, str]]:
    """Check both chat templates on a real prompt.

    Returns:
        The findings, and the prompt as each template renders it, by role.
    """
    check, kwargs, has_own = "chat templates", config.data.chat_template_kwargs, config.teacher.has_own_tokens
    rendered: dict[str, str] = {}
    findings: list[Finding] = []
    teachers = ChatTemplate(teacher, without_template(kwargs) if has_own else kwargs)
    for role, template in (("student", ChatTemplate(student, kwargs)), ("teacher", teachers)):
        try:
            text, ids = template.render(messages, role)
        except OpdError as error:
            what = f"the first prompt cannot be rendered: {error}"
            if role == "student" or has_own:
                findings.append(fail(check, what, "set data.system=null to leave out the system message, or change the chat template"))
            else:
                findings.append(warn(check, what, "the teacher reads the student's rendering: make sure that it knows this format"))
            continue
        rendered[role] = models.decode(template.tokenizer, ids)
        findings += check_template(template, text, ids, messages, role)
    if len(rendered) == 2 and rendered["student"] == rendered["teacher"]:
        findings.append(ok(check, "student and teacher render the first prompt alike"))
    elif len(rendered) == 2 and has_own:
        findings.append(ok(check, "each model reads the prompts as its own template renders them (both below)"))
    elif len(rendered) == 2:
        what = "student and teacher render the first prompt differently (both below); the teacher scores the student's rendering"
        remedy = "a teacher scores best in its own format: give both models the same chat template, the teacher's if possible"
        findings.append(warn(check, what, remedy))
    if (system := config.teacher.system) is not None:
        views_template = teacher_template(config.data, config.teacher, student, teacher if has_own else None)
        if not contains(views_template.render(with_system(messages, system), "teacher.system")[0], system):
            whose = "teacher" if has_own else "student, which renders the teacher's prompts too,"
            what = f"the chat template of the {whose} leaves it out"
            findings.append(fail("teacher.system", what, "take a chat template with system messages, or set teacher.system=null"))
    findings += check_options(student, messages, kwargs, config.teacher.chat_template_kwargs)
    return findings + check_switches(student, teacher, kwargs, config.sampling.max_new_tokens), rendered


def contains(text: str, part: str) -> bool:
    return "".join(part.split()) in "".join(text.split())


def check_template(template: ChatTemplate, text: str, ids: Sequence[int], messages: Sequence[Message], role: str) -> list[Finding]:
    """Check one model's rendering of the messages, as text and ids."""
    check, take_own = f"chat template of the {role}", "take the chat template from the model's own folder"
    findings = []
    if is_open := messages[-1]["role"] == "assistant":
        what = "the chat ends with a message of the assistant, which is continued"
        remedy = f"right for begun answers; of whole conversations cut it off: leave out data.chat_template_kwargs.{CONTINUE}"
        findings.append(warn(check, what, remedy))
    if template.find() is None:
        remedy = f"right for a base model; for a chat model, {take_own}"
        return [*findings, warn(check, "there is none: the prompt is plain text", remedy)]
    if not all(contains(text, message["content"]) for message in messages if message["role"] in ("system", "user")):
        make = fail if role == "student" else warn
        findings.append(make(check, "the rendering does not contain the prompt's text", take_own))
    if not is_open and text == template.render_closed(messages):
        what = "it does not open the assistant's turn (add_generation_prompt changes nothing)"
        findings.append(warn(check, what, "the student would continue the user's text: add the assistant's header to the template"))
    bos, name = template.tokenizer.bos_token_id, template.tokenizer.bos_token
    if bos is not None and list(ids[:2]) == [bos] * 2:
        findings.append(warn(check, f"the prompt begins with {name!r} twice", "remove one of them from the chat template"))
    return findings


def check_options(
    student: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any], teacher_kwargs: Mapping[str, Any]
) -> list[Finding]:
    """Look for arguments, and fields of messages, that the student's chat template, which renders all views, does not use."""
    fields = {name for message in messages for name, value in message.items() if value} - READ
    findings = []
    for check, names, given in (
        ("data.chat_template_kwargs", kwargs.keys(), kwargs),
        ("teacher.chat_template_kwargs", teacher_kwargs.keys(), {**kwargs, **teacher_kwargs}),
        ("fields of messages", fields, kwargs),
    ):
        template = ChatTemplate(student, given).find() or ""
        if unused := sorted(name for name in names - {"chat_template", CONTINUE} if not re.search(rf"\b{re.escape(name)}\b", template)):
            what = f"the chat template of the student does not use {', '.join(unused)}"
            findings.append(warn(check, what, "they change nothing: remove them, correct their names, or take another chat template"))
    return findings


def check_switches(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], max_new_tokens: int
) -> list[Finding]:
    """Compare the thinking switches of the two chat templates, and look whether there is room for thoughts."""
    of_student, of_teacher = ([switch for switch in SWITCHES if switch in str(tokenizer.chat_template)] for tokenizer in (student, teacher))
    if not of_student and not of_teacher:
        return []
    settings = ", ".join(f"{switch}={kwargs.get(switch, 'the default')}" for switch in sorted({*of_student, *of_teacher}))
    if of_student == of_teacher and not kwargs.keys() & {*of_student} and max_new_tokens < THOUGHTS:
        what = f"both templates may think by default, and sampling.max_new_tokens={max_new_tokens} cuts most thoughts off"
        remedy = f"set data.chat_template_kwargs.{of_student[0]}=false, or sampling.max_new_tokens={THOUGHTS}"
        return [warn("thinking", what, remedy if of_student[0] == SWITCHES[0] else f"set sampling.max_new_tokens={THOUGHTS}")]
    if of_student == of_teacher:
        return [ok("thinking", f"both templates have {', '.join(of_student)}: {settings}; set by data.chat_template_kwargs")]
    what = (
        f"the student's template has {', '.join(of_student) or 'no switch'}, the teacher's {', '.join(of_teacher) or 'none'} ({settings})"
    )
    remedy = "a thinking teacher and a student that does not think disagree from the first token: take two models of one kind"
    return [warn("thinking", what, remedy)]


def check_generation_config(config: ModelConfig, role: str, sampling: str) -> list[Finding]:
    """List settings of the model's generation_config, all of which opd ignores; `sampling` describes how opd samples."""
    check = f"generation_config of the {role}"
    try:
        stored = models.load_with(GenerationConfig.from_pretrained, config, role).to_dict()
    except ConfigError:
        return [ok(check, "none; opd would ignore it")]
    processors, decoding = (
        [f"{name}={stored[name]}" for name, neutral in settings.items() if stored.get(name) not in (neutral, None)]
        for settings in (PROCESSORS, DECODING)
    )
    if not stored.get("do_sample"):
        decoding = []
    if processors:
        what = f"{', '.join([*processors, *decoding])}: opd ignores all of it, other programs do not"
        remedy = "results from elsewhere (model cards, generate()) may depend on these settings; opd samples and scores both bare models"
        return [warn(check, what, remedy)]
    if decoding:
        return [ok(check, f"{', '.join(decoding)}: opd ignores it and samples at {sampling}")]
    return [ok(check, "nothing that would change the samples")]
