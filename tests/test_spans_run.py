"""Training with a teacher that has another tokenizer: against the ordinary path, against a plain reference, and through every verb."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from fake_vllm import ScoringServer, running
from safetensors.torch import load_file
from span_helpers import make_tokenizer, small_spans
from test_loop import run_until_stopped
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from training_helpers import SERVER, UNEVEN, make_trainer, untimed, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd import errors
from opd.api import from_options
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.data.arithmetic import rows
from opd.data.chat_template import ChatTemplate
from opd.data.prompts import Prompt
from opd.data.spans import Aligner, Alignment, Unscored
from opd.data.token_bytes import TokenBytes
from opd.errors import ConfigError, DataError
from opd.evaluation.sample_score import load_pair
from opd.report.tokens import by_span
from opd.train import main
from opd.training.checkpoint import Checkpoints
from opd.training.events import StepDone
from opd.training.identity import check_content
from opd.training.inputs import Given, load_prompts
from opd.training.loop import Trainer
from opd.training.spans import mean_advantage, span_problems

ASSETS = PACKAGE / "assets"
ROOT = Path(__file__).resolve().parent.parent
SPANS = ("experiment=debug", "device=cpu", "teacher.alignment=spans", "track.rollouts_per_step=3")


def span_trainer(folder: Path, **options: Any) -> Trainer:
    """Return a trainer whose teacher has other tokens and other prompts."""
    spans = small_spans()
    size = len(spans.aligner.teacher.pieces)
    trainer = make_trainer(folder, teacher=random_model(size, seed=2, hidden=24), spans=spans, **options)
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(2, size, (1 + index % 3,), generator=generator).tolist()) for index in range(len(trainer.prompts))]
    trainer.prompts = [replace(prompt, teacher_ids=own) for prompt, own in zip(trainer.prompts, ids, strict=True)]
    return trainer


def plain_logp(trainer: Trainer, model: torch.nn.Module, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
    """Return the next-token distributions at the completion's tokens."""
    return (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / trainer.config.temperature).log_softmax(-1)


def at(logp: torch.Tensor, ids: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    return sum((logp[offset, ids[offset]] for offset in range(start, stop)), torch.zeros(()))


def plain_lookahead(logp: torch.Tensor, token: int, own: TokenBytes, other: TokenBytes) -> torch.Tensor:
    """Return log(1 + p(longer tokens) / p(token)), over the tokens that the other tokenizer cuts where this one ends."""
    piece, total = own.pieces[token], logp[token].exp()
    for index, longer in enumerate(own.pieces):
        if piece and longer and longer != piece and longer.startswith(piece) and len(piece) in other.encode(longer.decode()).ends:
            total = total + logp[index].exp()
    return total.log() - logp[token]


# One step.


@pytest.mark.parametrize("options", [{}, {"ppo__reduction": "sequence", "ppo__loss_prefix": 9}, {"train__packing": True}])
def test_the_gradient_is_that_of_each_span_as_one_action(tmp_path: Path, options: dict[str, Any]) -> None:
    """Several micro-batches, chunks of the head of 7 rows, unequal lengths, spellings that are not canonical."""
    unclipped = {"ppo__advantage_clip": None, "ppo__importance_cap": None, "train__max_tokens_per_micro_batch": 60}
    trainer = span_trainer(tmp_path, **unclipped, **UNEVEN, **options)
    tokens = trainer.begin_step()
    assert len(tokens.slices) > 1
    weight_R, total = trainer.scoring.token_weights(tokens.rollouts)
    average = tokens.unscored = mean_advantage(tokens, None, trainer.accelerator)
    trainer.scoring.gradients(tokens, weight_R[tokens.rollout_N], total)
    gradients = {name: parameter.grad.clone() for name, parameter in trainer.student.named_parameters()}
    trainer.student.zero_grad()
    loss, sizes, reasons, corrected = torch.zeros(()), set(), set(), 0
    tokenizers = trainer.scoring.spans.aligner
    for rollout, weight in zip(tokens.rollouts, weight_R, strict=True):
        prompt, alignment = rollout.request.prompt, rollout.alignment
        logp, theirs = (
            plain_logp(trainer, model, *read)
            for model, read in (
                (trainer.student, (prompt.ids, rollout.completion)),
                (trainer.scoring.teacher.model, (prompt.teacher_ids, alignment.teacher_ids)),
            )
        )
        reasons |= {span.unscored for span in alignment.spans}
        trained = set(rollout.trained)
        before = torch.zeros(())
        for span in alignment.spans:
            if span.unscored is not None:
                places = trained.intersection(range(span.start, span.stop))
                loss = loss - weight / total * average * sum((logp[place, rollout.completion[place]] for place in places), torch.zeros(()))
                before = torch.zeros(())
                continue
            own = at(logp, rollout.completion, span.start, span.stop)
            last, teacher_last = rollout.completion[span.stop - 1], alignment.teacher_ids[span.teacher_stop - 1]
            ahead = plain_lookahead(theirs[span.teacher_stop - 1], teacher_last, tokenizers.teacher, tokenizers.student)
            ahead = ahead - plain_lookahead(logp[span.stop - 1], last, tokenizers.student, tokenizers.teacher)
            gap = at(theirs, alignment.teacher_ids, span.teacher_start, span.teacher_stop) - own + ahead - before
            loss = loss - weight / total * gap.detach() * own
            sizes.add((span.stop - span.start, span.teacher_stop - span.teacher_start))
            corrected += bool(ahead.abs() > 0.01) and bool(before.abs() > 0.01)
            before = ahead
    loss.backward()
    assert corrected > 3 and len(sizes) > 3 and {None, Unscored.not_canonical, Unscored.unsettled} <= reasons
    for name, parameter in trainer.student.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4), name


def test_neither_packing_nor_micro_batches_change_the_result(tmp_path: Path) -> None:
    results = []
    for options in ({}, {"train__packing": True}, {"train__max_tokens_per_micro_batch": 30}):
        trainer = span_trainer(tmp_path, ppo__steps=2, **UNEVEN, **options)
        trainer.train_step()
        results.append(weights(trainer))
    assert all(torch.allclose(results[0], other, atol=1e-5) for other in results[1:])


def test_the_lookahead_of_a_later_inner_step_is_that_before_the_update(tmp_path: Path) -> None:
    found = []
    for steps in (1, 2):
        trainer = span_trainer(tmp_path / str(steps), ppo__steps=steps, **UNEVEN)
        found.append(trainer.train_step().tokens.columns["lookahead"])
    assert torch.equal(*found) and bool(found[0].any())


def test_metrics_say_how_well_the_tokens_fit_and_why_some_are_not_scored(tmp_path: Path) -> None:
    done = span_trainer(tmp_path, **UNEVEN).train_step()
    spans = [span for rollout in done.tokens.rollouts for span in rollout.alignment.spans]
    total = sum(len(rollout.completion) for rollout in done.tokens.rollouts)
    scored = [span for span in spans if span.unscored is None]
    size = sum(span.stop - span.start for span in scored)
    for reason in Unscored:
        expected = sum(span.stop - span.start for span in spans if span.unscored is reason) / total
        assert done.metrics[f"spans/{reason.value}"] == pytest.approx(expected)
    assert done.metrics["spans/not_canonical"] > 0 and done.metrics["spans/not_canonical_completions"] > 0
    assert done.metrics["spans/tokens"] == pytest.approx(size / len(scored)) and size > len(scored)
    assert done.metrics["spans/one_to_one"] == pytest.approx(sum(span.is_one_to_one for span in scored) / size)
    columns = done.tokens.columns
    assert int((columns["span"] >= 0).sum()) == size
    gap = float((columns["reverse_kl"])[columns["span"] >= 0].sum())
    assert done.metrics["reverse_kl"] == pytest.approx(gap / size, rel=1e-4)
    assert done.metrics["teacher_nll"] == pytest.approx(-float(columns["teacher_logp"].sum()) / size, rel=1e-4)
    is_scored = columns["span"] >= 0
    average = float(columns["advantage"][is_scored].mean())
    assert average < -0.1
    assert torch.allclose(columns["advantage"][~is_scored], torch.tensor(done.tokens.unscored))
    assert done.tokens.unscored == pytest.approx(average, rel=0.2)  # the lookahead of the student is left out


@pytest.mark.parametrize("options", [{"sampling__truncated": "drop", "ppo__loss_prefix": 9}, {**SERVER, "ppo__loss_prefix": 3}])
def test_each_completion_is_aligned_once_while_others_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    """What a batch of the sampler masks, of which it may be the shortest rollout that stays, decides nothing that is trained."""
    trainer, aligned, align = span_trainer(tmp_path, sampling__batch_size=4, **{**UNEVEN, **options}), [], Aligner.align

    def counted(self: Aligner, completion: Sequence[int], *rest: Any) -> Alignment:
        aligned.append(completion)
        return align(self, completion, *rest)

    monkeypatch.setattr(Aligner, "align", counted)
    expected: list[tuple[int, ...]] = []
    for _ in range(2):
        tokens = trainer.begin_step()
        trainer.wait_for_ahead()
        expected += [rollout.completion for rollout in tokens.rollouts]
        for rollout in tokens.rollouts:
            alone = align(trainer.scoring.spans.aligner, rollout.completion, rollout.truncated, len(rollout.request.prompt.teacher_ids))
            assert rollout.alignment == (alone if rollout.mask is None else alone.masked(rollout.mask))
        assert any(rollout.mask is not None for rollout in tokens.rollouts)
    ahead = [] if trainer.ahead is None else [rollout.completion for rollout in trainer.ahead.result()]
    assert sorted(aligned) == sorted(expected + ahead)


def test_resume_between_inner_steps_is_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"train__max_steps": 2, "checkpoint__every": 9, "ppo__steps": 2, "ppo__loss_prefix": 9, **UNEVEN}
    straight, stopped, resumed = (span_trainer(tmp_path / folder, **options) for folder in ("straight", "stopped", "stopped"))
    steps = [event for event in straight.run() if isinstance(event, StepDone)]
    run_until_stopped(stopped, monkeypatch, 2)
    checkpoint = stopped.checkpoints.newest()
    assert checkpoint.moment == (0, 1)
    resumed.resume(checkpoint)
    again = [event for event in resumed.run() if isinstance(event, StepDone)]
    assert torch.equal(weights(resumed), weights(straight))
    assert [untimed(step) for step in again] == [untimed(step) for step in steps]


def test_a_step_of_which_nothing_is_scored_is_taken_without_the_teacher(tmp_path: Path) -> None:
    trainer = span_trainer(tmp_path)
    spans = trainer.scoring.spans
    trainer.scoring.spans = replace(spans, aligner=replace(spans.aligner, limit=0))
    before = weights(trainer)
    done = trainer.train_step()
    assert done.metrics["spans/unmapped"] > 0.5 and "reverse_kl" not in done.metrics
    assert torch.equal(before, weights(trainer))
    assert len(span_problems(done.metrics)) >= 1


# Whole runs.


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few rows of the bundled task, as options: rendering all of them takes seconds."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows("train")[:40]))
    return f"data.source=jsonl data.train_path={file} data.eval_path={file} data.prompt=prompt data.answer=answer"


@pytest.fixture(scope="module")
def ordinary(sums: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the student's ids. The epsilon keeps Adam from making a full step of a rounding error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ordinary"))
        assert main([*SPANS, *sums.split(), "optim.eps=1e-3", "teacher.alignment=ids", "name=run"]) == 0
        return Path("runs/run").resolve()


def test_equal_tokenizers_through_spans_are_bitwise_the_ordinary_path(ordinary: Path, sums: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SPANS, *sums.split(), "optim.eps=1e-3", "name=run"]) == 0
    one, other = tensors(ordinary), tensors(Path("runs/run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for before, after in zip(logged(ordinary), logged(Path("runs/run")), strict=True):
        assert after["spans/one_to_one"] == 1 and after["spans/tokens"] == 1
        assert all(after[name] == before[name] for name in ("loss", "reverse_kl", "advantage", "cut", "teacher_nll", "optim/grad_norm"))


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled teacher with its ids of bytes in another order."""
    folder = tmp_path_factory.mktemp("permuted")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-teacher")
    vocabulary = {token: int(order[index]) for token, index in tokenizer.get_vocab().items() if index < 256}
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "extra_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]}
    copy = type(tokenizer)(vocab=vocabulary, merges=[], unk_token=None, **special)
    copy.chat_template = tokenizer.chat_template
    copy.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-teacher", dtype=torch.float32)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[order] = rows[:256].clone()
    model.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("27")["input_ids"] != tokenizer("27")["input_ids"]
    return folder


def test_a_copy_of_the_teacher_with_other_ids_teaches_the_same(
    ordinary: Path, permuted: Path, sums: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SPANS, *sums.split(), "optim.eps=1e-3", f"teacher.path={permuted}", "name=run"]) == 0
    one, other = tensors(ordinary), tensors(Path("runs/run"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    evaluations = [json.loads(line) for line in Path("runs/run/evaluations.jsonl").read_text().splitlines()]
    assert {line["model"]: line["rewards"]["mean"] for line in evaluations}["teacher"] == 1  # it generates in its own tokens
    assert all(line["kl"] is None for line in evaluations)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher whose tokens are pairs of digits too, with a chat template and an end of its own."""
    folder = tmp_path_factory.mktemp("stranger")
    tokenizer = pairs_tokenizer()
    tokenizer.save_pretrained(folder)
    random_llama(len(tokenizer)).save_pretrained(folder)
    return folder


def random_llama(size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, **shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.lm_head.weight.data *= 4  # a served teacher that is nearly uniform is refused
    return model


def pairs_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer in which two digits are one token, but for those of a question."""
    digits = "0123456789"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<turn>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vocabulary |= {a + b: len(vocabulary) + 10 * int(a) + int(b) for a in digits for b in digits}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(a, b) for a in digits for b in digits]))
    of_question = pre_tokenizers.Split(Regex(r"\d(?=\d?[+=])"), "isolated")
    from_the_left = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [of_question, from_the_left, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    pairs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<turn>", padding_side="left")
    pairs.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<turn>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return pairs


def test_a_stranger_teaches_through_every_verb(stranger: Path, sums: str, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = (*SPANS, *sums.split(), f"teacher.path={stranger}", "train.max_steps=2", "eval.limit=4")
    assert main([*words, "name=run"]) == 0
    shown = capfd.readouterr().out
    assert "'<|end|>' for the student, '<turn>' for the teacher" in shown.replace("\n", "")
    for line in logged(Path("runs/run")):
        assert line["spans/tokens"] > 1 and 0 < line["spans/one_to_one"] < 1
    stored = [json.loads(line) for line in Path("runs/run/rollouts/step_000001.jsonl").read_text().splitlines()]
    for record in stored:
        scored = [index for index, following in enumerate(record["span"]) if following == 0]
        assert [index for index, logp in enumerate(record["teacher_logp"]) if logp is not None] == scored
    assert cli.main(["report", "runs/run"]) == 0
    assert cli.main(["eval", "runs/run", "--json"]) == 0
    output = capfd.readouterr().out
    task = json.loads(output[output.index("{") :])["tasks"]["evaluation"]
    assert set(task["models"]) == {"model", "baseline", "teacher"} and task["models"]["model"]["kl"] is None
    assert cli.main(["sample", "runs/run", "--prompt", "12 and 34"]) == 0
    assert cli.main(["score", "runs/run", "--text", "12 and 34"]) == errors.USAGE
    assert "teacher.alignment=spans" in capfd.readouterr().err


def test_a_stranger_teaches_with_given_completions_an_anchor_and_several_datasets(
    stranger: Path, sums: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    mix = ["data.mix.one.weight=1", "data.mix.two.weight=1", "data.completion=answer", "train.given_share=0.5", "ppo.reference_coef=0.1"]
    assert (
        main([*SPANS, *sums.split(), *mix, f"teacher.path={stranger}", "train.max_steps=2", "eval.limit=2", "eval.steps=0", "name=run"])
        == 0
    )
    for line in logged(Path("runs/run")):
        assert line["given/nll"] > 0 and line["spans/tokens"] >= 1 and "reference_kl" in line
        assert line["data/one/reverse_kl"] != line["data/two/reverse_kl"]


def test_a_served_teacher_with_other_tokens_scores_like_the_local_one(stranger: Path, sums: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        *SPANS,
        *sums.split(),
        f"teacher.path={stranger}",
        "train.max_steps=2",
        "eval.limit=4",
        "ppo.temperature=1",
        "eval.steps=0",
        "track.rollouts_per_step=8",
    )
    with monkeypatch.context() as patch:  # servers do not send what the correction needs
        patch.setattr("opd.training.spans.longer_tokens", lambda own, other: [[] for _ in own.pieces])
        assert main([*words, "name=local"]) == 0
    model = AutoModelForCausalLM.from_pretrained(stranger, dtype=torch.float32).eval()
    with running(ScoringServer(model, AutoTokenizer.from_pretrained(stranger))) as fake:
        assert main([*words, f"teacher.url={fake.url}", "name=served"]) == 0
    one, other = tensors(Path("runs/local")), tensors(Path("runs/served"))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    # Each text that is sent is a question with a completion of the run, in the teacher's tokens; it is begun while others are sampled.
    stored = [json.loads(line) for file in Path("runs/served/rollouts").iterdir() for line in file.read_text().splitlines()]
    completions = [record["completion"].replace("<|end|>", "<turn>") for record in stored]
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    prompts = [body["prompt"] for body in fake.bodies("/v1/completions") if "prompt_logprobs" in body]
    prompts = [ids for ids in prompts if ids[0] != tokenizer.eos_token_id]  # without the canary
    sent = {tokenizer.decode(ids).rpartition("assistant: ")[2] for ids in prompts}
    assert len(stored) == 16 and sent - {""} and all(any(own.startswith(text) for own in completions) for text in sent)


def test_a_completion_of_which_nothing_is_scored_is_left_out_of_the_comparison(
    stranger: Path, sums: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(stranger, dtype=torch.float32).eval()
    with running(ScoringServer(model, AutoTokenizer.from_pretrained(stranger))) as fake:
        words = (*SPANS, *sums.split(), f"teacher.path={stranger}", f"teacher.url={fake.url}", "train.max_steps=1", "eval.limit=2")
        assert main([*words, "sampling.max_new_tokens=3", "eval.steps=0", "name=run"]) == 0  # three digits are cut off, and unsettled
    assert 0 < logged(Path("runs/run"))[0]["spans/unsettled"] < 1


def test_the_teacher_answers_in_all_of_its_own_tokens(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", "model=tiny", "teacher=tiny_pairs", "data=arithmetic", "device=cpu", "sampling.temperature=0.1", "--json"]
    assert cli.main([*words, "--prompt", "27+85="]) == 0
    assert '"211"' in capfd.readouterr().out
    pair = {"model.path": "bundled:tiny-student", "teacher.path": "bundled:tiny-pairs", "teacher.alignment": "spans", "device": "cpu"}
    models = load_pair(from_options(pair))
    assert models.loaded["teacher"].sampler(0, models.ids, 0).spec.vocabulary == 358  # pairs of digits have ids that the student lacks
    assert models.loaded["student"].sampler(0, models.ids, 0).spec.vocabulary == 261
    assert cli.main(["eval", *words[1:5], "eval=arithmetic", "eval.limit=8", "--json"]) == 0
    output = capfd.readouterr().out
    assert json.loads(output[output.index("{") :])["tasks"]["evaluation"]["models"]["teacher"]["mean"] == 1


def test_a_resumed_run_must_have_the_same_tokenizer_of_the_teacher(stranger: Path, sums: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stranger, "other")
    file = Path("other/tokenizer.json")
    file.write_text(file.read_text().replace("{1,2}", "{1,1}"))  # single digits in answers; prompts stay
    states = []
    for path in (stranger, Path("other").resolve()):
        assert main([*SPANS, *sums.split(), f"teacher.path={path}", "train.max_steps=1", "eval.limit=2", f"name={path.name}"]) == 0
        states.append(Checkpoints(Path("runs") / path.name / "checkpoints", 1, keep_best=False).newest().state)
    with pytest.raises(ConfigError, match="another run: the teacher's tokenizer changed"):
        check_content(*states, Path("run"), force=False)


def test_a_teacher_whose_tokenizer_changes_the_runs_texts_is_refused_in_one_line(
    sums: str, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer("lower case")
    tokenizer.save_pretrained("teacher")
    random_llama(len(tokenizer)).save_pretrained("teacher")
    assert main([*SPANS, *sums.split(), "teacher.path=./teacher"]) == errors.USAGE
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "teacher.alignment" in line]
    assert "teacher.path changes" in line


def test_doctor_says_how_well_the_tokens_fit(stranger: Path, sums: str, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["doctor", *SPANS, *sums.split(), f"teacher.path={stranger}", "--json", "--prompts", "0"]
    cli.main(words)
    report = json.loads(capfd.readouterr().out)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["tokenizers"]["status"] == "ok" and "256 of the student's 256 texts" in found["tokenizers"]["what"]
    assert found["spans"]["status"] == "ok" and "tokens a span" in found["spans"]["what"]
    assert found["teacher = student"]["status"] == "ok"
    assert "<turn>" in found["end of sequence"]["what"]
    assert report["rendered"]["teacher"].startswith("user: ")


def test_too_few_scored_tokens_and_odd_spellings_are_problems() -> None:
    good = dict.fromkeys((f"spans/{reason.value}" for reason in Unscored), 0.05)
    assert span_problems(good) == [] == span_problems({})
    assert len(span_problems({**good, "spans/unsettled": 0.4})) == 1
    assert len(span_problems({**good, "spans/not_canonical": 0.3})) == 1
    assert len(span_problems({**good, "spans/not_canonical": 0.6})) == 2


# Prompts.


def test_the_teacher_reads_the_messages_in_its_own_template_and_ids_alone_are_refused(stranger: Path) -> None:
    from opd.training.spans import make_spans

    student, teacher = AutoTokenizer.from_pretrained(ASSETS / "tiny-student"), AutoTokenizer.from_pretrained(stranger)
    named = {"data.chat_template_kwargs": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}}
    options = {"data.source": "python", "data.path": None, "teacher.alignment": "spans", "teacher.system": "Add.", **named}
    config = from_options({**options, "data.prompt": "prompt", "data.answer": "answer", "data.answer_after": None})
    (prompt,), _ = load_prompts(config, student, Given(train_rows=[{"prompt": "12+34=", "answer": "64"}], eval_rows=[]), teacher)
    assert student.decode(prompt.ids) == prompt.text  # the named template is the student's
    assert teacher.decode(prompt.teacher_ids) == f"system: Add.<turn>user: {prompt.text}<turn>assistant: "
    assert ChatTemplate(teacher, {}).turn_end() == teacher.eos_token_id
    with pytest.raises(DataError, match=r"row 3: teacher\.alignment=spans: a prompt given as ids"):
        make_spans(config, student, teacher, ((257,), (1,)), [Prompt(3, (5, 6), "a")], None, (400, 400), torch.device("cpu"))


# The report.


def test_the_token_view_shows_a_span_as_one() -> None:
    record = {
        "tokens": ["a", "b", "c", "d", "e"],
        "student_logp": [-1.0, -2.0, -3.0, -4.0, None],
        "teacher_logp": [-0.5, None, -6.0, None, None],
        "span": [0, 1, 0, -1, None],
    }
    spread, texts = by_span(record)
    assert texts == [None, "bc", "bc", None, None]
    assert spread["student_logp"] == [-1.0, -5.0, -5.0, -4.0, None]
    assert spread["teacher_logp"] == [-0.5, -6.0, -6.0, None, None]


# A pair that learns.


def learn(options: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let the bundled student learn from the bundled teacher with other tokens. Return the summary and the metrics."""
    words = ("experiment=tiny", "device=cpu", "teacher=tiny_pairs", "sampling.max_new_tokens=16", "eval.limit=400", "name=run")
    assert main([*words, *options]) == 0
    return json.loads(Path("runs/run/summary.json").read_text()), logged(Path("runs/run"))


@pytest.mark.slow
@pytest.mark.long
def test_a_student_of_characters_learns_from_a_teacher_that_writes_pairs_of_digits(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    summary, metrics = learn(["train.max_steps=60", "eval.steps=0"])
    assert summary["reward_before"] < 0.65 and summary["reward_teacher"] > 0.98
    assert summary["reward_after"] > summary["reward_before"] + 0.15
    assert metrics[-1]["spans/tokens"] > 1.2 and metrics[-1]["spans/one_to_one"] < 0.8
    assert metrics[-1]["entropy"] < 1.5  # it does not learn to write what is not scored


@pytest.mark.long
def test_it_comes_near_the_teachers_reward(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    summary, _ = learn(["train.max_steps=400", "eval.steps=100"])
    gap = summary["reward_teacher"] - summary["reward_before"]
    assert summary["reward_after"] > summary["reward_before"] + 0.9 * gap


@pytest.mark.long
def test_two_processes_and_fsdp2_train_as_one_process(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "device=cpu", "teacher=tiny_pairs", "train.max_steps=2", "eval.steps=0", "eval.limit=4", "ppo.steps=2"]
    words += ["sampling.max_new_tokens=10", "optim.eps=1e-3", "optim.schedule=constant"]
    assert main([*words, "train.batch_size=4", "name=one"]) == 0
    fsdp2 = ["accelerate", "launch", "--config_file", str(ROOT / "scripts" / "accelerate" / "fsdp2_cpu2.yaml"), "-m", "opd.train"]
    for name, command in (("two", ["torchrun", "--nproc_per_node", "2", "-m", "opd.train"]), ("fsdp2", fsdp2)):
        subprocess.run([*command, *words, "train.batch_size=2", f"name={name}"], check=True, timeout=300)
        one, other = tensors(Path("runs/one")), tensors(Path("runs") / name)
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
