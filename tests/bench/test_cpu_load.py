"""CPU counters, disturbance by other processes, and the choice of rounds."""

import pytest

from peakgpt.bench import cpu_load
from peakgpt.bench.cpu_load import Ticks

STAT = """\
cpu  999 999 999 999 999 999 999 999 999 999
cpu0 100 10 20 500 5 1 2 7 50 0
cpu1 200 20 40 600 6 2 3 8 90 0
cpu2 900 900 900 900 900 900 900 900 0 0
intr 12345 0 0
ctxt 1
"""
# Field 2 is the program's name, in brackets and free to hold spaces and brackets; 14 to 17 are the times.
SELF = "42 (a (b) c) R 1 1 1 0 -1 4194304 102 0 0 0 11 22 33 44 20 0 1 0 64767 3133440 416\n"


def test_parse_ticks_sums_the_usable_cpus():
    ticks = cpu_load.parse_ticks(STAT, [SELF], {0, 1})
    assert ticks == Ticks(total=645 + 879, busy=133 + 265, stolen=15, own=11 + 22 + 33 + 44)


def test_read_ticks_on_this_machine():
    ticks = cpu_load.read_ticks()
    if ticks is None:
        pytest.skip("no /proc/stat")
    assert ticks.total > ticks.busy >= 0
    later = cpu_load.read_ticks()
    assert later.total >= ticks.total and later.own >= ticks.own


@pytest.mark.parametrize(
    "foreign, stolen, expected",
    [(0, 0, 0.0), (2, 0, 0.0), (22, 0, 0.10), (0, 42, 0.20), (12, 10, 0.10), (500, 0, 1.0), (-3, 0, 0.0)],
)
def test_disturbance(foreign, stolen, expected):
    before = Ticks(1000, 500, 10, 300)
    after = Ticks(1200, 500 + 80 + foreign, 10 + stolen, 300 + 80)
    assert cpu_load.disturbance(before, after) == pytest.approx(expected)


def test_unknown_disturbance_is_zero():
    ticks = Ticks(10, 5, 0, 5)
    assert (
        cpu_load.disturbance(None, ticks)
        == cpu_load.disturbance(ticks, None)
        == cpu_load.disturbance(ticks, ticks)
        == 0.0
    )


def test_keep_undisturbed_drops_disturbed_rounds_but_keeps_half():
    assert cpu_load.keep_undisturbed([0.0, 0.1, 0.0]) == ([0, 1, 2], "")
    kept, note = cpu_load.keep_undisturbed([0.0, 0.11, 0.1, 0.0, 0.9])
    assert kept == [0, 2, 3] and "2 rounds" in note and "dropped" in note
    # Too many disturbed: the least disturbed half stays, in order, and it says so.
    kept, note = cpu_load.keep_undisturbed([0.5, 0.2, 0.9, 0.0, 0.3, 0.8, 0.7, 0.6])
    assert kept == [0, 1, 3, 4] and "only 1 of 8" in note and "50%" in note
    assert cpu_load.keep_undisturbed([0.5, 0.6])[0] == [0, 1]
