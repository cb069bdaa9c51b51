"""The learning-rate schedule."""

import math

from opd.config.schema import OptimConfig, Schedule


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """Return the factor on `optim.lr` at a step (0-based) of `total`: linear warm-up, then the schedule, which ends at 0."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    match config.schedule:
        case Schedule.linear:
            return 1.0 - progress
        case Schedule.cosine:
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case Schedule.constant:
            return 1.0
