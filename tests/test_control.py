"""Control arms: the same run without the teacher's information, and what `opd compare` says of both."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import VOCABULARY, config, make_trainer, rollout_of, untimed, weights_after

from opd.cli import main as cli
from opd.errors import ConfigError
from opd.report import compare, render_report
from opd.report.controls import Effect, effects
from opd.runs.answers import Answer
from opd.runs.folder import write_json
from opd.runs.intervals import MIN_SEEDS, paired_interval, t95
from opd.runs.reader import find_runs, open_run
from opd.training import control
from opd.training.control import CONSTANT, SHUFFLED, UNLIKELY, constant_advantage, partners
from opd.training.evaluation import Judged
from opd.training.identity import differences
from opd.training.tokens import Tokens

ARMS = ("constant", "shuffled")


def teachers() -> tuple[Any, Any]:
    return random_model(VOCABULARY, seed=2, hidden=24), random_model(VOCABULARY, seed=3, hidden=24)


@given(st.lists(st.none() | st.integers(0, 4), max_size=14), st.integers(0, 2**62))
def test_every_completion_has_a_partner_and_of_another_prompt_where_there_are_enough(groups: list[int | None], seed: int) -> None:
    found = partners(groups, seed)
    present = [index for index, group in enumerate(groups) if group is not None]
    if len(present) < 2:
        assert found == {}
        return
    assert sorted(found) == sorted(found.values()) == present
    assert all(index != partner for index, partner in found.items())
    if max(map(groups.count, {groups[index] for index in present})) <= len(present) / 2:
        assert all(groups[index] != groups[partner] for index, partner in found.items())


def test_partners_are_a_function_of_the_seed() -> None:
    groups = [index // 4 for index in range(32)]
    drawn = [tuple(sorted(partners(groups, seed).items())) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4


def test_the_constant_advantage_depends_on_the_students_probability_alone() -> None:
    probability = torch.tensor([1.0, 0.5, UNLIKELY * 1.001, UNLIKELY * 0.999, 1e-6])
    assert constant_advantage(probability.log()).tolist() == [0.0, 0.0, 0.0, CONSTANT, CONSTANT]


def table(scores: list[list[float]], prompts: list[int]) -> Tokens:
    """A table of completions with these teacher scores."""
    rollouts = [rollout_of((5, 6), tuple(range(2, 2 + len(own))), index=prompt) for own, prompt in zip(scores, prompts, strict=True)]
    tokens = Tokens(rollouts, torch.device("cpu"))
    values = torch.tensor([value for own in scores for value in own])
    tokens.columns["teacher_logp"] = torch.empty_like(values).index_copy_(0, tokens.sampling_order_N, values)
    return tokens


def test_shuffled_scores_are_those_of_the_partners_places_which_repeat_where_it_is_shorter(tmp_path: Path) -> None:
    scores = [[-1.0, -2.0, -3.0, -4.0, -5.0], [-6.0, -7.0]]
    tokens = table(scores, [0, 1])
    tokens.columns[SHUFFLED] = control.shuffled_scores(tokens, make_trainer(tmp_path).accelerator, 0, 0)
    assert tokens.as_sampled(SHUFFLED).tolist() == [-6.0, -7.0, -6.0, -7.0, -6.0, -1.0, -2.0]
    alone = table([[-1.0, -2.0], []], [0, 1])
    assert control.shuffled_scores(alone, make_trainer(tmp_path).accelerator, 0, 0).tolist() == alone.columns["behaviour_logp"].tolist()


def test_shuffled_scores_with_a_contrast_are_advantages_and_given_completions_are_no_partners(tmp_path: Path) -> None:
    accelerator = make_trainer(tmp_path).accelerator
    tokens = table([[-1.0, -2.0], [-6.0, -7.0]], [0, 1])
    tokens.columns["contrast_logp"] = torch.full((4,), -0.5)
    tokens.columns[SHUFFLED] = control.shuffled_scores(tokens, accelerator, 0, 0)
    assert tokens.as_sampled(SHUFFLED).tolist() == [-5.5, -6.5, -0.5, -1.5]
    tokens.rollouts[1] = replace(tokens.rollouts[1], given=True)
    assert control.shuffled_scores(tokens, accelerator, 0, 0).tolist() == [0.0] * 4  # the other one is alone


def test_an_arm_of_a_run_with_a_contrast_replaces_its_advantage(tmp_path: Path) -> None:
    options = {"teacher__contrast": "x", "ppo__advantage_clip": None}
    for arm in ARMS:
        trainer = make_trainer(tmp_path, control=arm, **options)
        tokens = trainer.begin_step()
        tokens.columns.setdefault("contrast_logp", tokens.columns["teacher_logp"] - 1)
        trainer.scoring.update(tokens)
        expected = constant_advantage(tokens.columns["behaviour_logp"]) if arm == "constant" else tokens.columns[SHUFFLED]
        assert torch.equal(tokens.columns["advantage"], expected)


@pytest.mark.parametrize("options", [{}, {"ppo__discount": 0.5}, {"ppo__steps": 2, "train__packing": True}], ids=str)
def test_what_the_constant_arm_learns_does_not_depend_on_the_teacher(tmp_path: Path, options: dict[str, Any]) -> None:
    one, other = teachers()
    learnt = [weights_after(tmp_path, teacher=teacher, control="constant", **options) for teacher in (one, other)]
    assert torch.equal(*learnt)
    assert not torch.equal(learnt[0], weights_after(tmp_path, steps=0))
    assert not torch.equal(learnt[0], weights_after(tmp_path, teacher=one, **options))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_the_gradient_of_an_arm_is_that_of_its_advantage_times_the_log_prob(tmp_path: Path, arm: str, discount: float) -> None:
    trainer = make_trainer(tmp_path, control=arm, ppo__advantage_clip=None, ppo__discount=discount, train__max_tokens_per_micro_batch=24)
    tokens = trainer.begin_step()
    logp = {}
    for index, rollout in enumerate(tokens.rollouts):
        ids = torch.tensor([rollout.request.prompt.ids + rollout.completion])
        every = (trainer.student(ids).logits[0, :-1] / trainer.config.temperature).log_softmax(-1)
        logp[index] = every.gather(-1, ids[0, 1:, None])[len(rollout.request.prompt.ids) - 1 :, 0]
    expected = torch.zeros(())
    for index in logp:
        old = logp[index].detach()
        advantage = constant_advantage(old) if arm == "constant" else tokens.of_rollout(index)[SHUFFLED] - old
        for place in range(len(old)):
            later = sum(discount**ahead * advantage[place + ahead] for ahead in range(len(old) - place))
            expected = expected - later * logp[index][place]
    parameters = list(trainer.student.parameters())
    wanted = torch.autograd.grad(expected / sum(map(len, logp.values())), parameters)
    weight_R, total = trainer.scoring.token_weights(tokens.rollouts)
    trainer.scoring.gradients(tokens, weight_R[tokens.rollout_N], total)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_training_metrics_of_an_arm_are_those_of_the_real_teacher(tmp_path: Path) -> None:
    first = {arm: untimed(make_trainer(tmp_path, control=arm).train_step()) for arm in ("none", *ARMS)}
    for arm in ARMS:
        changed = {name for name in first["none"] if first["none"][name] != first[arm][name]}
        assert changed <= {"advantage", "cut", "loss", "optim/grad_norm"}
        assert first[arm]["advantage"] != first["none"]["advantage"]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"control": "constant", "ppo__estimator": "exact"}, "ppo.estimator=sampled"),
        ({"control": "shuffled", "ppo__estimator": "topk"}, "ppo.estimator=sampled"),
        ({"control": "constant", "ppo__baseline": True}, "ppo.baseline=false"),
        ({"control": "shuffled", "sampling__n": 1, "train__batch_size": 1}, "sampling.n=2"),
    ],
)
def test_arms_that_cannot_be_are_refused(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=r"^control=") as error:
        config(**options)
    assert remedy in str(error.value)


def test_a_run_does_not_resume_as_another_arm() -> None:
    assert differences({"control": "none"}, {"control": "constant"}) == ["control was none, is constant"]


# What the teacher accounts for.


def found(each: list[Any]) -> dict[str, Any]:
    judged = [reward for reward in each if reward is not None]
    return {"mean": fmean(judged), "low": 0, "high": 1, "count": len(judged), "each": each}


def stored(folder: Path, rewards: dict[int, list[int]], arm: str = "none", seed: int = 0, data: str = "a", lr: float = 0.1) -> Path:
    """A finished member of a sweep with these rewards of each prompt, by step."""
    folder.mkdir(parents=True)
    options = {"seed": seed, "control": arm, "name": folder.name, "optim": {"lr": lr}}
    write_json(folder / "run.json", {"config": options, "content": {"evaluation data": data}})
    write_json(folder / "status.json", {"status": "done", "reason": "", "exit_code": 0})
    write_json(folder / "member.json", {"overrides": []})
    lines = []
    for step, each in rewards.items():
        lines.append({"model": "student", "step": step, "kl": None, "rewards": found(each)})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


BEFORE, TAUGHT, ARM = [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]


def test_the_teachers_part_of_the_gain_is_paired_by_prompt(tmp_path: Path) -> None:
    stored(tmp_path / "taught", {0: BEFORE, 5: TAUGHT, 9: BEFORE})
    stored(tmp_path / "arm", {0: BEFORE, 5: ARM}, "constant")
    [effect] = effects(find_runs([tmp_path]))
    assert (effect.control, effect.step, effect.prompts, effect.seeds) == ("constant", 5, 4, [0])
    assert (effect.before, effect.after, effect.without) == (0.25, 0.75, 0.5)
    spread = t95(3) * math.sqrt((3 * 0.25**2 + 0.75**2 + 1) / 3 / 4)
    assert (effect.low, effect.high) == pytest.approx((0.25 - spread, 1.0)) and 0.25 + spread > 1
    assert f"25.0 of 50.0 points [{100 * effect.low:.1f}, {100 * effect.high:.1f}]" in effect.sentence()


def test_prompts_that_a_run_did_not_judge_are_left_out_of_the_pairs(tmp_path: Path) -> None:
    """A user's reward may be None for some completions: lists without them would pair other prompts."""
    rows = [Answer("", reward, 3, False, "", sample) for sample, reward in ((2, 1.0), (0, None), (1, 0.5))]
    rewards = Judged(rows).rewards()
    assert rewards is not None and rewards.each == (None, 0.5, 1) and (rewards.mean, rewards.count) == (0.75, 2)
    assert Judged(rows[1:2]).rewards() is None
    for name, arm, after in (("taught", "none", [1, 1, 0, None]), ("arm", "constant", [None, 0, 0, 1])):
        stored(tmp_path / name, {0: BEFORE, 5: after}, arm)
    [effect] = effects(find_runs([tmp_path]))
    assert (effect.prompts, effect.before, effect.after, effect.without) == (2, 0.0, 0.5, 0.0)


@pytest.mark.parametrize("other", [{"data": "b"}, {"lr": 0.2}, {"seed": 1}], ids=str)
def test_only_runs_that_differ_in_the_control_alone_are_paired(tmp_path: Path, other: dict[str, Any]) -> None:
    stored(tmp_path / "taught", {0: BEFORE, 5: TAUGHT})
    stored(tmp_path / "arm", {0: BEFORE, 5: ARM}, "constant", **other)
    assert effects(find_runs([tmp_path])) == []


def test_runs_without_a_common_evaluation_after_training_are_left_out(tmp_path: Path) -> None:
    stored(tmp_path / "taught", {0: BEFORE, 4: TAUGHT})
    stored(tmp_path / "arm", {0: BEFORE, 5: ARM}, "constant")
    assert effects(find_runs([tmp_path])) == []


def test_the_interval_has_its_coverage_over_prompts_and_seeds() -> None:
    """Effects of prompts, of seeds, and noise of both, around a true difference of 0.1."""
    generator, held = torch.Generator().manual_seed(0), {1: 0, MIN_SEEDS: 0, 6: 0}
    for _ in range(300):
        for seeds in held:
            prompt, seed, noise = (torch.randn(shape, generator=generator) for shape in ((1, 40), (seeds, 1), (seeds, 40)))
            low, high = paired_interval((0.1 + prompt + (seed if seeds > 1 else 0) + noise).tolist())
            held[seeds] += low <= 0.1 <= high
    assert all(280 <= count <= 299 for count in held.values()), held


def test_the_sentence_says_where_the_control_made_it_worse() -> None:
    better, worse = (Effect("constant", [0], 5, 40, 0.4, 0.85, without, 0.2, 0.7, []).sentence() for without in (0.45, 0.35))
    assert "accounts for 50.0 of 45.0 points" in worse and "control=constant, which made it worse" in worse
    assert "worse" not in better


def test_rewards_that_are_no_shares_have_no_points(tmp_path: Path) -> None:
    stored(tmp_path / "taught", {0: BEFORE, 5: [20, 10, 10, 0]})
    stored(tmp_path / "arm", {0: BEFORE, 5: [10, 10, 0, 0]}, "constant")
    [effect] = effects(find_runs([tmp_path]))
    assert not effect.to_dict()["reward_is_share"]
    interval = f"[{effect.low:.4g}, {effect.high:.4g}]"
    assert f"accounts for 5 of 9.75 {interval}: reward 0.25 before, 10 after 5 steps, 5 with" in effect.sentence()


def test_compare_ends_in_one_sentence_per_arm_and_so_does_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "taught", {0: BEFORE, 5: TAUGHT})
    for arm in ARMS:
        stored(tmp_path / arm, {0: BEFORE, 5: ARM}, arm)
    assert cli.main(["compare", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert all(f"control={arm}" in line and "accounts for 25.0 of 50.0 points" in line for arm, line in zip(ARMS, last, strict=True))
    assert [found["control"] for found in json.loads(compare.as_json(compare.compare(find_runs([tmp_path]))))["controls"]] == list(ARMS)
    page = {name: render_report([open_run(tmp_path / name)]) for name in ("taught", *ARMS)}
    assert [[f"with control={arm}" in page[name] for arm in ARMS] for name in page] == [[True, True], [True, False], [False, True]]
    assert render_report(find_runs([tmp_path])).count("accounts for") == 2
    (tmp_path / "constant/evaluations.jsonl").write_text('{"model": "student", "rewards": {"each": [1]}}\n')
    assert "accounts for" not in render_report([open_run(tmp_path / "shuffled")])  # another member's damage is not this run's


@pytest.mark.long
def test_a_sweep_over_arms_says_what_the_teacher_accounts_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["experiment=debug", "train.max_steps=1", "eval.steps=0", "eval.limit=8", "eval.kl_prompts=2"]
    assert cli.main(["train", "-m", *words, "control=none,constant"]) == 0
    assert cli.main(["compare", "sweeps"]) == 0
    assert "paired over 8 prompts" in capfd.readouterr().out.splitlines()[-1]
    constant, none = sorted(find_runs([tmp_path / "sweeps"]), key=lambda run: str(run.config["control"]))
    assert (none.summary["control"], constant.summary["control"]) == ("none", "constant")
    assert constant.summary["reward_teacher"] == none.summary["reward_teacher"]
    assert "accounts for" in (constant.path / "report.html").read_text()
    assert "control" in (constant.path / "final/README.md").read_text() and "control" not in (none.path / "final/README.md").read_text()
