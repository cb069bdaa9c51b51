"""Given completions and the anchor: rows that take a text, gradients, metrics, resume; the teacher's completions in a file."""

import copy
import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import ScoringServer, running
from test_step import old_logp
from training_helpers import SERVER, VOCABULARY, ServerSampler, make_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import errors
from opd.cli import main as cli
from opd.config.compose import PACKAGE
from opd.config.options import DataConfig, Device, ModelConfig, Source, TeacherConfig, TrainConfig
from opd.config.schema import Config
from opd.data.given import check_given, given_rollout, takes_given, warm_start
from opd.data.prompts import Encoder, Prompt, encode_rows
from opd.data.rollouts import FinishReason, Request
from opd.errors import ConfigError, DataError
from opd.evaluation import completions as completions_file
from opd.evaluation.completions import Written, begin, why_left_out
from opd.evaluation.texts import named_columns
from opd.models.load import load_tokenizer
from opd.objective import forward_kl, jsd, reverse_kl
from opd.report.tokens import token_view_data
from opd.runs.reader import open_run
from opd.teachers import LocalTeacher
from opd.training.checkpoint import read
from opd.training.identity import check_same, identity
from opd.training.inputs import Given

TINY = ["experiment=debug", "device=cpu", "eval.kl_prompts=0", "eval.limit=4"]
GIVEN = ((5, 6, 7, 1), (8, 1))


def given_trainer(folder, share=0.5, reference=False, **options):
    """Return a trainer whose prompts have two given completions each, and maybe an anchor."""
    options = {"data__completion": "text", "train__given_share": share, **options}
    trainer = make_trainer(folder, **options)
    trainer.prompts = [replace(prompt, given=GIVEN) for prompt in trainer.prompts]
    if reference:
        trainer.scoring.reference = LocalTeacher(copy.deepcopy(trainer.student).requires_grad_(False), VOCABULARY)
    return trainer


def gradients(trainer, tokens):
    weight_R, total = trainer.scoring.token_weights(tokens.rollouts)
    trainer.scoring.gradients(tokens, weight_R[tokens.rollout_N], total)
    found = {name: parameter.grad.clone() for name, parameter in trainer.student.named_parameters()}
    trainer.student.zero_grad()
    return found


def is_gradient_of(loss, trainer, found):
    loss.backward()
    return all(torch.allclose(found[name], weight.grad, atol=1e-5, rtol=1e-4) for name, weight in trainer.student.named_parameters())


# Which rows.


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.7, 1.0])
def test_the_share_of_any_rows_in_succession_is_given_up_to_one_row(share):
    chosen = [[takes_given(seed, row, share) for row in range(400)] for seed in range(9)]
    for start, count in ((0, 400), (7, 60), (133, 12)):
        assert abs(sum(chosen[3][start : start + count]) - share * count) <= 1
    assert share in (0, 1) or any(rows != chosen[0] for rows in chosen), "another seed may choose others"


def test_processes_share_the_given_rows_that_one_process_would_have(tmp_path):
    one = given_trainer(tmp_path, 0.3, train__batch_size=4)
    two = [given_trainer(tmp_path, 0.3, train__batch_size=2) for _ in range(2)]
    for rank, trainer in enumerate(two):
        trainer.strategy.accelerator = SimpleNamespace(num_processes=2, process_index=rank)
    for step in range(5):
        rows = [list(trainer.batch(step)[1]) for trainer in two]
        assert rows[0] + [4 + row for row in rows[1]] == list(one.batch(step)[1])


def test_a_share_counts_from_its_step_on_and_prompts_without_a_text_are_sampled(tmp_path):
    trainer = given_trainer(tmp_path, {0: 1.0, 2: 0.5, 3: 0})
    assert [len(trainer.batch(step)[1]) for step in range(5)] == [6, 6, 3, 0, 0]
    trainer.prompts = [replace(prompt, given=()) if prompt.sample_id % 2 else prompt for prompt in trainer.prompts]
    assert not any(rollout.given for rollout in trainer.sample_step(0) if rollout.request.prompt.sample_id % 2)


def test_texts_of_a_prompt_take_turns_and_long_ones_are_cut_off_as_sampled_ones():
    prompt = Prompt(0, (3,), "", given=GIVEN)
    assert [given_rollout(Request(prompt, epoch, attempt), 8).completion for epoch, attempt in ((0, 0), (0, 1), (1, 0))] == [
        GIVEN[0], GIVEN[1], GIVEN[1],
    ]  # fmt: skip
    cut = given_rollout(Request(prompt), 3)
    assert cut.completion == GIVEN[0][:3] and cut.finish_reason is FinishReason.length and cut.given
    assert given_rollout(Request(prompt), 4).finish_reason is FinishReason.stop


# The texts.


def completions(tokenizer, value, prompt="27+85=", **options):
    config = DataConfig(source=Source.jsonl, train_path="x", prompt="prompt", completion="text", **options)
    (encoded,) = encode_rows([{"prompt": prompt, "answer": "1", "text": value}], Encoder(tokenizer, config), "training")
    return encoded


def tiny_tokenizer():
    return load_tokenizer(SimpleNamespace(path="bundled:tiny-student", revision=None, gguf_file=None, trust_remote_code=False), "model")


def test_a_text_continues_the_prompt_and_ends_as_the_chat_template_ends_a_turn():
    tokenizer = tiny_tokenizer()
    ends = tokenizer.convert_tokens_to_ids("<|end|>")
    prompt = completions(tokenizer, "211")
    assert tokenizer.decode(prompt.ids + prompt.given[0]) == "<|user|>27+85=<|end|><|assistant|>211<|end|>"
    assert prompt.given[0][-1] == ends
    assert completions(tokenizer, "211<|end|>").given == prompt.given, "an end in the text is not doubled"
    assert completions(tokenizer, ["211", None, "", "3"]).given == (prompt.given[0], completions(tokenizer, "3").given[0])
    assert completions(tokenizer, None).given == ()
    config = DataConfig(source=Source.jsonl, train_path="x", prompt="prompt", completion="text")
    (evaluated,) = encode_rows([{"prompt": "1", "answer": "1"}], Encoder(tokenizer, config), "evaluation")
    assert evaluated.given == (), "only training prompts have given completions"


def test_without_a_chat_template_the_text_follows_the_prompt_and_ends_with_the_tokenizers_end():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    prompt = completions(tokenizer, "211")
    assert tokenizer.decode(prompt.ids + prompt.given[0]) == f"27+85=211{tokenizer.eos_token}"


@pytest.mark.parametrize(
    ("word", "mistake", "remedy"),
    [
        ("train.given_share=0.5", "train.given_share", "data.completion=COLUMN"),
        ("train.given_share=1.5", "train.given_share", "{0: 1.0, 50: 0.25, 100: 0}"),
        ("train.given_share={5: 1.0}", "train.given_share", "{0: 1.0, 50: 0.25, 100: 0}"),
        ("train.given_share={0: true}", "train.given_share", "{0: 1.0, 50: 0.25, 100: 0}"),
        ("ppo.reference_coef=-1", "ppo.reference_coef", "at least 0"),
        ("data.completion=none", "data.completion=none", "data.completion=null"),
    ],
)
def test_mistakes_are_one_line_with_the_option_and_its_remedy(word, mistake, remedy, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY, word]) in (errors.USAGE, errors.DATA)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("opd: error")]
    assert line.startswith(f"opd: error: {mistake}") and remedy in line


def test_what_is_not_trained_on_as_it_stands_is_logged(tmp_path, caplog):
    config = given_trainer(tmp_path, sampling__max_new_tokens=3).config
    check_given([Prompt(0, (3,), "", given=GIVEN), Prompt(1, (3,), "")], config)
    missing, long = (record.getMessage() for record in caplog.records)
    assert "1 of 2" in missing and "1 of 2" in long and "sampling.max_new_tokens=3" in long
    with pytest.raises(DataError, match=r"data\.completion=text"):
        check_given([Prompt(1, (3,), "")], config)
    with pytest.raises(DataError, match=r"data\.completion=text"):
        completions(tiny_tokenizer(), 3)


# Gradients.


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_sampled_learns_a_given_text_by_its_log_likelihood_without_weights_and_clips(tmp_path, reduction):
    options = {"ppo__advantage_clip": 1e-3, "ppo__importance_cap": 1e-3, "ppo__clip_eps": 1e-6, "ppo__steps": 2}
    trainer = given_trainer(tmp_path, 1.0, ppo__reduction=reduction, train__max_tokens_per_micro_batch=9, optim__lr=5e-2, **options)
    tokens = trainer.begin_step()
    assert len(tokens.slices) > 1
    for _ in range(2):  # also where the weights are no longer those of the first pass
        losses = [-old_logp(trainer, trainer.student, rollout) for rollout in tokens.rollouts]
        loss = torch.cat(losses).mean() if reduction == "token" else torch.stack([each.mean() for each in losses]).mean()
        assert is_gradient_of(loss, trainer, gradients(trainer, tokens))
        trainer.student.zero_grad()
        trainer.inner_step(tokens)


@pytest.mark.parametrize("estimator", ["exact", "topk"])
@pytest.mark.parametrize(("name", "on_sampled", "on_given"), [
    ("reverse_kl", reverse_kl, forward_kl), ("forward_kl", forward_kl, forward_kl), ("jsd", jsd, jsd),
])  # fmt: skip
def test_exact_has_the_same_divergence_on_given_rows_but_never_the_reverse_kl(tmp_path, estimator, name, on_sampled, on_given):
    options = {"ppo__estimator": estimator, "ppo__divergence": name, **({"ppo__k": VOCABULARY} if estimator == "topk" else {})}
    trainer = given_trainer(tmp_path, 0.5, **options)
    tokens = trainer.begin_step()
    assert tokens.given_N.any() and not tokens.given_N.all()
    found, losses = gradients(trainer, tokens), []
    for rollout in tokens.rollouts:
        ids = rollout.request.prompt.ids + rollout.completion
        positions = slice(len(rollout.request.prompt.ids) - 1, -1)
        student, teacher = (
            (model(torch.tensor([ids])).logits[0, positions] / trainer.config.temperature).log_softmax(-1)
            for model in (trainer.student, trainer.scoring.teacher.model)
        )
        divergence = on_given if rollout.given else on_sampled
        losses.append(divergence(student, teacher.detach(), *([0.5] if name == "jsd" else [])))
    assert is_gradient_of(torch.cat(losses).mean(), trainer, found)


@pytest.mark.parametrize("estimator", ["sampled", "exact", "topk"])
def test_the_anchor_is_the_kl_to_the_start_on_sampled_rows_alone(tmp_path, estimator):
    own = {"sampled": {"ppo__importance_cap": None}, "exact": {}, "topk": {"ppo__k": 4}}[estimator]
    options = {"ppo__estimator": estimator, "ppo__reference_coef": 0.3, **own}
    trainer = given_trainer(tmp_path, 0.5, reference=True, optim__lr=5e-2, **options)
    assert abs(trainer.train_step().metrics["reference_kl"]) < 1e-5, "the student is at its start"
    tokens = trainer.begin_step()
    found = gradients(trainer, tokens)
    plain, trainer.config.ppo.reference_coef = trainer.scoring, 0.0
    start, plain.reference, tokens.slices = plain.reference, None, []
    with plain.scorers_ready():
        plain.score_slices(tokens)
    added = {name: value - gradients(trainer, tokens)[name] for name, value in found.items()}
    losses = []
    for rollout in (rollout for rollout in tokens.rollouts if not rollout.given):
        prompt, ids = rollout.request.prompt.ids, torch.tensor([rollout.request.prompt.ids + rollout.completion])
        if estimator == "sampled":
            logp, reference = (old_logp(trainer, model, rollout) for model in (trainer.student, start.model))
            losses.append((logp - reference).detach() * logp)
        else:
            student, reference = (
                (model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1) for model in (trainer.student, start.model)
            )
            losses.append(reverse_kl(student, reference.detach()))
    total = sum(len(rollout.completion) for rollout in tokens.rollouts)
    assert is_gradient_of(0.3 * torch.cat(losses).sum() / total, trainer, added)


@pytest.mark.parametrize("options", [{}, {"ppo__estimator": "exact"}])
def test_micro_batches_and_packing_do_not_change_given_rows_and_anchor(tmp_path, options):
    results = []
    for cut in ({}, {"train__max_tokens_per_micro_batch": 9}, {"train__packing": True}):
        trainer = given_trainer(tmp_path, 0.5, reference=True, ppo__reference_coef=0.3, ppo__steps=2, **options, **cut)
        trainer.train_step()
        results.append(weights(trainer))
    assert torch.allclose(results[0], results[1], atol=1e-5) and torch.allclose(results[0], results[2], atol=1e-5)


# Metrics.


def test_metrics_of_the_students_completions_leave_given_ones_out(tmp_path):
    done = given_trainer(tmp_path, 0.5).train_step()
    tokens, metrics = done.tokens, done.metrics
    own = [rollout for rollout in tokens.rollouts if not rollout.given]
    assert len(own) == 3 and metrics["given/rollouts"] == 3
    assert metrics["length"] == sum(len(rollout.completion) for rollout in own) / 3
    assert metrics["finish/stop"] + metrics["finish/length"] == 3
    assert metrics["engine_gap"] < 1e-5, "given completions have no log-probs of a sampler"
    columns = [tokens.of_rollout(index) for index, rollout in enumerate(tokens.rollouts) if not rollout.given]
    for name in ("reverse_kl", "entropy"):
        assert math.isclose(metrics[name], torch.cat([column[name] for column in columns]).mean(), rel_tol=1e-5)
    given = torch.cat([tokens.of_rollout(index)["logp"] for index, rollout in enumerate(tokens.rollouts) if rollout.given])
    assert math.isclose(metrics["given/nll"], -given.mean(), rel_tol=1e-5)
    assert sum(done.by_position["tokens"]) == sum(len(rollout.completion) for rollout in own)
    assert sum(done.by_position["ends"]) == 3


def test_a_step_of_given_completions_alone_samples_nothing_and_has_no_metrics_of_sampling(tmp_path, monkeypatch):
    trainer = given_trainer(tmp_path, 1.0, train__max_steps=2)
    monkeypatch.setattr(trainer.sampler, "sample", None)
    done = [event for event in trainer.run() if hasattr(event, "metrics")]
    assert len(done) == 2 and all("reverse_kl" not in event.metrics and event.metrics["given/nll"] > 0 for event in done)
    assert done[1].metrics["given/nll"] < done[0].metrics["given/nll"]


def test_rewards_compare_sampled_completions_alone(tmp_path):
    class Judge:
        def judge(self, rollouts):
            assert not any(rollout.given for rollout in rollouts)
            return [float(index) for index in range(len(rollouts))]

    trainer = given_trainer(tmp_path, 1 / 3, sampling__n=3, ppo__reward_coef=0.5)
    trainer.evaluator = Judge()
    bonus = trainer.begin_step().bonus_R.view(3, 3)
    assert all(sorted(row) == [-0.5, 0.0, 0.5] for row in bonus.tolist())


def test_resume_inside_a_schedule_is_bitwise(tmp_path):
    options = {"train__max_steps": 4, "ppo__steps": 2, "checkpoint__every": 1, "checkpoint__keep_last": 9, "ppo__reference_coef": 0.2}
    share = {0: 1.0, 2: 0.5, 3: 0}
    straight = given_trainer(tmp_path, share, reference=True, **options)
    list(straight.run())
    for step in range(1, 4):
        resumed = given_trainer(tmp_path, share, reference=True, **options)
        resumed.resume(read(straight.checkpoints.path(step)))
        for _ in range(step, 4):
            resumed.train_step()
        assert torch.equal(weights(resumed), weights(straight))


def test_resume_between_inner_steps_keeps_given_rows(tmp_path):
    options = {"ppo__steps": 2, "ppo__reference_coef": 0.2}
    straight, stopped, resumed = (given_trainer(tmp_path / name, reference=True, **options) for name in "abc")
    straight.train_step()
    stopped.tokens = stopped.begin_step()
    stopped.inner_step(stopped.tokens)
    stopped.save(needed=True)
    resumed.resume(stopped.checkpoints.newest())
    assert [rollout.given for rollout in resumed.tokens.rollouts] == [rollout.given for rollout in stopped.tokens.rollouts]
    done = resumed.train_step()
    assert torch.equal(weights(resumed), weights(straight)) and done.metrics["given/rollouts"] == 3


def test_a_checkpoint_from_before_there_were_given_completions_is_of_the_same_run(tmp_path):
    config = given_trainer(tmp_path, 0.0).config
    now = identity(config, SimpleNamespace(num_processes=1), Given())
    old = copy.deepcopy(now)
    del old["config"]["train"]["given_share"], old["config"]["ppo"]["reference_coef"]
    assert check_same(old, now, tmp_path, force=False) == []
    config.train.given_share = 0.5
    with pytest.raises(ConfigError, match=r"train\.given_share was 0"):
        check_same(old, identity(config, SimpleNamespace(num_processes=1), Given()), tmp_path, force=False)


def test_with_lag_1_given_rows_are_sampled_ahead_and_stored(tmp_path):
    trainer = given_trainer(tmp_path, 0.5, **SERVER)
    trainer.sampler = ServerSampler(trainer)
    trainer.begin_step()
    assert [rollout.given for rollout in trainer.ahead.result()].count(True) == 3
    stored = trainer.sampled_ahead()
    assert stored["given"].tolist() == [rollout.given for rollout in trainer.ahead.result()]


# Runs and the teacher's texts in a file.


def test_a_run_with_a_schedule_and_an_anchor_resumes_in_the_middle_with_the_same_result(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = ["data.completion=answer", "train.given_share={0: 1.0, 2: 0.5, 4: 0}", "ppo.reference_coef=0.1", "eval.steps=0"]
    assert cli.main(["train", *TINY, *options, "name=straight"]) == errors.OK
    lines = open_run(Path("runs/straight")).metrics
    assert [line.get("given/rollouts") for line in lines] == [8, 8, 4, 4, None, None]
    run = open_run(Path("runs/straight"))
    given = {step: [record["given"] for record in run.rollouts(step)] for step in (1, 6)}
    assert given[1] and all(given[1]) and not any(given[6])
    view, _ = token_view_data(run, 10**6)
    assert {record["step"] for record in view["rollouts"]} <= {3, 4, 5, 6} and len(view["rollouts"]) >= len(given[6])
    assert "reference_kl" not in lines[0] and 0 < abs(lines[-1]["reference_kl"]) < 1  # an estimate, which may be negative
    assert capfd.readouterr().err == ""
    checkpoint = next(Path("runs/straight/checkpoints").glob("*4*"))
    assert cli.main(["train", *TINY, *options, "name=resumed", f"resume={checkpoint}"]) == errors.OK
    states = [AutoModelForCausalLM.from_pretrained(f"runs/{name}/final").state_dict() for name in ("straight", "resumed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert cli.main(["train", *TINY, *options[:1], "name=another", f"resume={checkpoint}"]) == errors.USAGE
    assert "train.given_share was" in capfd.readouterr().err


def test_sample_writes_the_teachers_completions_and_continues_where_it_was_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a}+12=", "answer": str(a + 12)[::-1]} for a in range(10, 40)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sample", "model=tiny", "teacher=tiny", "data=jsonl", "data.train_path=data.jsonl", "eval=arithmetic", "device=cpu"]
    words += ["sampling.batch_size=8", "sampling.max_new_tokens=8"]
    assert cli.main([*words, "--out", "whole.jsonl", "--json"]) == errors.OK
    summary = json.loads(capfd.readouterr().out)
    assert (summary["prompts"], summary["kept"], summary["reward"]) == (27, 27, 1.0)
    whole = Path("whole.jsonl").read_text()
    assert [json.loads(line) for line in whole.splitlines()] == [
        {**row, "completion": row["answer"], "reward": 1.0} for row in rows[:27]
    ], "the bundled teacher is always right"
    assert [json.loads(line) for line in Path("whole-eval.jsonl").read_text().splitlines()] == rows[27:]
    assert cli.main([*words, "--out", "whole.jsonl"]) == errors.USAGE, "it is not replaced"

    monkeypatch.setattr("opd.training.evaluator.Evaluator.judge", killed_at_the_third(monkeypatch))
    assert cli.main([*words, "--out", "part.jsonl"]) == 137
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    part = Path("part.jsonl.part")
    assert not Path("part.jsonl").exists() and len(part.read_text().splitlines()) == 1 + 16
    whole_lines = part.read_text().splitlines(keepends=True)[:-1]
    part.write_text(part.read_text()[:-9])  # cut off in the middle of a line
    assert len(begin(part, json.loads(whole_lines[0]))) == 15 and part.read_text() == "".join(whole_lines)
    assert cli.main([*words, "seed=5", "--out", "part.jsonl"]) == errors.USAGE
    assert "seed" in capfd.readouterr().err, "another command's file"
    assert cli.main([*words, "--out", "part.jsonl"]) == errors.OK
    assert Path("part.jsonl").read_text() == whole and not part.exists()


def test_the_printed_schedule_has_the_length_of_the_run_and_is_one_share_where_that_is_not_known():
    shares = {
        steps: warm_start(Config(train=TrainConfig(max_steps=steps, epochs=None if steps else 1)), Path("x"))[-1] for steps in (40, None)
    }
    assert shares == {40: "train.given_share={0: 1.0, 10: 0.25, 20: 0}", None: "train.given_share=0.25"}


def test_line_separators_in_a_text_do_not_cut_its_line_and_another_file_is_refused(tmp_path):
    part, texts = tmp_path / "out.jsonl.part", ["a\u2028b\u2029c\x85d\x0ce"]
    assert begin(part, {"seed": 0}) == {}
    line = {"row": 3, "texts": texts, "rewards": [None]}
    with part.open("a") as stream:
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    assert begin(part, {"seed": 0}) == {3: line}
    for content in (b"text\n", b"text", b"[]\n", b"\xff\n", b'{"seed": 0}\n{"prompt": "x"}\n', b"3\n"):
        part.write_bytes(content)
        with pytest.raises(ConfigError, match=r"^\S+\.part: [^\n]*remove it, or [^\n]*--out$"):
            begin(part, {"seed": 0})
        assert part.read_bytes() == content


def test_the_file_has_the_columns_that_the_teachers_views_name_so_that_training_on_it_reads_the_same_prompts():
    teacher = TeacherConfig(prompt="{question} {hint} {answer}", contrast="{prompt}{answer}{system}")
    row = {"question": "27+85=", "system": "S", "hint": date(2024, 1, 9), "steps": "so #211", "other": 1}
    for options in ({"answer": "steps", "answer_after": "#"}, {"answer": None}):
        source = DataConfig(source=Source.parquet, train_path="x", prompt="question", system="system", **options)
        rows = [row if source.answer else {**row, "answer": 5}]
        prompts = encode_rows(rows, Encoder(tiny_tokenizer(), source, teacher), "training")
        (line,) = completions_file.lines([completions_file.columns(prompts[0], rows, Config(data=source, teacher=teacher))]).splitlines()
        assert "other" not in line
        written = DataConfig(source=Source.jsonl, train_path="x", prompt="prompt", answer="answer", answer_after=None, system="system")
        (found,) = encode_rows([json.loads(line)], Encoder(tiny_tokenizer(), written, teacher), "training")
        assert found.ids == prompts[0].ids and found.scored_views == prompts[0].scored_views and found.teacher_ids != found.contrast_ids


@pytest.mark.parametrize(("view", "data"), [({"prompt": "{completion}"}, {}), ({"contrast": "{system}"}, {"system": "role"})])
def test_a_view_of_a_column_that_the_file_has_for_something_else_is_refused(view, data):
    config = Config(data=DataConfig(**data), teacher=TeacherConfig(**view))
    with pytest.raises(ConfigError, match=rf"^teacher\.{next(iter(view))}: .*rename"):
        named_columns(config)


def test_sample_asks_a_served_teacher(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+12=", "answer": str(a + 12)[::-1]}) + "\n" for a in range(10, 20)))
    teacher = AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / "tiny-teacher", dtype=torch.float32)
    words = ["sample", "model=tiny", "teacher=tiny", "data=jsonl", "data.train_path=data.jsonl", "eval=arithmetic", "device=cpu"]
    with running(ScoringServer(teacher, tiny_tokenizer())) as server:
        assert cli.main([*words, f"teacher.url={server.url}", "sampling.max_new_tokens=8", "--out", "t.jsonl", "--json"]) == errors.OK
    assert json.loads(capfd.readouterr().out)["reward"] == 1.0
    assert all(row["completion"] == row["answer"] for row in map(json.loads, Path("t.jsonl").read_text().splitlines()))


def test_prompts_for_a_served_teacher_have_only_tokens_that_it_knows(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path)
    config = Config(
        model=ModelConfig(path="x"),
        teacher=TeacherConfig(path="bundled:tiny-teacher", url="http://127.0.0.1:1", timeout=0.1),
        device=Device.cpu,
    )
    prompts = [Prompt(4, (3, len(tokenizer) - 1), "")]
    with pytest.raises(DataError, match=r"^row 4: .*'<think>'.*data\.chat_template_kwargs"):
        completions_file.teacher_sampler(config, load_tokenizer(ModelConfig(path=str(tmp_path)), "model"), prompts)


def test_a_server_of_another_model_or_without_weights_does_not_continue_a_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["sample", "model=tiny", "teacher=tiny", "data=arithmetic", "eval=arithmetic", "device=cpu"]
    teacher = AutoModelForCausalLM.from_pretrained(PACKAGE / "assets" / "tiny-teacher", dtype=torch.float32)
    with torch.no_grad():
        teacher.get_output_embeddings().weight.zero_()
    with running(ScoringServer(teacher, tiny_tokenizer())) as server:
        assert cli.main([*words, f"teacher.url={server.url}", "--out", "t.jsonl"]) == errors.ENGINE
    assert "uniform" in capfd.readouterr().err
    wanted = [completions_file.settings(Config(teacher=TeacherConfig(url=url)), [], 1) for url in ("http://a", "http://b")]
    begin(Path("x.part"), wanted[0])
    with pytest.raises(ConfigError, match=r"teacher\.url"):
        begin(Path("x.part"), wanted[1])


def test_sample_says_why_prompts_have_no_completion(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    chats = [[{"role": "user", "content": f"{a}+12="}, {"role": "assistant", "content": str(a + 12)[::-1]}] for a in range(10, 30)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat, "system": None}) + "\n" for chat in chats))
    words = ["sample", "model=tiny", "teacher=tiny", "data.train_path=chats.jsonl", "data.prompt=messages", "data.answer=messages"]
    words += ["eval=arithmetic", "device=cpu", "--json"]
    assert cli.main([*words, "--out", "all.jsonl"]) == errors.OK
    written = json.loads(capfd.readouterr().out)
    assert (written["kept"], written["reward"], written["left_out"]) == (18, 1.0, {}), "each prompt ends before the answer"
    first = json.loads(Path("all.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": chats[0][:1], "answer": "22", "completion": "22", "reward": 1.0}
    kept = {"texts": ["a", None], "rewards": [0.0, None]}
    reasons = [why_left_out(line, True) for line in (kept, {**kept, "texts": ["", None]}, {**kept, "texts": [None, None]})]
    assert reasons == ["not right", "empty", "cut off"] and why_left_out(kept, False) == ""


def killed_at_the_third(monkeypatch):
    """Return an `Evaluator.judge` that ends the process at its third call."""
    from opd.training.evaluator import Evaluator

    judge, calls = Evaluator.judge, []

    def judge_or_die(self, rollouts):
        calls.append(rollouts)
        if len(calls) == 3:
            raise SystemExit(137)
        return judge(self, rollouts)

    return judge_or_die


@pytest.mark.parametrize(("shares", "shown"), [(True, "mean reward 50.0%"), (False, "mean reward 2.5")])
def test_the_mean_reward_of_completions_is_a_percentage_only_of_shares(shares, shown, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    written = Written(4, 4, 0.0, 0.5 if shares else 2.5, shares, {}, [])
    monkeypatch.setattr("opd.evaluation.completions.write_completions", lambda *given: written)
    assert cli.main(["sample", "experiment=debug", "device=cpu", "--out", "all.jsonl"]) == errors.OK
    assert f"{shown}, 0.0%" in " ".join(capfd.readouterr().out.split())


def test_only_right_completions_are_kept_and_more_than_one_is_a_list(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps({"prompt": f"{a}+12=", "answer": str(a + 12)[::-1]}) + "\n" for a in range(10, 40)))
    words = ["sample", "model=tiny", "teacher.path=bundled:tiny-student", "data=jsonl", "data.train_path=data.jsonl", "device=cpu"]
    words += ["eval=arithmetic", "sampling.max_new_tokens=8", "sampling.temperature=1", "-n", "2", "--json"]
    assert cli.main([*words, "--only-right", "--out", "right.jsonl"]) == errors.OK
    assert json.loads(capfd.readouterr().out)["kept"] < 27
    kept = [json.loads(line) for line in Path("right.jsonl").read_text().splitlines()]
    assert all(set(row["completion"]) == {row["answer"]} and set(row["reward"]) == {1.0} for row in kept)
    assert cli.main([*words, "--only-right", "--out", "x.jsonl", "eval.reward=null"]) == errors.USAGE
    assert "eval.reward" in capfd.readouterr().err


@pytest.mark.long
def test_a_student_that_is_never_right_learns_with_a_warm_start_and_not_alone(tmp_path, monkeypatch):
    """Noise on the weights of the bundled student leaves nothing right. With a warm start, in the same time, the gap is closed."""
    monkeypatch.chdir(tmp_path)
    source = PACKAGE / "assets" / "tiny-student"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight += 2 * weight.std() * torch.randn_like(weight)
    model.save_pretrained("student")
    AutoTokenizer.from_pretrained(source).save_pretrained("student")
    words = ["experiment=tiny", "model.path=student", "device=cpu", "eval.steps=0", "eval.kl_prompts=0", "eval.limit=500"]
    words += ["train.max_steps=300", "train.batch_size=32"]
    assert cli.main(["sample", *words, "--out", "teacher.jsonl"]) == errors.OK
    files = ["data=jsonl", "data.train_path=teacher.jsonl", "data.eval_path=teacher-eval.jsonl", "data.completion=completion"]
    assert cli.main(["train", *words, *files, "train.given_share={0: 1.0, 150: 0.25, 250: 0}", "name=warm"]) == errors.OK
    assert cli.main(["train", *words, "name=alone"]) == errors.OK  # as many steps, which take longer
    warm, alone = (open_run(Path("runs") / name).summary for name in ("warm", "alone"))
    assert warm["reward_before"] == alone["reward_before"] < 0.01
    assert warm["seconds"] < alone["seconds"]
    assert warm["gap_closed"] >= 0.8 > 0.1 > alone["gap_closed"]
