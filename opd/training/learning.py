"""The configured objective on a micro-batch: what is asked of the teacher, and which per-token loss it becomes.

Shapes: `N` kept completion tokens of a micro-batch.
"""

from dataclasses import dataclass

from torch import Tensor

from opd.config.schema import Config, Estimator
from opd.data.rollouts import MicroBatch
from opd.objective import Clips, Sampled, TeacherStates, discounted, exact, sampled, topk
from opd.objective.divergences import named_divergence
from opd.objective.head import TokenLoss
from opd.teachers import Teacher


@dataclass(frozen=True, slots=True)
class Scores:
    """What the teacher said of a micro-batch: log-probs of its tokens, or whole distributions, or both; and a reward for each token."""

    logp_N: Tensor | None = None
    states: TeacherStates | None = None
    bonus_N: Tensor | None = None


def score(teacher: Teacher, batch: MicroBatch, config: Config, bonus_N: Tensor | None = None, known_N: Tensor | None = None) -> Scores:
    """Ask the teacher for what the objective needs and no more. known_N: the log-probs of the tokens that it gave before."""
    ppo = config.ppo
    if ppo.estimator is not Estimator.sampled:
        return Scores(states=teacher.states(batch))
    if ppo.baseline:
        states = teacher.states(batch)
        return Scores(states.token_logp(batch.target_N, config.sampling.temperature) if known_N is None else known_N, states, bonus_N)
    return Scores(teacher.logp(batch, config.sampling.temperature) if known_N is None else known_N, None, bonus_N)


def token_loss(config: Config, batch: MicroBatch, scores: Scores, old_logp_N: Tensor | None) -> TokenLoss:
    """The per-token loss. old_logp_N: None at the first inner step, where it is what is being computed."""
    ppo, temperature = config.ppo, config.sampling.temperature
    if ppo.estimator is Estimator.sampled:
        assert scores.logp_N is not None
        advantage_N = None
        if ppo.discount > 0:
            # Sums over later tokens are needed before the first pass: the sampler's log-probs stand in, which are those of old_logp.
            advantage_N = discounted(scores.logp_N - batch.behaviour_logp_N, batch.sequence_N, ppo.discount)
        tokens = Sampled(
            target_N=batch.target_N,
            teacher_logp_N=scores.logp_N,
            behaviour_logp_N=batch.behaviour_logp_N,
            old_logp_N=old_logp_N,
            advantage_N=advantage_N,
            bonus_N=scores.bonus_N,
            baseline=scores.states,
        )
        return sampled(tokens, temperature, Clips(ppo.clip_eps, ppo.clip_eps, ppo.advantage_clip, ppo.importance_cap), overwrite=True)
    assert scores.states is not None
    divergence = named_divergence(ppo.divergence.value, ppo.beta)
    if ppo.estimator is Estimator.topk:
        return topk(batch.target_N, scores.states, temperature, divergence, ppo.k)
    return exact(batch.target_N, scores.states, temperature, divergence)
