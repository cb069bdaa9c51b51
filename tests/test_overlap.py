"""Tokenizers that differ in a few added tokens: which pairs are safe, what masking does to the objective, and whole runs of such a pair."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import random_model
from fake_vllm import ScoringServer, running
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from training_helpers import VOCABULARY, make_trainer, rollout_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.options import TeacherConfig
from opd.data.prompts import Prompt
from opd.data.rollouts import Request, collate
from opd.doctor import first_step
from opd.errors import DATA, NOT_READY, OK, USAGE, ConfigError, DataError
from opd.models import load as models
from opd.models.overlap import Overlap, end_ids
from opd.objective import (
    Head,
    Sampled,
    TeacherStates,
    chunked_loss,
    exact,
    forward_kl,
    jsd,
    masked_mass,
    reverse_kl,
    sampled,
    topk,
)
from opd.objective.losses import Clips
from opd.samplers import Decoding, GenerateSampler, SamplerSpec
from opd.samplers.vllm_server import ServedSampler
from opd.teachers import LocalTeacher, ServedTeacher
from opd.train import main
from opd.training.identity import check_content
from opd.training.masked import MAX_FIRST, MAX_STUDENT, MAX_TEACHER, check_masses
from opd.training.tokens import Tokens

# Tokenizers.

QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GROUPED = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEXTS = ["the student writes and the teacher reads", "12 + 345 = 357", "other texts, otherwise cut: hence, there"] * 3


def byte_level(size=300, pattern=QWEN, normalizer=normalizers.NFC):
    """Return a tokenizer as Qwen's: bytes, merges, and two control tokens behind them."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.normalizer, tokenizer.decoder = normalizer(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return with_tokens(tokenizer, "<|endoftext|>", "<|im_end|>")


def with_tokens(tokenizer, *added):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens(list(added))
    return copy


def edited(tokenizer, edit):
    spec = json.loads(tokenizer.to_str())
    edit(spec)
    return Tokenizer.from_str(json.dumps(spec))


def fast(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


BASE = byte_level()
SIZE = BASE.get_vocab_size()


def test_added_tokens_of_either_side_are_told_and_all_others_are_shared():
    qwen3 = fast(with_tokens(BASE, "<think>", "</think>"))
    assert models.check_same_ids(fast(BASE), fast(BASE)) is None
    found = models.check_same_ids(fast(BASE), qwen3)
    assert (found.student, found.teacher) == ({}, {SIZE: "<think>", SIZE + 1: "</think>"})
    assert found.shared == frozenset(range(SIZE)) and found.masked(SIZE + 3).tolist() == [SIZE, SIZE + 1, SIZE + 2]
    back = models.check_same_ids(qwen3, fast(BASE))
    assert (back.student, back.teacher, back.shared) == (found.teacher, found.student, found.shared)


def merges(change):
    return lambda spec: spec["model"].update(merges=change(spec["model"]["merges"]))


def pre_tokenizer(spec):
    spec["pre_tokenizer"] = json.loads(byte_level(pattern=GROUPED).to_str())["pre_tokenizer"]


REFUSED = {
    "other pre-tokenizer": (lambda t: edited(t, pre_tokenizer), "pre-tokenizer"),
    "other normalizer": (lambda t: edited(t, lambda spec: spec.update(normalizer={"type": "NFKC"})), "normalizer"),
    "other merges": (lambda t: edited(t, lambda spec: spec["model"]["merges"].reverse()), "merges"),
    "more merges": (lambda t: with_tokens(byte_level(SIZE + 4), "<think>"), "other ids"),
    "an id of another token": (lambda t: with_tokens(BASE, "<tool>"), f"id {SIZE} is '<think>' in the student's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_cut_texts_otherwise_is_refused_with_the_ways_out(case):
    make, what = REFUSED[case]
    student = with_tokens(BASE, "<think>")
    with pytest.raises(ConfigError) as caught:
        models.check_same_ids(fast(student), fast(make(with_tokens(BASE, "<think>", "<more>"))))
    line = str(caught.value)
    assert line.startswith("teacher") and what in line and "\n" not in line
    assert "teacher.path" in line


def test_a_token_of_one_side_that_is_not_an_added_one_is_refused():
    def rename(spec):
        spec["model"]["vocab"]["zzz"] = spec["model"]["vocab"].pop("Ā")  # a byte that no merge uses

    with pytest.raises(ConfigError, match=r"only the student's tokenizer has 'Ā'.*teacher\.path"):
        models.check_same_ids(fast(BASE), fast(edited(BASE, rename)))


def test_completions_end_at_the_shared_ends_of_both_models_and_of_their_templates():
    student, teacher = fast(BASE), fast(with_tokens(BASE, "<think>"))
    overlap = models.check_same_ids(student, teacher)
    text, turn = SIZE - 2, SIZE - 1  # <|endoftext|>, <|im_end|>
    assert end_ids(overlap, [(student, [text]), (teacher, [turn, SIZE])], {}) == (text, turn)
    assert end_ids(overlap, [(student, [text]), (teacher, [text])], {}) == (text,)
    teacher.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    assert end_ids(overlap, [(student, [text]), (teacher, [text])], {}) == (text, turn)
    (line,) = [line for line in models.pair_differences(student, student, ((text,), (turn,)), overlap, (text, turn)) if "end-of" in line]
    assert "'<|endoftext|>' or '<|im_end|>'" in line
    teacher.chat_template = None
    with pytest.raises(ConfigError, match=r"teacher\.path.*'<think>'.*eos_token_id"):
        end_ids(overlap, [(student, [SIZE]), (teacher, [SIZE])], {})


def test_prompts_with_a_token_that_their_reader_lacks_are_refused():
    student, teacher = fast(with_tokens(BASE, "<think>")), fast(BASE)
    overlap = models.check_same_ids(student, teacher)
    models.check_known([Prompt(0, (1, SIZE), "", teacher_ids=(1,))], student, SIZE + 9, overlap)
    with pytest.raises(DataError, match=rf"row 4: .*'<think>' \({SIZE}\).*teacher.*data\.chat_template_kwargs") as caught:
        models.check_known([Prompt(4, (1, SIZE), "")], student, SIZE + 9, overlap)
    assert caught.value.exit_code == DATA
    with pytest.raises(DataError, match="the student does not have"):
        models.check_known([Prompt(4, (1, SIZE), "", teacher_ids=(1,))], teacher, SIZE + 9, models.check_same_ids(teacher, student))


# The objective, in float64.

N, V, H, T = 11, 13, 6, 0.7
MASKED = torch.tensor([2, 7, 12])
KEPT = torch.tensor([token for token in range(V) if token not in MASKED.tolist()])
DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": partial(jsd, beta=0.3)}


def problem():
    """Return hidden states, weight and bias of a student with gradient, the teacher's states and weight, and targets that are kept."""
    generator = torch.Generator().manual_seed(0)
    make = partial(torch.randn, generator=generator, dtype=torch.float64)
    student = [make(*shape).requires_grad_() for shape in ((N, H), (V, H), (V,))]
    return *student, make(N, H), make(V + 2, H), KEPT[torch.randint(len(KEPT), (N,), generator=generator)]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_exact_is_the_divergence_of_the_two_renormalised_distributions(name):
    hidden, weight, bias, teacher_hidden, teacher_weight, targets = problem()
    student = ((hidden @ weight.T + bias)[:, KEPT] / T).log_softmax(-1)
    teacher = ((teacher_hidden @ teacher_weight[:V].T)[:, KEPT] / T).log_softmax(-1)
    expected = DIVERGENCES[name](student, teacher)
    states = TeacherStates(teacher_hidden, Head(teacher_weight, size=V, masked=MASKED))
    head = Head(weight, bias, size=V, rows=4, masked=MASKED)
    for objective in (exact, partial(topk, k=V)):
        loss, stats = chunked_loss(hidden, head, objective(targets, states, T, DIVERGENCES[name]))
        assert torch.allclose(loss, expected.sum(), rtol=1e-12)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        for mine, reference in zip(gradients, torch.autograd.grad(expected.sum(), (hidden, weight, bias), retain_graph=True), strict=True):
            assert torch.allclose(mine, reference, atol=1e-12)
        assert not gradients[1][MASKED].any() and not gradients[2][MASKED].any()
        assert torch.allclose(stats["teacher_logp"].exp(), teacher.exp().gather(-1, torch.searchsorted(KEPT, targets)[:, None])[:, 0])


def test_expected_gradient_of_sampled_is_that_of_the_renormalised_kl_whether_or_not_the_teacher_is_renormalised():
    """By enumeration of the shared tokens: a teacher's mass on the others is a constant of the state, and E[constant grad log p] = 0."""
    hidden, weight, bias, teacher_hidden, teacher_weight, _ = problem()
    hidden, teacher_hidden = hidden[:1].detach(), teacher_hidden[:1]
    head, clips = Head(weight, bias, size=V, masked=MASKED), Clips(0.2, 0.2, None, None)
    student = ((hidden @ weight.T + bias)[:, KEPT] / T).log_softmax(-1)
    over_all = ((teacher_hidden @ teacher_weight.T) / T).log_softmax(-1)[:, KEPT]
    shared = over_all.log_softmax(-1)
    assert (shared - over_all).min() > 0.05  # the teacher does want other tokens
    (expected,) = torch.autograd.grad(reverse_kl(student, shared).sum(), weight, retain_graph=True)
    for teacher in (shared, over_all):
        total = torch.zeros_like(weight)
        for place, token in enumerate(KEPT):
            logp = teacher[:, place].detach()
            loss, _ = chunked_loss(
                hidden, head, sampled(Sampled(target_N=token[None], teacher_logp_N=logp, behaviour_logp_N=logp), T, clips)
            )
            total += student[0, place].exp().detach() * torch.autograd.grad(loss, weight)[0]
        assert torch.allclose(total, expected, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_masked_mass_is_the_probability_without_the_mask_rows_beyond_the_vocabulary_included(softcap):
    _, _, _, hidden, weight, targets = problem()
    bias = torch.linspace(-1, 1, V + 2, dtype=torch.float64)
    head = Head(weight, bias, size=V, scale=1.5, softcap=softcap, masked=MASKED)
    logp = TeacherStates(hidden, head).token_logp(targets, T)
    mass, token = masked_mass(hidden, head, targets, logp, T)
    logits = 1.5 * (hidden @ weight.T + bias)
    probabilities = ((logits if softcap is None else softcap * torch.tanh(logits / softcap)) / T).softmax(-1)
    outside = torch.tensor([*MASKED.tolist(), V, V + 1])
    assert torch.allclose(mass, probabilities[:, outside].sum(-1), atol=1e-12)
    assert torch.equal(token, outside[probabilities[:, outside].argmax(-1)])
    narrow = Head(weight[:V], size=V, masked=MASKED[:0])
    mass, token = masked_mass(hidden, narrow, targets, TeacherStates(hidden, narrow).token_logp(targets, T), T)
    assert not mass.any() and (token == -1).all()


@pytest.mark.parametrize("objective", ["sampled", "exact"])
def test_an_empty_difference_changes_nothing_bitwise(objective):
    hidden, weight, bias, teacher_hidden, teacher_weight, targets = problem()
    results = []
    for masked in (None, MASKED[:0]):
        states = TeacherStates(teacher_hidden, Head(teacher_weight, size=V, masked=masked))
        logp = states.token_logp(targets, T)
        loss = exact(targets, states, T, reverse_kl)
        if objective == "sampled":
            loss = sampled(Sampled(target_N=targets, teacher_logp_N=logp, behaviour_logp_N=logp), T, Clips())
        value, _ = chunked_loss(hidden, Head(weight, bias, masked=masked), loss)
        results.append((value, *torch.autograd.grad(value, (hidden, weight, bias))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# A teacher behind a server.


class Named:
    """Names the ids of a small model; the server's tokenizer has other names for two of them."""

    all_special_ids = (0, 1)

    def __init__(self, other=""):
        self.other = other

    def get_added_vocab(self):
        return {"<end>": 1}

    def decode(self, ids):
        return "".join(f"<{token}{self.other if token in (5, 22) else ''}>" for token in ids)


def test_served_teacher_names_only_shared_ids_sends_their_log_probs_and_shows_the_mass_of_its_own():
    model = random_model(23, seed=2, hidden=24)
    with torch.no_grad():
        model.lm_head.weight[5] = model.lm_head.weight.mean(0) * 12
    overlap = Overlap(frozenset(range(23)) - {5, 22}, {5: "<tool>"}, {22: "<think>"})
    batch = collate([rollout_of((3, 4), (6, 8, 1)), rollout_of((9, 2, 7), (3, 14))], [0, 1], pad_id=0)
    with running(ScoringServer(model, Named("!"))) as fake:
        served = ServedTeacher(TeacherConfig(url=fake.url), Named(), 23, 40, [1, 6, 9], overlap=overlap)
        columns = served.columns(batch.teacher_inputs, batch.ids_N, 1.0)
        plain = LocalTeacher(model, 23)
        masked = LocalTeacher(model, 23, masked=torch.tensor([5, 22])).columns(batch.teacher_inputs, batch.ids_N, 1.0)
        assert torch.allclose(columns["teacher_logp"], plain.logp(batch.teacher_inputs, batch.ids_N, 1.0), atol=1e-4)
        renormalised = columns["teacher_logp"] - torch.log1p(-masked["teacher_masked"])
        assert torch.allclose(renormalised, masked["teacher_logp"], atol=1e-4)
        found = columns["teacher_masked"] > 0
        assert found.any() and (columns["teacher_masked"] <= masked["teacher_masked"] + 1e-5).all()
        assert torch.equal(columns["teacher_masked_id"][found], masked["teacher_masked_id"][found])
        spec = SamplerSpec(model=model, eos=(1,), pad_id=0, vocabulary=23, seed=0, bf16=False, masked=torch.tensor([5, 22]))
        rollouts = ServedSampler(served.servers[0], "teacher", spec).sample(
            [Request(Prompt(0, (3, 4), ""))] * 4, Decoding(2.0, 20), "train"
        )
        assert not {5, 22} & {token for rollout in rollouts for token in rollout.completion}


# Runs.


def widened(role, folder, added=(), rows=None, like=None):
    """Save a bundled model with more tokens and rows; the new rows have logits of 0, or those of the id `like`."""
    source = PACKAGE / "assets" / f"tiny-{role}"
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    size = len(tokenizer)
    tokenizer.add_tokens(list(added))
    model.resize_token_embeddings(rows or len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[size:] = 0.0 if like is None else weight[like]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


RUN = ("experiment=debug", "device=cpu", "name=run", "track.rollouts_per_step=3")
THINK = ("<think>", "</think>")
END = 256  # <|end|> of the bundled models


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run like `debug_run`, with these options; return the exit code and the run's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: (main([*RUN, *options]), tmp_path / "runs" / "run")


def final_weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def test_a_teacher_with_two_more_tokens_trains_as_without_them_bitwise(run, debug_run, tmp_path, capfd):
    code, folder = run(f"teacher.path={widened('teacher', tmp_path / 'teacher', THINK)}")
    assert code == OK and "'<think>', '</think>'" in capfd.readouterr().out
    plain, other = final_weights(debug_run), final_weights(folder)
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["masked/teacher"] < 1e-4 and line["masked/student"] == 0 for line in metrics)
    before = [json.loads(line) for line in (debug_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["reverse_kl"] for line in metrics] == [line["reverse_kl"] for line in before]
    assert not [name for name in before[0] if name.startswith("masked")]


def test_masked_rows_of_both_heads_train_as_without_them(run, debug_run, tmp_path):
    """The student's head has rows for the teacher's tokens, as Qwen2.5's padding has for those of Qwen3."""
    student, teacher = widened("student", tmp_path / "student", rows=264), widened("teacher", tmp_path / "teacher", THINK, rows=264)
    code, folder = run(f"model.path={student}", f"teacher.path={teacher}")
    assert code == OK
    plain, other = final_weights(debug_run), final_weights(folder)
    assert all(torch.allclose(plain[name], other[name][: len(plain[name])], atol=1e-5) for name in plain)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["masked/student"] > 0 and line["masked/teacher_1"] > 0 for line in metrics)


def make_overlapping(folder, wide, **options):
    """Return a trainer of small models; `wide`: with two more rows in each head, of ids that are masked."""
    student, teacher = random_model(VOCABULARY, seed=1), random_model(VOCABULARY, seed=2, hidden=24)
    if not wide:
        return make_trainer(folder, student, teacher, **options)
    overlap = Overlap(frozenset(range(VOCABULARY)), {}, {VOCABULARY: "<think>", VOCABULARY + 1: "</think>"})
    size, masked = VOCABULARY + 2, overlap.masked(VOCABULARY + 2)
    for model in (student, teacher):
        model.resize_token_embeddings(size, mean_resizing=False)
        model.get_output_embeddings().weight.data[VOCABULARY:] *= 20
    trainer = make_trainer(folder, student, teacher, **options)
    trainer.scoring.teacher, trainer.scoring.overlap = LocalTeacher(teacher.requires_grad_(False), size, masked=masked), overlap
    policy = trainer.strategy.policy
    policy.size, policy.masked = size, masked
    trainer.sampler = GenerateSampler(replace(trainer.sampler.spec, vocabulary=size, masked=masked))
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"ppo__steps": 2},
        {"ppo__estimator": "exact"},
        {"ppo__estimator": "topk", "ppo__k": 5, "train__packing": True},
        {"ppo__baseline": True, "sampling__top_k": 5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_estimator_trains_and_resumes_within_a_step_as_without_masked_rows(tmp_path, options):
    plain, wide = (make_overlapping(tmp_path / str(wide), wide, optim__lr=1e-3, **options) for wide in (False, True))
    for trainer in (plain, wide):
        trainer.train_step()
    done = wide.train_step()
    plain.train_step()
    for (name, expected), (_, found) in zip(plain.student.named_parameters(), wide.student.named_parameters(), strict=True):
        assert torch.allclose(found[: len(expected)], expected, atol=1e-5), name
    assert all(done.metrics[f"masked/{role}"] > 0.01 for role in ("student", "teacher"))
    wide.tokens = wide.begin_step()
    wide.inner_step(wide.tokens)
    stored, table = wide.tokens.to_tensors(), wide.tokens
    wide.save(needed=True)
    again = make_overlapping(tmp_path / "True", True, optim__lr=1e-3, **options)
    again.resume(again.checkpoints.newest())
    assert all(torch.equal(again.tokens.columns[name], table.columns[name]) for name in table.columns)
    assert {"column.student_masked", "column.teacher_masked_id"} <= stored.keys()


def test_a_teacher_that_wants_its_own_tokens_is_refused_with_the_way_out(run, tmp_path, capfd):
    teacher = widened("teacher", tmp_path / "teacher", THINK, like=END)
    code, folder = run(f"teacher.path={teacher}", "checkpoint.every=1", "eval.limit=1", "eval.kl_prompts=1")
    error = capfd.readouterr().err.splitlines()[-1]
    assert code == USAGE and "teacher.path" in error and "'<think>'" in error and "enable_thinking=false" in error
    assert not (folder / "final").exists() and not list((folder / "checkpoints").glob("*step_*"))
    assert cli.main(["doctor", *RUN, f"teacher.path={teacher}", "--prompts", "0"]) == NOT_READY
    assert "masked tokens" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "option", "remedy"),
    [
        (["data.mix={a: {}, b: {}}", "teachers={a: {path: bundled:tiny-teacher}}"], "teachers", "alone"),
        (["ppo.estimator=topk", "ppo.temperature=1", "eval.kl_prompts=0"], "ppo.estimator=topk", "ppo.estimator=sampled"),
    ],
)
def test_what_does_not_go_with_other_tokens_is_refused(run, tmp_path, capfd, options, option, remedy):
    teacher = widened("teacher", tmp_path / "teacher", ["<think>"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(teacher)
    with running(ScoringServer(model, tokenizer)) as fake:
        served = [f"teacher.url={fake.url}"] * option.startswith("ppo")
        code, _ = run(f"teacher.path={teacher}", *options, *served)
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert code == USAGE and f"error: {option}" in line and remedy in line


def table(**columns):
    rollouts = [rollout_of((3,), (5, 6, 7, 8, 9, 1), index=index) for index in range(2)]
    return Tokens(rollouts, torch.device("cpu"), {name: torch.tensor(values) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("metrics", "option"),
    [
        ({"masked/teacher": MAX_TEACHER * 1.1}, "teacher.path"),
        ({"masked/teacher": MAX_TEACHER * 0.9, "masked/teacher_1": MAX_FIRST + 0.01}, "teacher.path"),
        ({"masked/student": MAX_STUDENT * 1.1}, "model.path"),
        (
            {"masked/teacher": MAX_TEACHER * 0.9, "masked/teacher_4": MAX_FIRST, "masked/student": MAX_STUDENT, "masked/student_1": 0.9},
            None,
        ),
    ],
)
def test_bounds_of_the_masked_mass(metrics, option):
    overlap = Overlap(frozenset(range(20)), {}, {22: "<think>", 23: "</think>"})
    columns = {
        f"{role}_masked{end}": values for role in ("student", "teacher") for end, values in (("", [0.3, 0.1] * 6), ("_id", [23, 22] * 6))
    }
    problem = check_masses(metrics, table(**columns), overlap)
    assert (problem is None) is (option is None)
    if problem is not None:
        assert problem[0].startswith(option) and problem[0].index("'</think>' 15.00%") < problem[0].index("'<think>' 5.00%")
        assert "enable_thinking=false" in problem[1]


def test_completions_that_spell_a_token_of_the_teacher_are_counted():
    tokenizer = fast(BASE)
    overlap = models.check_same_ids(tokenizer, fast(with_tokens(BASE, "<think>")))
    spelled = tuple(tokenizer("so <think> it is")["input_ids"])
    rollouts = [rollout_of((3,), spelled), rollout_of((3,), (5, 6))]
    step = first_step.Step({}, {"masked/student": 0.0, "masked/teacher": 0.0}, Tokens(rollouts, torch.device("cpu")))
    (finding,) = first_step.check_masked(step, overlap, tokenizer)
    assert "1 of 2 completions" in finding.what
    assert first_step.check_masked(step, None, tokenizer) == []


def test_resuming_with_other_masked_ids_is_refused():
    stored = {"content": {"tokenizer": "a", "masked ids": "b"}, "prompts": 3}
    for content in ({"tokenizer": "a", "masked ids": "c"}, {"tokenizer": "a"}):
        with pytest.raises(ConfigError, match="masked ids changed"):
            check_content(stored, {"content": content, "prompts": 3}, PACKAGE, force=False)
