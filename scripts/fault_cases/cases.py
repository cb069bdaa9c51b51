"""All cases by name, with how often each is tried in passing and in full."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fault_cases import running, saving, stopping, typed
from fault_cases.harness import Outcome


class Case(NamedTuple):
    does: str
    run: Callable[[int, Path], Outcome]
    few: int
    full: int


CASES = {
    "random-kills": Case("SIGKILL at random moments, the same command again", stopping.random_kills, 2, 200),
    "random-signals": Case("SIGTERM, SIGINT, SIGUSR1 at random moments", stopping.random_terms, 2, 100),
    "stops": Case("stopped by a signal at every kind of place, twice", stopping.stops_of_one, 2, 100),
    "stops-of-two": Case("a signal to one of two processes", stopping.stops_of_two, 1, 20),
    "kills-in-save": Case("SIGKILL at each file operation of a save, before it and half-way", saving.kills_in_save, 50, 600),
    "disk-errors": Case("ENOSPC and EIO at each file operation of a save", saving.disk_errors, 100, 600),
    "full-disk": Case("a run on a full disk", saving.full_disks, 2, 20),
    "power-cuts": Case("power fails after each file operation: only what was flushed is left", saving.power_cuts, 1, 5),
    "corruptions": Case("bits flipped, files cut or gone in the newest checkpoint", saving.corruptions, 30, 1000),
    "all-bad": Case("no checkpoint is whole", saving.all_bad, 1, 5),
    "lost-launcher": Case("the launcher of two processes killed", stopping.lost_launchers, 1, 10),
    "not-finite": Case("NaN and infinity in loss, gradient and teacher scores", running.not_finite, 2, 40),
    "rewinds": Case("three steps in a row without numbers", running.rewinds, 1, 5),
    "out-of-memory": Case("memory for a third of a batch", running.out_of_memory, 1, 10),
    "hangs": Case("a step that never ends", running.hangs, 1, 5),
    "second-writer": Case("the same command twice at a time", running.second_writers, 1, 10),
    "second-interrupt": Case("Ctrl-C twice", running.second_interrupts, 1, 5),
    "changed": Case("another option, row, tokenizer or teacher on going on", running.changed, 2, 20),
    "command-lines": Case("composed or refused", typed.fuzzed, 25, 10_000),
    "hostile-values": Case("values that are code somewhere", typed.hostile, 20, 100),
    "outside": Case("names, links, pickles, code and templates that reach out", typed.outside, 4, 22),
    "data": Case("files and rows that are not what they should be", typed.data, 4, 26),
    "vocabularies": Case("permuted ids, padded output layers", typed.vocabularies, 2, 10),
    "answers": Case("answers that hang or fill the memory of who judges them", typed.answers, 12, 36),
}
