"""Notice that other programs use the cores of a run on a CPU, which then takes many times as long."""

import logging
import os
from collections import deque

import torch

from opd.config.options import Engine
from opd.config.schema import Config

log = logging.getLogger(__name__)

STEPS = 5  # whose times are compared
FREE = 0.6  # share of the threads' time from which on the cores count as free: a step has parts with one thread
BUSY = "step %d: other programs use these cores: the last steps had %.0f %% of the CPU time of %s"
REMEDIES = {
    False: "; wait until these have ended, or take other cores (taskset)",
    True: ", which wait for each other; OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE is faster then",
}
PASSIVE = "PASSIVE"
CPU_SHARE = "perf/cpu"


class Cores:
    """Compare the CPU time of steps with what all threads could have had. Problems are logged once.

    Threads that wait for others spin, so on free cores a step takes nearly the time of all its threads. Where another program has a core,
    all threads wait for the one that has none, at each operation. A single thread waits for nothing but its core.

    Args:
        threads: Of this process; 0 watches nothing.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.times: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self.reported = False

    @property
    def share(self) -> float | None:
        """The share of the threads' time in the last steps; None where it says nothing."""
        wall = sum(wall for _, wall in self.times)
        return sum(cpu for cpu, _ in self.times) / (self.threads * wall) if self.threads and wall else None

    def note(self, step: int, cpu: float, wall: float) -> None:
        """Add a step: the seconds of CPU time that it took, and those that passed."""
        if step > 1:  # the first one loads and allocates with one thread
            self.times.append((cpu, wall))
        share = self.share
        if share is not None and share < FREE and len(self.times) == STEPS and not self.reported:
            self.reported = True
            whose = f"their {self.threads} threads" if self.threads > 1 else "their thread"
            log.warning(BUSY + REMEDIES[self.threads > 1], step, 100 * share, whose)

    def metrics(self) -> dict[str, float]:
        return {} if self.share is None else {CPU_SHARE: self.share}


def watch_cores(config: Config, device: torch.device, processes: int) -> Cores:
    """Return what watches the cores of this process; without effect where a step also waits for something else, or threads sleep."""
    waits = config.sampling.engine is Engine.vllm or config.is_served or config.ppo.reward_coef > 0 or processes > 1
    threads = torch.get_num_threads()
    sleeps = threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() == PASSIVE
    return Cores(0 if device.type != "cpu" or waits or sleeps else threads)
