"""The rules that involve several options, by topic."""

from opd.config.options import Control, Engine, Estimator, Quantization, SamplingDtype, TeacherConfig, TeacherWeights, TokenAlignment
from opd.config.settings import Settings
from opd.config.several import did_you_mean
from opd.errors import ConfigError

# Options of a teacher with weights of its own, which say nothing about a student that is its own teacher.
UNREAD = ("url", "placement", "quantization", "gguf_file", "revision", "adapter", "dtype", "attn_implementation")


BUILT_IN_REWARDS = ("exact", "number", "math")


def check_rules(config: Settings) -> None:
    """Raise `ConfigError` with the option, its value and the remedy for the first rule, in this order, that is broken."""
    if config.model.quantization is not Quantization.none:
        check_quantized_student(config)
    if config.teachers:
        check_teachers(config)
    if config.teacher.has_own_tokens:
        check_spans(config)
    if config.data.mix:
        _ = config.parts  # which are checked as they are made
    else:
        if config.teaches_itself:
            check_self_teaching(config)
        if config.is_served:
            check_served(config)
    if config.teacher.contrast is not None:
        why = "does not work with teacher.contrast, whose advantage needs one log-prob per token"
        config.require_value("ppo.estimator", Estimator.sampled, why)
        why = "is the mean of the advantage without teacher.contrast"
        config.require_value("ppo.baseline", False, why, "teacher.contrast=null")
    if config.eval.reward is not None:
        check_reward_name(config.eval.reward)
    check_sampler(config)
    check_rows(config)
    check_control(config)
    check_sweep(config)


def check_reward_name(name: str) -> None:
    """Raise `ConfigError` for what is neither the name of a reward nor `module:function`, whether or not there is such a module."""
    module, _, function = name.partition(":")
    if module == "__main__":
        raise ConfigError(f"eval.reward={name}: a running script is no module; in Python pass the function itself, or move it to a file")
    if name not in BUILT_IN_REWARDS and not all(part.isidentifier() for part in [*module.split("."), function]):
        hint = did_you_mean(name, BUILT_IN_REWARDS)
        raise ConfigError(f"eval.reward={name}: {hint}use {', '.join(BUILT_IN_REWARDS)}, or module:function for your own")


def check_quantized_student(config: Settings) -> None:
    remedy = "quantised weights cannot be trained: set lora=default, which trains adapters, or model.quantization=none"
    config.require("model.quantization", config.lora.rank > 0, remedy)
    copies = config.sampling.dtype is SamplingDtype.bfloat16 and config.sampling.engine is not Engine.vllm
    config.require("sampling.dtype", not copies, "quantised weights have no bf16 copy: set sampling.dtype=auto")


def check_teachers(config: Settings) -> None:
    """Check what no teacher of several can have. Their other options are checked as `Config.parts` are made."""
    for label, entry in config.teachers.items():
        if label not in config.data.mix:
            remedy = did_you_mean(label, config.data.mix) or "label a dataset with data.mix, or set teacher.path=… instead"
            raise ConfigError(f"teachers.{label}: data.mix has no dataset of this label; {remedy}".strip())
        options = entry if isinstance(entry, dict) else {}
        if options.get("alignment") == TokenAlignment.spans:
            remedy = "works for one teacher alone: name it as teacher, without teachers, or take one with the student's tokens"
            raise ConfigError(f"teachers.{label}.alignment=spans: {remedy}")
        is_average = options.get("weights") == TeacherWeights.ema
        for option in ["weights"] * is_average + ["contrast"] * (options.get("contrast") is not None):
            remedy = f"leave {label} out of teachers, and set teacher.{option} for all datasets that are left out"
            raise ConfigError(f"teachers.{label}.{option}={options[option]}: only applies to teacher: {remedy}")
    remedy = "subtracts the log-probs of one teacher: set teachers={}, or teacher.contrast=null"
    config.require("teacher.contrast", config.teacher.contrast is None, remedy)
    takes_any = config.control in (Control.none, Control.constant)
    config.require("control", takes_any, "needs one teacher for all data: set teachers={}, or control=constant")


def check_spans(config: Settings) -> None:
    """Check what does not work with a teacher that has another tokenizer."""
    spans = "teacher.alignment=spans"
    config.require_value("ppo.estimator", Estimator.sampled, f"compares distributions of one vocabulary, which {spans} does not have")
    config.require_value("ppo.baseline", False, f"is the KL over one vocabulary, which {spans} does not have")
    config.require_value("ppo.discount", 0, f"would count a span of {spans} once for each of its tokens")
    config.require_value("control", Control.none, f"replaces the advantage of single tokens, not of the spans of {spans}")
    config.require_value("teacher.contrast", None, f"subtracts log-probs of single tokens, not of the spans of {spans}")
    remedy = "the teacher is the student: set teacher.alignment=ids, or teacher.weights=own and another teacher.path"
    config.require("teacher.alignment", not config.teaches_itself, remedy)
    remedy = "works for one teacher alone: set teachers={}, or teacher.alignment=ids"
    config.require("teacher.alignment", not config.teachers, remedy)


def check_self_teaching(config: Settings) -> None:
    """Check what cannot hold where the student is its own teacher, or leaves it nothing to learn."""
    for option in UNREAD if config.names_weights else ("placement", "quantization"):
        if getattr(config.teacher, option) != getattr(config.model, option, None):
            why = f"the teacher is the student, with {config.weights_option}"
            otherwise = "control=none" if config.control is Control.self else "teacher.weights=own and another teacher.path"
            config.require_value(f"teacher.{option}", getattr(TeacherConfig(), option), why, otherwise)
    is_current = config.teacher_weights is TeacherWeights.current
    has_purpose = config.teacher.has_own_view or config.control is Control.self or (config.ppo.reward_coef > 0 and not is_current)
    remedy = "the teacher is the student and reads the same prompts, so that there is nothing to learn: set teacher.prompt='…' or "
    remedy += f"teacher.system='…' for it{'' if is_current else ', ppo.reward_coef above 0'}, or another teacher"
    config.require("teacher.weights" if config.names_weights else "lora.rank", has_purpose, remedy)
    remedy = "teacher.weights=current changes at each inner step, but whole distributions are computed from the weights that it had "
    remedy += "before: set ppo.steps=1, teacher.weights=ema, or ppo.estimator=sampled ppo.baseline=false"
    config.require("ppo.steps", config.ppo.steps == 1 or not (is_current and config.needs_teacher_states), remedy)


def check_served(config: Settings) -> None:
    whole = "needs the teacher's whole distributions, which a server does not send"
    not_exact = config.ppo.estimator is not Estimator.exact
    config.require("ppo.estimator", not_exact, f"{whole}: set ppo.estimator=sampled or ppo.estimator=topk")
    config.require_value("ppo.baseline", False, whole)
    remedy = "with teacher.url, which scores at temperature 1: set ppo.temperature=1, or null"
    config.require("ppo.temperature", config.temperature == 1, remedy)


def check_sampler(config: Settings) -> None:
    """Check that the sampler draws from the distribution that is scored, or what differs is corrected."""
    ppo, sampling, temperature = config.ppo, config.sampling, f"{config.temperature:g}"
    cap, is_corrected = "set ppo.importance_cap=2.0", ppo.importance_cap is not None
    remedy = f"sampling.lag=1 samples with the previous step's weights: {cap}, or sampling.lag=0"
    config.require("ppo.importance_cap", is_corrected or sampling.lag == 0, remedy)
    if ppo.estimator is Estimator.sampled:
        config.require("sampling.top_k", sampling.top_k != 1, "leaves one token to sample: set sampling.top_k=0, or more than 1")
        if sampling.temperature != config.temperature:
            same = f"sampling.temperature={temperature}"
            remedy = f"the sampler draws at another temperature than ppo.temperature={temperature}: {cap}, or {same}"
            config.require("ppo.importance_cap", is_corrected, remedy)
            remedy = f"sums log-probs at the sampler's temperature, which is not ppo.temperature: set {same}, or ppo.discount=0"
            config.require("ppo.discount", ppo.discount == 0, remedy)
        if sampling.top_p < 1 or sampling.top_k > 0:
            off = "sampling.top_p=1 sampling.top_k=0"
            remedy = f"top-p and top-k sample from a truncated distribution: {cap}, or {off}"
            config.require("ppo.importance_cap", is_corrected, remedy)
            remedy = f"sums log-probs that top-p and top-k distort: set {off}, or ppo.discount=0"
            config.require("ppo.discount", ppo.discount == 0, remedy)
    for section in (sampling, config.eval) if sampling.engine is Engine.vllm else ():
        allowed = section.temperature == 0 or 0.01 <= section.temperature <= 2
        section.require("temperature", allowed, "must be 0 or between 0.01 and 2 for sampling.engine=vllm")


def check_rows(config: Settings) -> None:
    """Check that rows have the completions and rewards that are asked of them."""
    has_column = any(data.completion is not None for data in config.data.datasets.values() or [config.data])
    remedy = "rows take the texts of a column: set data.completion=COLUMN (opd sample --out FILE writes one), or train.given_share=0"
    config.require("train.given_share", has_column or not config.train.takes_given, remedy)
    has_several = config.eval.reward is not None and config.sampling.n > 1
    remedy = "compares the rewards of a prompt's completions: set eval.reward=NAME and sampling.n above 1"
    config.require("ppo.reward_coef", has_several or config.ppo.reward_coef == 0, remedy)


def check_control(config: Settings) -> None:
    if config.control is Control.self:
        takes_start = config.teacher.weights in (TeacherWeights.own, TeacherWeights.base)
        config.require("control", takes_start, "is a teacher with the weights of the start: set teacher.weights=own, or control=none")
    elif config.control is not Control.none:
        remedy = "only applies to ppo.estimator=sampled, where the teacher's part is an advantage: set that, or control=none"
        config.require("control", config.ppo.estimator is Estimator.sampled, remedy)
        remedy = "leaves the teacher out, whose distributions ppo.baseline adds: set ppo.baseline=false, or control=none"
        config.require("control", not config.ppo.baseline, remedy)
    if config.control is Control.shuffled:
        remedy = "takes scores from other completions of the step: set sampling.n=2 or train.batch_size=2"
        config.require("control", config.sampling.n * config.train.batch_size > 1, remedy)


def check_sweep(config: Settings) -> None:
    """Check that the metric of a sweep is measured."""
    metric = config.sweep.metric
    if metric.startswith("reward_") or metric == "gap_closed":
        config.require("sweep.metric", config.eval.reward is not None, "is not measured with eval.reward=null: set eval.reward=NAME")
    if metric.startswith("eval_kl"):
        served = "teacher.url" if config.is_served and not config.data.mix else ""
        without = "teacher.alignment=spans" if config.teacher.has_own_tokens else served
        config.require("sweep.metric", not without, f"is not measured with {without}: set another metric")
        config.require("sweep.metric", config.eval.kl_prompts > 0, "is not measured with eval.kl_prompts=0: set eval.kl_prompts=32")
