"""A teacher behind servers: its log-probs are a local teacher's, and no wrong answer and no wrong teacher passes."""

import copy
import json
import logging
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from fake_vllm import ScoringServer, running
from hypothesis import given, settings
from test_config import compose
from training_helpers import SERVER, VOCABULARY, ServerSampler, make_trainer, rollout_lists, rollout_of, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import signals
from opd.config.compose import PACKAGE
from opd.config.options import TeacherConfig
from opd.data.rollouts import collate
from opd.doctor import Status, examine
from opd.errors import ENGINE, EngineError, Preempted, TeacherError
from opd.objective import forward_kl, reverse_kl, topk
from opd.teachers import LocalTeacher, Scored, ServedTeacher, contract, served
from opd.train import main

ASSETS = PACKAGE / "assets"
DEBUG = ("experiment=debug", "device=cpu", "ppo.temperature=1", "eval.kl_prompts=0", "train.max_steps=3", "eval.limit=4", "eval.steps=0")


class Tokenizer:
    """Names the ids of a small model."""

    all_special_ids = (0, 1)

    def get_added_vocab(self):
        return {"<end>": 1, "<image>": 99}

    def decode(self, ids):
        return "".join(f"<{token}>" for token in ids)


@pytest.fixture(scope="module")
def model():
    return random_model(60, seed=2, hidden=24)


@pytest.fixture
def server(model):
    with running(ScoringServer(model, Tokenizer())) as fake:
        yield fake


@pytest.fixture
def connect(server):
    def make(*urls, timeout=60.0, longest=40, tokenizer=None, path="any", k=0):
        config = TeacherConfig(path=path, url=list(urls) or server.url, timeout=timeout)
        return ServedTeacher(config, tokenizer or Tokenizer(), 60, longest, [1, 5, 9, 14, 3, 22], k)

    return make


def score(teacher, ids=(3, 4, 5)):
    return teacher.score([ids])[0]


# The same log-probs as a local teacher.


@given(rollouts=rollout_lists())
@settings(max_examples=12)
def test_log_probs_are_the_local_teachers_in_order_whatever_the_batch(rollouts):
    local = random_model(60, seed=2, hidden=24)
    with running(ScoringServer(local, Tokenizer())) as fake:
        remote = ServedTeacher(TeacherConfig(url=fake.url), Tokenizer(), 60, 40, [1, 5, 9])
        chosen = [index for index, rollout in enumerate(rollouts) if rollout.trained]
        for indices in filter(None, (chosen, chosen[::-1], chosen[:1])):
            for packed in (False, True):
                batch = collate(rollouts, indices, pad_id=0, packed=packed)
                expected = LocalTeacher(local, 60).logp(collate(rollouts, indices, pad_id=0).teacher_inputs, batch.ids_N, 1.0)
                assert torch.allclose(remote.logp(batch.teacher_inputs, batch.ids_N, 1.0), expected, atol=1e-4)


def test_the_most_probable_ids_make_the_objective_of_the_local_teacher(connect, model):
    batch = collate([rollout_of((3, 4), (5, 6, 1)), rollout_of((7,), (9, 8))], [0, 1], pad_id=0)
    states, top = LocalTeacher(model, 60).states(batch.teacher_inputs), connect(k=4).top(batch.teacher_inputs)
    assert top.id_NK.shape == (5, 4)
    logits_NV = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    for divergence in (reverse_kl, forward_kl):
        expected, found = (topk(batch.ids_N, teacher, 1.0, divergence, 4)(logits_NV, slice(0, 5)) for teacher in (states, top))
        assert torch.allclose(found[0], expected[0], atol=1e-4)
        for name in ("logp", "teacher_logp", "entropy"):
            assert torch.allclose(found[1][name], expected[1][name], atol=1e-4)
        assert (found[1]["reverse_kl"] < expected[1]["reverse_kl"]).all()  # a bucket holds less than its ids


def test_k_beyond_what_the_server_sends_is_told_at_the_start(connect):
    with pytest.raises(EngineError, match=r"^ppo\.k=21: .*set ppo\.k=20, or start the server with --max-logprobs 21$"):
        connect(k=21)


def test_finished_rollouts_are_scored_before_anybody_waits_for_them(connect, server):
    teacher, rollout = connect(), rollout_of((3, 4), (5, 6, 1))
    batch = collate([rollout], [0], pad_id=0)
    expected = teacher.logp(batch.teacher_inputs, batch.ids_N, 1.0)
    server.asked.clear()
    teacher.expect([rollout])
    while not server.bodies("/v1/completions"):
        time.sleep(0.01)
    assert torch.equal(teacher.logp(batch.teacher_inputs, batch.ids_N, 1.0), expected)
    assert len(server.bodies("/v1/completions")) == 1


def test_servers_take_turns_and_one_that_is_away_is_passed_over(connect, server, model, caplog):
    with running(ScoringServer(model, Tokenizer())) as second:
        teacher = connect(server.url, second.url)
        expected = score(teacher)
        teacher.score([(3, 4, 5)] * 7)
        assert len(server.bodies("/v1/completions")) == len(second.bodies("/v1/completions")) == 4
    with caplog.at_level(logging.INFO):
        assert score(teacher) == score(teacher) == expected
    assert [record.getMessage()[:11] for record in caplog.records] == ["teacher.url", "the teacher"]


def test_the_key_comes_from_the_environment(connect, server, monkeypatch):
    monkeypatch.setenv(served.KEY, "abc")
    seen = []
    server.fault = lambda handler, body, answer: (seen.append(handler.headers["Authorization"]), handler.reply(answer))
    score(connect())
    assert seen == ["Bearer abc"]


# No wrong answer becomes a number.


def spoil(value):
    """Return a fault that replaces the last log-prob."""

    def fault(handler, body, answer):
        answer["choices"][0]["prompt_logprobs"][-1] = {str(body["prompt"][-1]): {"logprob": value}}
        handler.reply(answer)

    return fault


def change(edit):
    """Return a fault that edits the list of log-probs."""

    def fault(handler, body, answer):
        edit(answer["choices"][0]["prompt_logprobs"])
        handler.reply(answer)

    return fault


WRONG = {
    "null": spoil(None),
    "NaN": spoil(math.nan),
    "infinite": spoil(-math.inf),
    "vLLM's number for minus infinity": spoil(-9999.0),
    "a probability above 1": spoil(0.1),
    "text": spoil("-1.0"),
    "a null entry": change(lambda entries: entries.__setitem__(-1, None)),
    "short": change(lambda entries: entries.pop()),
    "long": change(lambda entries: entries.append(entries[-1])),
    "shuffled": change(lambda entries: entries.reverse()),
    "of a rotated sequence": change(lambda entries: entries.insert(1, entries.pop())),
    "no log-probs": lambda handler, body, answer: handler.reply({"choices": [{"text": "x", "prompt_logprobs": None}]}),
    "two choices": lambda handler, body, answer: handler.reply({"choices": answer["choices"] * 2}),
    "no choices": lambda handler, body, answer: handler.reply({"choices": []}),
    "null for everything": lambda handler, body, answer: handler.reply(None),
    "a list": lambda handler, body, answer: handler.reply([1]),
    "no JSON": lambda handler, body, answer: handler.reply(b"<html>"),
    "refused": lambda handler, body, answer: handler.reply({"error": "too long"}, status=400),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_an_error_of_one_line(connect, server, case):
    teacher = connect()
    server.fault = WRONG[case]
    with pytest.raises(TeacherError, match=r"^teacher\.url=http") as caught:
        score(teacher)
    assert caught.value.exit_code == ENGINE and "\n" not in str(caught.value)


def test_another_sequences_answer_is_an_error(connect, server):
    teacher = connect()
    foreign = server.scores([7, 8, 9])
    server.fault = lambda handler, body, answer: handler.reply(foreign)
    with pytest.raises(TeacherError, match="each of the 3 tokens"):
        score(teacher)


# Waiting.


AWAY = {
    "overloaded": lambda handler, body, answer: handler.reply({}, status=503),
    "dies while it answers": lambda handler, body, answer: handler.reply(answer, length=10**6),
    "hangs": lambda handler, body, answer: time.sleep(1.5),
}


@pytest.mark.parametrize("case", AWAY)
def test_a_server_that_is_away_is_waited_for_until_the_timeout(connect, server, monkeypatch, case):
    monkeypatch.setattr(served, "PAUSES", (0.01, 0.02))
    teacher, sound = connect(timeout=4.0), server.fault  # a second for each of four attempts
    expected, failures = score(teacher), []

    def heals(handler, body, answer):
        failures.append(1)
        (AWAY[case] if len(failures) < 3 else sound)(handler, body, answer)

    server.fault = heals
    assert score(teacher) == expected and len(failures) == 3
    server.fault, teacher.timeout = AWAY[case], 0.8
    with pytest.raises(TeacherError, match=r"waited for 0\.8 s"):
        score(teacher)


def test_a_signal_ends_the_wait(connect, server, monkeypatch):
    teacher = connect(timeout=60.0)
    server.fault = AWAY["overloaded"]
    threading.Timer(0.3, lambda: signals.pending.append(signals.ASKING[0])).start()
    try:
        with pytest.raises(Preempted):
            score(teacher)
    finally:
        signals.pending.clear()


def test_after_a_signal_no_thread_waits_for_a_server_that_hangs(connect, server):
    """Python joins the threads of a pool when the process ends, and the exit code would come that late."""
    teacher, hung = connect(timeout=80.0), threading.Event()

    def hangs(handler, body, answer):
        hung.set()
        time.sleep(10)

    server.fault = hangs
    threading.Timer(0.3, lambda: signals.pending.append(signals.ASKING[0])).start()
    try:
        with pytest.raises(Preempted):
            score(teacher)
    finally:
        signals.pending.clear()
    begin = time.monotonic()
    assert hung.is_set()
    teacher.pool.shutdown(wait=True)
    assert time.monotonic() - begin < 5


# Never the wrong teacher.


def test_a_server_with_too_little_room_other_tokens_or_several_models_is_refused(connect, server):
    with pytest.raises(EngineError, match="--max-model-len 5000"):
        connect(longest=5000)
    other = Tokenizer()
    other.decode = lambda ids: "".join(f"<{token + (token == 1)}>" for token in ids)
    with pytest.raises(EngineError, match=r"61 compared|60 compared"):
        connect(tokenizer=other)
    server.answers["/v1/models"] = {"data": [{"id": "a", "max_model_len": 64}, {"id": "b", "max_model_len": None}]}
    with pytest.raises(EngineError, match=r"serves a, b: set teacher\.path"):
        connect()
    assert connect(path="b").name == "b"
    server.answers["/v1/models"] = {"data": []}
    with pytest.raises(EngineError, match="names no served model"):
        connect()


def test_servers_with_different_models_are_refused(connect, server, model):
    with running(ScoringServer(random_model(60, seed=7, hidden=24), Tokenizer())) as second:
        teacher = connect(server.url, second.url)
        with pytest.raises(EngineError, match="nats per token"):
            teacher.check()
        second.answers["/v1/models"] = {"data": [{"id": "other", "max_model_len": 64}]}
        with pytest.raises(EngineError, match="different models"):
            connect(server.url, second.url)


def scored_by(logp_of, student, rollouts) -> list[Scored]:
    """Return rollouts with the log-probs of a teacher and a student, each a function of a micro-batch."""
    batches = [collate([rollout], [0], pad_id=0) for rollout in rollouts]
    return [Scored(rollout, logp_of(batch).tolist(), student(batch).tolist()) for rollout, batch in zip(rollouts, batches, strict=True)]


def logp_of(teacher):
    return lambda batch: teacher.logp(batch.teacher_inputs, batch.ids_N, 1.0)


ROLLOUTS = [rollout_of((3, 4), (5, 6, 1)), rollout_of((7, 2, 9), (8, 30, 21, 1), mask=(True, False, True, True)), rollout_of((7,), (2, 1))]


def add_noise(server, size):
    """Let every second scoring be lower by `size` nats."""
    number = iter(range(1000))

    def noisy(handler, body, answer):
        shift = size * (next(number) % 2)
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            for value in entry.values():
                value["logprob"] -= shift
        handler.reply(answer)

    server.fault = noisy


def test_scores_that_change_from_one_request_to_the_next_are_refused_with_the_figure(connect, server):
    teacher, student = connect(), LocalTeacher(random_model(60, seed=5, hidden=24), 60)
    add_noise(server, 0.09)  # as two servers may in bf16
    teacher.check_scores(scored_by(logp_of(teacher), logp_of(student), ROLLOUTS))
    add_noise(server, 9)  # of three texts that are scored twice, at least one differs
    with pytest.raises(EngineError, match=r"differ by [\d.]+ nats per token, and the teacher from the student by [\d.]+"):
        teacher.check_scores(scored_by(logp_of(teacher), logp_of(student), ROLLOUTS))


def test_the_canary_finds_another_model_and_a_uniform_one(connect, server, model):
    teacher = connect()
    teacher.check()
    teacher.check()
    with torch.no_grad():
        server.model.lm_head.weight += 0.1 * torch.randn(server.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EngineError, match="nats per token from those at the start") as caught:
        teacher.check()
    assert type(caught.value) is EngineError  # not saved
    connect().check()  # for a run that begins now it is the right one
    with torch.no_grad():
        server.model.lm_head.weight.mul_(0.1)
    with pytest.raises(EngineError, match=r"uniform, with an entropy of at least [\d.]+ of 4\.09 nats"):
        connect().check()


def test_scores_of_the_first_batch_that_are_not_those_of_the_weights_at_teacher_path_are_refused_with_the_figure(server, model, tmp_path):
    model.save_pretrained(tmp_path)
    config, student = TeacherConfig(path=str(tmp_path), url=server.url), random_model(60, seed=5, hidden=24)
    teacher = ServedTeacher(config, Tokenizer(), 60, 40, [1, 5, 9])
    student_logp = logp_of(LocalTeacher(student, 60))

    def check():
        teacher.check_scores(scored_by(logp_of(teacher), student_logp, ROLLOUTS))

    check()
    for wrong in (random_model(60, seed=7, hidden=24), student):  # of the second the distance to the student is all there is
        server.model = wrong
        with pytest.raises(EngineError, match=r"teacher\.path=.*, which are [\d.]+ from the student's"):
            check()
    (tmp_path / "model.safetensors").unlink()
    check()  # nothing to compare with


def test_what_rounding_to_bf16_explains_is_not_another_model(server, model, tmp_path):
    """However near the student is to its teacher."""
    model.save_pretrained(tmp_path)
    teacher = ServedTeacher(TeacherConfig(path=str(tmp_path), url=server.url), Tokenizer(), 60, 40, [1, 5, 9])
    exact = logp_of(LocalTeacher(model, 60))
    server.model = copy.deepcopy(model).bfloat16()
    near = scored_by(logp_of(teacher), lambda batch: exact(batch) + 0.01, ROLLOUTS)
    gap = torch.cat([torch.tensor(one.teacher_logp) - exact(collate([one.rollout], [0], pad_id=0)) for one in near]).abs().mean()
    assert gap > contract.MAX_SHARE * 0.01
    teacher.check_scores(near)
    with torch.no_grad():  # small, but more than rounding
        server.model = copy.deepcopy(model)
        server.model.lm_head.weight += 0.05 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EngineError, match="from themselves in bf16"):
        teacher.check_scores(scored_by(logp_of(teacher), lambda batch: exact(batch) + 0.01, ROLLOUTS))


def test_a_teacher_that_is_the_student_is_told(tmp_path, caplog):
    student = random_model(VOCABULARY, seed=1)
    for same in (True, False):
        caplog.clear()
        teacher = copy.deepcopy(student) if same else None
        trainer = make_trainer(tmp_path / str(same), student=copy.deepcopy(student), teacher=teacher, train__max_steps=2)
        list(trainer.run())
        assert ("they are the same model" in caplog.text) is same


# Runs.


@pytest.fixture
def make_served_trainer(tmp_path):
    def make(fake, name="run", every=9, lag=False, k=0, contrast=None, **options):
        options |= {"teacher__url": fake.url, "teacher__timeout": 60.0, "checkpoint__every": every, **(SERVER if lag else {})}
        options |= {"teacher__contrast": contrast}
        trainer = make_trainer(tmp_path / name, **options)
        trainer.sampler = ServerSampler(trainer) if lag else trainer.sampler
        trainer.scoring.teacher = ServedTeacher(trainer.config.teacher, Tokenizer(), VOCABULARY, 40, [1, 5, 9, 14, 3, 22], k)
        return trainer

    return make


@pytest.fixture
def small_server():
    with running(ScoringServer(random_model(VOCABULARY, seed=2, hidden=24), Tokenizer())) as fake:
        yield fake


@pytest.mark.parametrize(("fault", "lag"), [(AWAY["overloaded"], False), (WRONG["shuffled"], True)])
def test_a_failure_within_a_step_is_saved_and_resumed_bitwise(make_served_trainer, small_server, monkeypatch, fault, lag):
    monkeypatch.setattr(served, "PAUSES", (0.01, 0.02))
    whole = make_served_trainer(small_server, "whole", lag=lag)
    list(whole.run())
    trainer, sound = make_served_trainer(small_server, lag=lag), small_server.fault
    trainer.scoring.teacher.expect = lambda rollouts: None  # the fault comes before any score of the next step
    events = trainer.run()
    while trainer.step < 2:
        next(events)
    rollouts = trainer.sample()
    small_server.fault, trainer.scoring.teacher.timeout = fault, 0.3
    with pytest.raises(TeacherError):
        list(events)
    small_server.fault = sound
    resumed, checkpoint = make_served_trainer(small_server, lag=lag), trainer.checkpoints.newest()
    assert checkpoint.step == 2
    resumed.resume(checkpoint)
    assert [rollout.completion for rollout in resumed.sample()] == [rollout.completion for rollout in rollouts]  # not sampled again
    list(resumed.run())
    assert torch.equal(weights(resumed), weights(whole))


def test_a_run_with_the_most_probable_ids_equals_the_local_one(make_served_trainer, small_server, tmp_path):
    options = {"ppo__estimator": "topk", "ppo__k": 5, "ppo__steps": 2}
    remote = make_served_trainer(small_server, "remote", k=5, **options)
    local = make_trainer(tmp_path / "local", **{**options, "ppo__temperature": 1.0})
    for trainer in (remote, local):
        list(trainer.run())
    assert torch.allclose(weights(remote), weights(local), atol=1e-5)
    assert not torch.equal(weights(local), weights(make_trainer(tmp_path / "start")))


def test_a_served_teacher_scores_the_contrast_as_a_local_one_does(make_served_trainer, small_server, tmp_path):
    remote = make_served_trainer(small_server, contrast="x")
    local = make_trainer(tmp_path / "local", ppo__temperature=1.0, teacher__contrast="x")
    for name in ("teacher_logp", "contrast_logp"):
        found, expected = (trainer.begin_step().as_sampled(name) for trainer in (remote, local))
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_step_scores_what_is_finished_while_it_samples_the_rest(make_served_trainer, small_server):
    trainer, events = make_served_trainer(small_server, sampling__batch_size=2), []
    teacher = trainer.scoring.teacher
    sample_batch, expect = trainer.sampler.sample_batch, teacher.expect
    trainer.sampler.sample_batch = lambda *args: (events.append("sample"), sample_batch(*args))[1]
    teacher.expect = lambda rollouts: (events.append("score"), expect(rollouts))
    trainer.begin_step()
    assert events[:3] == ["sample", "score", "sample"] and not teacher.begun


@pytest.mark.parametrize(("every", "canary_every", "saved", "ended"), [(1, 0, 2, 3), (2, 0, 2, 4), (5, 2, None, 4)])
def test_steps_with_another_teacher_are_not_saved(make_served_trainer, small_server, every, canary_every, saved, ended):
    """The canary is due every `canary_every` steps, and before each checkpoint. After three steps the teacher is another one."""
    trainer = make_served_trainer(small_server, every=every, train__max_steps=9, teacher__canary_every=canary_every)
    events = trainer.run()
    while trainer.step < 3:
        next(events)
    small_server.model = random_model(VOCABULARY, seed=3, hidden=24)
    with pytest.raises(EngineError, match="at the start of the run"):
        list(events)
    newest = trainer.checkpoints.newest()
    assert (trainer.step, newest and newest.step) == (ended, saved)


def test_a_run_whose_first_batch_is_scored_wrong_saves_nothing(make_served_trainer, small_server, tmp_path):
    random_model(VOCABULARY, seed=3, hidden=24).save_pretrained(tmp_path / "other")
    trainer = make_served_trainer(small_server, every=1, teacher__path=str(tmp_path / "other"))
    with pytest.raises(EngineError, match="of the weights at"):
        list(trainer.run())
    assert trainer.checkpoints.newest() is None
    small_server.model.save_pretrained(tmp_path / "same")
    trainer = make_served_trainer(small_server, "same", teacher__path=str(tmp_path / "same"))
    calls = []
    trainer.scoring.teacher.check_scores = calls.append
    list(trainer.run())
    assert len(calls) == 1 and len(calls[0]) == 6  # all completions of the first step, once


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.fixture(scope="module")
def bundled():
    path = ASSETS / "tiny-teacher"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def test_runs_equal_the_local_ones_wait_stop_with_76_and_resume_bitwise(bundled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(served, "PAUSES", (0.01, 0.02))
    # The tokenizer is enough.
    folder = tmp_path / "tokenizer"
    bundled[1].save_pretrained(folder)
    assert main([*DEBUG, "name=local"]) == 0
    with running(ScoringServer(*bundled)) as fake:
        remote = (*DEBUG, f"teacher.path={folder}", f"teacher.url={fake.url}")
        assert main([*remote, "name=served"]) == 0
        assert "scored at temperature 1" in capsys.readouterr().out
        summary = json.loads(Path("runs/served/summary.json").read_text())
        assert summary["reward_teacher"] == 1 and summary["eval_kl_after"] is None
        local, first = (tensors(Path("runs") / name) for name in ("local", "served"))
        assert all(torch.allclose(local[name], first[name], atol=1e-5) for name in local)

        # The server dies in the third step, for good.
        sound, asked = fake.fault, []

        def dies(handler, body, answer):
            asked.append(1)
            (sound if len(asked) < 20 else AWAY["overloaded"])(handler, body, answer)

        fake.fault = dies
        assert main([*remote, "name=away", "teacher.timeout=1.5"]) == ENGINE
        assert status(Path("runs/away"))["exit_code"] == ENGINE and "teacher.url" in status(Path("runs/away"))["reason"]
        fake.fault = sound
        assert main([*remote, "name=away"]) == 0
        resumed = tensors(Path("runs/away"))
        assert all(torch.equal(resumed[name], first[name]) for name in first)
        assert Path("runs/away/train.log").read_text().count("scored twice") == 1  # in the first step, not after the resume
    assert Path("runs/away/report.html").exists()


def test_doctor_finds_a_server_with_another_model_than_teacher_path(bundled):
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-student", dtype=torch.float32).eval()
    for model, is_ready in ((bundled[0], True), (student, False)):
        with running(ScoringServer(model, bundled[1])) as fake:
            report = examine(compose(*DEBUG, f"teacher.url={fake.url}"), prompts=0)
        failed = [finding.what for finding in report.findings if finding.status is Status.fail]
        assert report.ready is is_ready and all("teacher.path=bundled:tiny-teacher" in what for what in failed), failed
