"""Watches the rollouts for a student that is going wrong: it no longer ends, repeats itself, or is not the one that samples."""

import logging
from collections.abc import Mapping

from opd.config.schema import GuardAction, SamplingConfig
from opd.errors import NumericError

log = logging.getLogger(__name__)

REMEDIES = {
    "truncated": "raise sampling.max_new_tokens, lower optim.lr, or leave them out with sampling.truncated=mask",
    "repetition": "lower optim.lr, set ppo.advantage_clip, or shorten sampling.max_new_tokens",
}


class Guard:
    """Looks at each step's metrics. Speaks once of what lasts, and again only after it was over."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.lasted = dict.fromkeys(REMEDIES, 0)
        self.gap_told = False

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises `NumericError` for what lasts, where `sampling.guard.action` is stop."""
        self.look_at_gap(step, metrics["engine_gap"])
        guard = self.config.guard
        if guard.action is GuardAction.none:
            return
        for name, limit in (("truncated", guard.truncated), ("repetition", guard.repetition)):
            self.lasted[name] = self.lasted[name] + 1 if metrics[name] >= limit else 0
            if self.lasted[name] != guard.steps:
                continue
            what = f"step {step}: {name} was {metrics[name]:.2f}, and at least {limit:g} for {guard.steps} steps: {REMEDIES[name]}"
            if guard.action is GuardAction.stop:
                raise NumericError(f"{what}; the last checkpoint is untouched (sampling.guard.action=warn goes on)")
            log.warning(what)

    def look_at_gap(self, step: int, gap: float) -> None:
        """Log-probs of truncated sampling, and of weights of the step before, differ by right."""
        comparable = self.config.top_p == 1 and self.config.top_k == 0 and self.config.lag == 0
        if comparable and gap > self.config.max_gap and not self.gap_told:
            log.warning(
                "step %d: the sampler's log-probs are %.3f nats from the trainer's on average (sampling.max_gap=%g): it rounds more "
                "coarsely, as a bf16 copy does, or its weights are not the student's; the importance weight corrects for it as far as "
                "ppo.importance_cap lets it, and sampling.engine=generate sampling.dtype=trainer has no gap",
                step,
                gap,
                self.config.max_gap,
            )
        self.gap_told = gap > self.config.max_gap
