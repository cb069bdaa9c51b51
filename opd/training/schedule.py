"""What depends on the step of a run: the learning rate, and which steps are looked into more closely."""

import math

from opd.config.schema import OptimConfig, Schedule


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """The share of `optim.lr` at a step (0-based): a linear warm-up, then the schedule, which reaches 0 after the last step."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule is Schedule.linear:
        return 1.0 - progress
    if config.schedule is Schedule.cosine:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
