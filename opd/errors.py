"""Errors with an exit code, and the exit codes a launcher or scheduler sees.

Every mistake a user can make, and every failure from outside, is an `OpdError`: one line with what is wrong, where, and the remedy. Any
other exception is a defect of `opd` and ends with exit code 70.
"""

OK = 0
USAGE = 64
DATA = 65
INTERNAL = 70
OUTPUT = 74
PREEMPTED = 75
ENGINE = 76
NUMERIC = 77
NOT_READY = 78
INTERRUPTED = 130  # what a shell reports for a program ended by SIGINT


class OpdError(Exception):
    """A user's mistake or a failure from outside; the message names the remedy."""

    exit_code = INTERNAL


class ConfigError(OpdError):
    """Wrong command line or config, a model that is not available, incompatible tokenizers."""

    exit_code = USAGE


class InsufficientMemory(ConfigError):
    """Out of memory on one process's device; other processes may have enough."""


class NoPeers(ConfigError):
    """A launcher's environment variables by which this process finds no others; it concerns one process."""


class DataError(OpdError):
    """A missing data file or column, an empty data set, no answers although rewards need them."""

    exit_code = DATA


class OutputError(OpdError):
    """A folder that is not writable, a full disk, unusable checkpoints."""

    exit_code = OUTPUT


class Preempted(OpdError):
    """A signal asked the run to stop; the same command resumes it."""

    exit_code = PREEMPTED


class RewardError(DataError):
    """A user's reward function failed on a completion, perhaps in one process only."""


class EngineError(OpdError):
    """An inference engine or server that refuses, times out, or returns an impossible answer."""

    exit_code = ENGINE


class SamplerError(EngineError):
    """A sampling engine that fails in a run. All processes of the run raise it, so that it can be saved."""


class TeacherError(EngineError):
    """A served teacher that stays away or gives an impossible answer. All processes of the run raise it, so that it can be saved."""


class NumericError(OpdError):
    """Loss or gradients are not finite."""

    exit_code = NUMERIC


class PeerError(OpdError):
    """Another process of the run ended; that process has reported the reason."""


class LaunchedRunFailed(OpdError):
    """A run in processes of its own failed; those processes have reported the reason."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with exit code {exit_code}")
        self.exit_code = exit_code


class NotReady(OpdError):
    """`opd doctor` found something that prevents the run."""

    exit_code = NOT_READY
