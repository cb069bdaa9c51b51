"""Top-k overlap of student and teacher: against sets, in evaluations, in steps, by position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from training_helpers import VOCABULARY, make_trainer, rollout_of, weights_after

from opd.data.rollouts import Rollout
from opd.objective import TeacherTop, exact, reverse_kl, topk
from opd.objective.overlap import MASS, OVERLAP, OVERLAP_K, SHARE, overlap, overlap_of_distributions
from opd.teachers import LocalTeacher
from opd.training.evaluator import exact_kl
from opd.training.events import StepDone


def distributions(count: int = 7, vocabulary: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1) for _ in range(2))  # type: ignore[return-value]


def by_sets(student: torch.Tensor, teacher: torch.Tensor, k: int) -> tuple[float, float]:
    ours, theirs = ({index for _, index in sorted(((-value, i) for i, value in enumerate(one.tolist())))[:k]} for one in (student, teacher))
    probability = teacher.exp()
    return len(ours & theirs) / k, float(sum(probability[list(ours & theirs)]) / sum(probability[list(theirs)]))


def test_overlap_is_that_of_the_sets_of_the_most_probable_ids() -> None:
    student, teacher = distributions()
    found = overlap_of_distributions(student, teacher)
    for row in range(len(student)):
        assert (float(found[SHARE][row]), float(found[MASS][row])) == pytest.approx(
            by_sets(student[row], teacher[row], OVERLAP_K), abs=1e-12
        )
    assert 0 < found[SHARE].mean() < 1 and not torch.allclose(found[SHARE], found[MASS])


def test_overlap_of_a_model_with_itself_is_1_and_with_its_opposite_0() -> None:
    student, _ = distributions()
    assert all(torch.allclose(value, torch.ones(7, dtype=value.dtype)) for value in overlap_of_distributions(student, student).values())
    assert all(bool((value == 0).all()) for value in overlap_of_distributions(student, -student).values())
    few = student[:, :5]  # a vocabulary of fewer ids
    assert all(torch.allclose(value, torch.ones(7, dtype=value.dtype)) for value in overlap_of_distributions(few, -few).values())


def test_a_teacher_that_sends_its_best_ids_gives_the_same_overlap_from_16_ids_on() -> None:
    student, teacher = distributions()
    logp, ids = teacher.topk(OVERLAP_K + 4)
    target = torch.zeros(7, dtype=torch.long)
    sent = {k: topk(target, TeacherTop(ids[:, :k], logp[:, :k], teacher[:, 0]), 1.0, reverse_kl, k) for k in (OVERLAP_K + 4, OVERLAP_K - 1)}
    stats = sent[OVERLAP_K + 4](student, slice(None))[1]
    for name, values in overlap_of_distributions(student, teacher).items():
        torch.testing.assert_close(stats[name], values)
    assert not set(OVERLAP) & set(sent[OVERLAP_K - 1](student, slice(None))[1])
    assert overlap(student, ids[:, :1], logp[:, :1])[SHARE].tolist() == (student.argmax(-1) == teacher.argmax(-1)).double().tolist()


def completions() -> list[Rollout]:
    return [rollout_of(tuple(range(2, 4 + index)), tuple(range(3, 6 + 2 * index)), index=index) for index in range(5)]


def measured(max_tokens: int) -> dict[int, tuple[float, ...]]:
    """The overlap of each token, by rollout, from micro-batches of this size."""
    student, teacher = random_model(VOCABULARY, seed=1), LocalTeacher(random_model(VOCABULARY, seed=2, hidden=24), VOCABULARY)
    found: dict[int, tuple[float, ...]] = {}

    def note(rollouts: list[Rollout], stats: dict[str, torch.Tensor]) -> None:
        parts = stats[MASS].split([len(rollout.trained) for rollout in rollouts])
        found.update({one.request.prompt.sample_id: tuple(part.tolist()) for one, part in zip(rollouts, parts, strict=True)})

    exact_kl(student, teacher, completions(), VOCABULARY, max_tokens, 0, overlaps=note)
    return found


def test_overlap_does_not_depend_on_padding_and_batches() -> None:
    alone, together = measured(1), measured(1000)
    assert sorted(alone) == list(range(5))
    assert all(alone[index] == pytest.approx(together[index], abs=1e-5) for index in alone)


@pytest.mark.parametrize(
    "options", [{"ppo__estimator": "exact"}, {"ppo__estimator": "topk", "ppo__k": 4}, {"ppo__baseline": True}], ids=str
)
def test_every_step_that_has_whole_distributions_measures_the_overlap(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, train__max_steps=400, **options)
    steps = [trainer.train_step() for _ in range(2)]
    assert all(0 < step.metrics[name] < 1 and step.by_position[name][0] is not None for step in steps for name in OVERLAP)


def test_sampled_measures_the_overlap_in_detailed_steps_and_the_same_as_exact(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train__max_steps=400, ppo__steps=2)
    first, second = trainer.train_step(), trainer.train_step()
    assert not any(name in second.metrics or name in second.by_position for name in OVERLAP)
    whole: StepDone = make_trainer(tmp_path, train__max_steps=400, ppo__estimator="exact").train_step()
    for name in OVERLAP:
        assert first.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5)
        assert first.by_position[name] == pytest.approx(whole.by_position[name], rel=1e-5)


def test_measuring_the_overlap_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = weights_after(tmp_path, ppo__steps=2)
    monkeypatch.setattr("opd.training.loop.is_detailed_step", lambda step, total: False)
    assert torch.equal(measured, weights_after(tmp_path, ppo__steps=2))


def test_overlap_of_the_loss_is_of_the_distributions_at_its_temperature() -> None:
    student, teacher = distributions()

    class States:
        def logp(self, part: slice, temperature: float) -> torch.Tensor:
            return (teacher[part] / temperature).log_softmax(-1)

    stats = exact(torch.zeros(7, dtype=torch.long), States(), 0.5, reverse_kl)(student, slice(None))[1]  # type: ignore[arg-type]
    expected = overlap_of_distributions((student / 0.5).log_softmax(-1), (teacher / 0.5).log_softmax(-1))
    torch.testing.assert_close(stats[MASS].double(), expected[MASS].double(), rtol=1e-5, atol=1e-6)
