"""Student and teacher on the user's own texts, without a trainer: their completions, and their log-probs of each token."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config.options import ModelConfig, SamplingDtype
from opd.config.schema import Config
from opd.data.chat_template import tokenize_plain
from opd.data.prompts import Encoder, Prompt, encode_rows
from opd.data.rollouts import FinishReason, Request, Rollout, collate
from opd.errors import ConfigError, DataError
from opd.evaluation.target import find_pair
from opd.models import load as models
from opd.models.adapters import trained_adapters
from opd.models.locate import locate
from opd.models.policy import check_positions, is_quantized, output_head, predicting_hidden, prepare_student, prepare_teacher
from opd.models.shared_ids import SharedIds
from opd.objective import TeacherStates
from opd.samplers import Decoding, GenerateSampler, SamplerSpec
from opd.training.checkpoint import AVERAGE, read
from opd.training.tensors import restore_weights, trained_tensors


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model to sample and score with.

    Attributes:
        role: "model" or "teacher".
        eos: the ids that end its completions.
        copies: it is sampled with a bf16 copy.
    """

    role: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos: tuple[int, ...]
    copies: bool

    def sampler(self, pad_id: int, ids: SharedIds, seed: int) -> GenerateSampler:
        """Return a sampler of the model. Raises `ConfigError` where its samples would not be the model's."""
        eos, vocabulary = self.eos if ids.ends is None else ids.ends, ids.vocabulary
        if self.role == "teacher" and ids.of_teacher is not None:
            pad_id, vocabulary = self.tokenizer.pad_token_id, ids.of_teacher
        spec = SamplerSpec(model=self.model, eos=eos, pad_id=pad_id, vocabulary=vocabulary, seed=seed, bf16=False, masked=ids.masked)
        sampler = GenerateSampler(spec, self.copies)
        sampler.check(self.role)
        return sampler


@dataclass(frozen=True, slots=True)
class ModelPair:
    """Models that are compared.

    Attributes:
        loaded: the "student" and, unless it was left out, the "teacher".
        ids: what they share.
    """

    config: Config
    loaded: dict[str, LoadedModel]
    ids: SharedIds

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded["student"].tokenizer

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of a teacher with tokens of its own."""
        return None if self.ids.of_teacher is None else self.loaded["teacher"].tokenizer


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text's tokens, and the log-prob of each under both models, in nats.

    Attributes:
        first: the first token of a text without a prompt, which has no log-prob as nothing comes before it.
    """

    tokens: list[str]
    student: list[float]
    teacher: list[float]
    first: str = ""

    def to_dict(self) -> dict[str, object]:
        return {"tokens": self.tokens, "student_logp": self.student, "teacher_logp": self.teacher}


def load(config: ModelConfig, role: str, device: torch.device, sampling: SamplingDtype = SamplingDtype.trainer) -> LoadedModel:
    """Load a model with the weights that an unsharded trainer computes with.

    Args:
        role: "model" or "teacher".
        sampling: The dtype that the model is sampled in.
    """
    tokenizer = models.load_tokenizer(config, role)
    model, copies = models.load_model(config, role, device), False
    if role == "teacher":
        model = prepare_teacher(model, device)
    else:
        model, bf16 = prepare_student(model, device).requires_grad_(False), models.computes_in_bf16(config.dtype, device)
        for weight in filter(torch.is_floating_point, model.parameters()):  # not quantised ones, which are integers
            weight.data = weight.data.to(torch.bfloat16 if bf16 else torch.float32)  # buffers, such as rotary frequencies, keep their dtype
        copies = not is_quantized(model) and models.uses_bf16_copy(sampling, device, bf16)
    return LoadedModel(role, model, tokenizer, models.eos_ids(model, tokenizer), copies)


def load_teacher(config: Config, device: torch.device, average: Path | None = None) -> LoadedModel:
    """Load the teacher. `average`: the checkpoint of a run whose teacher had the average of the trained weights that is in it.

    Raises `ConfigError` where a server has the weights, and `teacher.path` only the tokenizer.
    """
    folder = Path(locate(config.teacher, "teacher"))
    if config.teacher.url is not None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"teacher.url: no server is asked here, and teacher.path={config.teacher.path} has no weights; name the teacher with "
            "--teacher MODEL"
        )
    averages_adapters = average is not None and config.lora.rank > 0
    teacher = load(replace(config.teacher, adapter=None) if averages_adapters else config.teacher, "teacher", device)
    if average is not None:
        teacher.model.requires_grad_(config.lora.rank == 0)
        trained = replace(config, model=replace(config.model, adapter=config.teacher.adapter))
        adapters = trained_adapters(teacher.model, trained) if averages_adapters else None
        restore_weights(read(average), trained_tensors(teacher.model), AVERAGE)
        if adapters is not None and not is_quantized(teacher.model):
            adapters.merge_and_unload()
        teacher.model.requires_grad_(False)
    return teacher


def share_ids(config: Config, student: LoadedModel, teacher: LoadedModel) -> SharedIds:
    """Return the ids that both models know. Raises `ConfigError` where an id is another token in the other model."""
    if config.teacher.has_own_tokens and student is not teacher:
        own, theirs = (models.shared_vocabulary(loaded.tokenizer, loaded.model, None) for loaded in (student, teacher))
        return SharedIds(own, of_teacher=theirs)
    overlap = models.check_same_ids(student.tokenizer, teacher.tokenizer)
    vocabulary = models.shared_vocabulary(student.tokenizer, student.model, teacher.model)
    pairs = [(loaded.tokenizer, loaded.eos) for loaded in (student, teacher)]
    return SharedIds.of(vocabulary, overlap, pairs, config.data.chat_template_kwargs, student.model.device)


def load_pair(config: Config, with_teacher: bool = True, average: Path | None = None) -> ModelPair:
    """Load both models. `average`: as in `load_teacher`. Raises `ConfigError` where one is missing or their tokenizers differ."""
    device = models.find_device(config.device)
    config = find_pair(config, with_teacher)
    loaded = {"student": load(config.model, "model", device, config.sampling.dtype)}
    if with_teacher:
        loaded["teacher"] = load_teacher(config, device, average)
    return ModelPair(config, loaded, share_ids(config, loaded["student"], loaded.get("teacher", loaded["student"])))


def sample(pair: ModelPair, text: str, samples: int = 1) -> dict[str, list[str]]:
    """Return `samples` completions of the prompt by each model, at the config's sampling settings."""
    decoding = Decoding.of(pair.config.sampling)
    prompt = _encode(pair, text)
    completions: dict[str, list[str]] = {}
    for role, loaded in pair.loaded.items():
        seen = prompt.for_teacher() if role == "teacher" else prompt
        tokenizer = (pair.teacher_tokenizer if role == "teacher" else None) or pair.tokenizer
        check_positions(loaded.model, loaded.role, "sampling.max_new_tokens", [len(seen.ids)], decoding.max_new_tokens)
        sampler = loaded.sampler(tokenizer.pad_token_id, pair.ids, pair.config.seed)
        rollouts = sampler.sample([Request(seen, 0, attempt) for attempt in range(samples)], decoding, "sample")
        completions[role] = [
            models.decode(tokenizer, rollout.answer, skip_special_tokens=True) + (" […]" if rollout.truncated else "")
            for rollout in rollouts
        ]
    return completions


@torch.no_grad()
def score(pair: ModelPair, text: str, prompt: str | None = None) -> ScoredText:
    """Return both models' log-probs of a text's tokens at temperature 1.

    Args:
        pair: with a teacher.
        text: what to score.
        prompt: a user's message that the text answers; None scores the text on its own.

    Raises:
        DataError: there is no token to score, or more than a model takes.
    """
    if pair.teacher_tokenizer is not None:
        remedy = "the two models have other tokens; the report of a run shows its spans"
        raise ConfigError(f"teacher.alignment=spans: opd score compares log-probs token by token; {remedy}")
    tokenizer = pair.tokenizer
    if prompt is None:
        ids = tokenize_plain(text, tokenizer)
        seen, completion = Prompt(0, tuple(ids[:1]), ""), ids[1:]
    else:
        seen, completion = _encode(pair, prompt), list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not completion:
        raise DataError("the text has no token that follows another one; give a longer one")
    models.check_known([Prompt(0, (*seen.ids, *completion), "")], tokenizer, pair.ids.vocabulary, pair.ids.overlap)
    rollout = Rollout(Request(seen), tuple(completion), torch.zeros(len(completion)), FinishReason.stop)
    batch = collate([rollout], [0], 0)
    logp: dict[str, list[float]] = {}
    for role, loaded in pair.loaded.items():
        inputs = (batch.teacher_inputs if role == "teacher" else batch.inputs).to(loaded.model.device)
        limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and inputs.ids_BT.numel() > limit:
            raise DataError(f"the text has {inputs.ids_BT.numel():,} tokens, the {role} takes {limit:,}; give a shorter one")
        head = output_head(loaded.model, pair.ids.vocabulary, masked=pair.ids.masked)
        states = TeacherStates(predicting_hidden(loaded.model.base_model, inputs), head)
        logp[role] = states.token_logp(batch.ids_N.to(loaded.model.device), 1.0).tolist()
    tokens = [models.decode(tokenizer, [token]) for token in completion]
    return ScoredText(tokens, logp["student"], logp["teacher"], models.decode(tokenizer, seen.ids) if prompt is None else "")


def _encode(pair: ModelPair, text: str) -> Prompt:
    """Return the prompt of a user's message as training shows it to both models, whatever its length."""
    data = replace(pair.config.data, prompt="prompt", system=None, answer=None, max_prompt_tokens=2**31)
    encoder = Encoder(pair.tokenizer, data, pair.config.teacher, pair.teacher_tokenizer)
    (prompt,) = encode_rows([{"prompt": text}], encoder, "given")
    if pair.teacher_tokenizer is None:
        models.check_known([prompt], pair.tokenizer, pair.ids.vocabulary, pair.ids.overlap)
    return prompt
