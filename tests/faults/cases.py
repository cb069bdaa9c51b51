"""All fault cases by name, with their numbers of tries: by default, and with --full.

The first line of a case's docstring says what is injected, the rest what must hold then.
"""

from faults import inputs, running, saving, stopping, teachers
from faults.harness import Case

CASES: dict[str, tuple[Case, int, int]] = {
    "random-kills": (stopping.random_kills, 2, 200),
    "random-signals": (stopping.random_signals, 2, 100),
    "stops": (stopping.stops, 1, 100),
    "stops-of-two": (stopping.stops_of_two, 1, 20),
    "lost-launcher": (stopping.lost_launchers, 1, 10),
    "kills-in-save": (saving.kills_in_save, 50, 600),
    "disk-errors": (saving.disk_errors, 100, 600),
    "full-disk": (saving.full_disks, 2, 20),
    "power-cuts": (saving.power_cuts, 100, 500),
    "corruptions": (saving.corruptions, 30, 1000),
    "all-bad": (saving.all_bad, 1, 5),
    "not-finite": (running.not_finite, 2, 40),
    "rewinds": (running.rewinds, 2, 10),
    "out-of-memory": (running.out_of_memory, 1, 10),
    "hangs": (running.hangs, 1, 5),
    "second-writer": (running.second_writers, 1, 10),
    "second-interrupt": (running.second_interrupts, 1, 5),
    "changed": (running.changed, 2, 20),
    "command-lines": (inputs.command_lines, 25, 10_000),
    "hostile-values": (inputs.hostile_values, 20, 100),
    "outside": (inputs.outside, 4, 22),
    "data": (inputs.data, 4, 26),
    "vocabularies": (inputs.vocabularies, 2, 10),
    "wrong-teachers": (teachers.wrong_teachers, 2, 24),
    "answers": (inputs.answers, 13, 37),
}
