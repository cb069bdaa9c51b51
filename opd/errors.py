"""What a user is told when something is wrong, and the exit code that says so to a launcher.

Every mistake a user can make is one of these: one line with what, where and the remedy. Anything else that is raised is a defect of
`opd` and ends in exit code 70.
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
    """Wrong command line or config, a model that cannot be had, incompatible tokenizers."""

    exit_code = USAGE


class InsufficientMemory(ConfigError):
    """The memory of one process's device does not suffice: perhaps in that process alone."""


class DataError(OpdError):
    """A data file or column that is missing, an empty set, no answers where rewards are asked for."""

    exit_code = DATA


class OutputError(OpdError):
    """A folder that cannot be made or written, a full disk, checkpoints that cannot be used."""

    exit_code = OUTPUT


class Preempted(OpdError):
    """A signal asked the run to stop; the same command goes on from where it stopped."""

    exit_code = PREEMPTED


class RewardError(DataError):
    """A reward of the user's own failed on an answer: perhaps in one process alone."""


class EngineError(OpdError):
    """An inference engine or server that refuses, does not answer in time, or answers what cannot be."""

    exit_code = ENGINE


class NumericError(OpdError):
    """Loss or gradients are not finite."""

    exit_code = NUMERIC


class PeerError(OpdError):
    """Another process of the run is gone, and has said why."""


class LaunchedRunFailed(OpdError):
    """A run that a launcher started ended badly; its processes have told the user why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"ended with exit code {exit_code}")
        self.exit_code = exit_code


class NotReady(OpdError):
    """`opd doctor` found what keeps the run from working."""

    exit_code = NOT_READY
