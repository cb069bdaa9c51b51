"""The second half of `opd doctor --plan`: a length of completions and a number of steps that fit into the time."""

from bisect import bisect_right
from dataclasses import dataclass

from opd.config.options import Truncated
from opd.config.schema import Config
from opd.doctor.first_step import MAX_TRUNCATED
from opd.doctor.plan import Planner, with_options
from opd.errors import ConfigError
from opd.runs.text import format_duration
from opd.training.evaluation import count_evaluations

MIN_STEPS = 50  # fewer hardly train a model: shorter completions are better
MOST_STEPS = 1_000_000  # that a plan has
MIN_TOKENS = 64  # of completions that are shortened to save time


@dataclass(frozen=True, slots=True)
class Timing:
    """What a trial step measured.

    Attributes:
        step: seconds of a step with all of its inner steps.
        truncated: share of completions that reached their limit.
        steps: of the run as configured.
        student, teacher: seconds of an evaluation of each; None if not measured.
    """

    step: float
    truncated: float
    steps: int
    student: float | None = None
    teacher: float | None = None

    def of_run(self, config: Config, scale: float, steps: int) -> float:
        """Return what a run takes: its steps at `scale` times the length, an evaluation of the teacher, and those of the student."""
        return steps * scale * self.step + self.of_evaluations(config, steps)

    def of_evaluations(self, config: Config, steps: int) -> float:
        return (self.teacher or 0.0) + count_evaluations(config.eval, steps) * (self.student or 0.0)

    def steps_within(self, minutes: float | None, config: Config, scale: float, most: int | None = None) -> int:
        """Return how many of the run's steps, or of `most`, fit into the minutes."""
        most = most or self.steps
        if minutes is None:
            return most
        return bisect_right(range(1, most + 1), 60 * minutes, key=lambda steps: self.of_run(config, scale, steps))


def fit_time(planner: Planner, config: Config, timing: Timing | None, minutes: float | None) -> Config:
    """Return the config with a length of completions and a number of steps that fit into the time.

    Args:
        planner: Records the choices.
        timing: Of `config`; None if nothing was measured, and then nothing is changed.
        minutes: What the run may take; None for any time.

    Raises:
        ConfigError: Not even one step fits.
    """
    limit, option = config.sampling.max_new_tokens, "sampling.max_new_tokens"
    if timing is None:
        planner.choose("completions", f"at most {limit} tokens", "as configured; their lengths were not measured")
        planner.choose("time", "not measured", "opd doctor --plan without --memory, on the machine itself, measures it")
        return config
    chosen, is_fixed, enough = limit, planner.is_fixed(config, option), min(MIN_STEPS, timing.steps)
    reason = f"{timing.truncated:.0%} of the trial step's reach it" + ("; as configured" if is_fixed else "")
    if not is_fixed and minutes is not None and config.sampling.truncated is Truncated.keep:
        while chosen // 2 >= MIN_TOKENS and timing.steps_within(minutes, config, chosen / limit) < enough:
            chosen //= 2
            reason = f"with {limit} fewer than {MIN_STEPS} steps fit into the time; shorter completions leave time for more steps"
    if not is_fixed and chosen == limit and timing.truncated > MAX_TRUNCATED:  # the limit is doubled where that fits
        longer = planner.changed(config, {option: 2 * limit})
        in_time = timing.steps_within(minutes, config, 2.0) >= enough
        if longer is not None and in_time and planner.needed(longer) <= planner.room:
            chosen, reason = 2 * limit, f"{timing.truncated:.0%} of the trial step's reach {limit}"
    planner.choose("completions", f"at most {chosen} tokens", reason)
    config = planner.changed(config, {option: chosen}) or config

    scale = chosen / limit
    possible = timing.steps_within(minutes, config, scale)
    seconds = timing.of_run(config, scale, min(possible, timing.steps))
    what = f"{min(possible, timing.steps):,} steps, about {format_duration(seconds)}"
    reason = f"{scale * timing.step:.2g} s a step" + (" if time goes with length" if scale != 1 else ", measured")
    reason += ", without evaluations" if timing.student is None else f"; an evaluation {format_duration(timing.student)}"
    if possible >= timing.steps:
        if minutes is not None:
            longest = timing.steps_within(minutes, config, scale, MOST_STEPS)
            reason += f"; {minutes:g} minutes are a limit, which train.max_steps={longest} would reach"
        planner.choose("time", what, reason)
        return config
    if possible < 1:
        remedy = "allow more minutes, or lower eval.limit, train.batch_size or sampling.max_new_tokens"
        raise ConfigError(f"no step fits into {minutes:g} minutes ({reason}); {remedy}")
    if planner.is_fixed(config, "train.max_steps") or planner.is_fixed(config, "train.epochs"):
        whole = format_duration(timing.of_run(config, scale, timing.steps))
        planner.choose("time", f"{timing.steps:,} steps, about {whole}", f"as configured, more than {minutes:g} minutes")
        return config
    planner.choose("time", what, f"{reason}; {timing.steps:,} as configured take longer than {minutes:g} minutes")
    return with_options(config, {"train.max_steps": possible, "train.epochs": None})
