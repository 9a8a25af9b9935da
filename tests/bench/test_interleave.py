"""Interleaving: rotation, repetition of fast calls, dropped rounds, budget. No test depends on the machine's speed."""

import itertools
import math
import os

import pytest

from peakgpt.bench import cpu_load, interleave
from peakgpt.bench.cpu_load import Ticks


class FakeMachine:
    """A clock that a contender moves by hand, and the CPU counters of two CPUs beside it."""

    def __init__(self, monkeypatch):
        self.now_s, self.foreign, self.stolen, self.calls = 0.0, 0.0, 0.0, []
        monkeypatch.setattr(interleave.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(interleave, "read_ticks", self.ticks)

    def ticks(self, workers=()):
        own = self.now_s * 100  # one of the two CPUs is ours throughout
        return Ticks(*(round(n) for n in (2 * own, own + self.foreign, self.stolen, own)))

    def contender(self, name, seconds, meanwhile=lambda call: None):
        def call():
            self.calls.append(name)
            self.now_s += seconds
            meanwhile(self.calls.count(name))

        return call


@pytest.fixture
def machine(monkeypatch):
    return FakeMachine(monkeypatch)


def test_interleave_rotates_and_measures(machine):
    contenders = {name: machine.contender(name, s) for name, s in [("a", 0.5), ("b", 0.25), ("c", 1.0)]}
    timings = interleave.interleave(contenders, rounds=4, warmup=2)
    # Two warm-up calls and one to see how long a call takes, then the rounds.
    assert "".join(machine.calls) == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"
    assert {n: t.samples_s for n, t in timings.items()} == {"a": (0.5,) * 4, "b": (0.25,) * 4, "c": (1.0,) * 4}
    assert all(t.dropped == 0 and t.note == "" and t.calls == 1 for t in timings.values())


def test_interleave_repeats_fast_calls(machine):
    timing = interleave.interleave({"a": machine.contender("a", 3e-6)}, rounds=5)["a"]
    assert timing.calls == math.ceil(interleave.MIN_TIMING_S / 3e-6)
    assert timing.median_s == pytest.approx(3e-6)


def test_interleave_calibrates_calls_after_cold_start(machine):
    def cold(call):
        machine.now_s += 1e-3 if call <= 3 else 0

    timing = interleave.interleave({"a": machine.contender("a", 2e-5, cold)}, rounds=5)["a"]
    assert timing.calls * 2e-5 >= interleave.MIN_TIMING_S


def test_interleave_drops_a_disturbed_round_for_every_contender(machine):
    def foreign_in_round_3(call):
        if call == 2 + 3:  # after the warm-up and the first look
            machine.foreign += 40
            machine.now_s += 0.4

    def stolen_in_round_5(call):
        if call == 2 + 5:
            machine.stolen += 60

    timings = interleave.interleave(
        {"a": machine.contender("a", 0.5, foreign_in_round_3), "b": machine.contender("b", 0.5, stolen_in_round_5)},
        rounds=8,
    )
    for timing in timings.values():
        assert timing.samples_s == pytest.approx((0.5,) * 6)
        assert timing.dropped == 2 and "2 rounds" in timing.note


def test_interleave_judges_consecutive_short_rounds_together(machine):
    """1/16 s are 12 ticks: one tick of rounding would look like a disturbance, so 0.2 s are judged as one."""

    def foreign_in_the_first(call):
        machine.foreign += 30 if call == 3 else 0

    timing = interleave.interleave({"a": machine.contender("a", 1 / 16, foreign_in_the_first)}, rounds=12)["a"]
    assert timing.dropped == 4 and timing.kept == 8


def test_interleave_budget(machine):
    timing = interleave.interleave({"a": machine.contender("a", 1.0)}, rounds=100, budget_s=7.5)["a"]
    assert timing.kept == 6 and "6 of 100 rounds" in timing.note
    assert (
        interleave.interleave({"a": machine.contender("a", 1.0)}, rounds=100, budget_s=0)["a"].kept == cpu_load.MIN_KEPT
    )


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"rounds": 3, "warmup": -1}, {"rounds": 3, "contenders": {}}])
def test_interleave_invalid_arguments_raise(bad):
    with pytest.raises(ValueError, match="expected contenders, rounds >= 1"):
        interleave.interleave(**{"contenders": {"a": int}, **bad})


def test_rest_precedes_each_timing_of_worker_processes(monkeypatch):
    events = []
    monkeypatch.setattr(interleave.time, "sleep", lambda seconds: events.append("rest"))
    work = lambda: [events.append("work"), sum(range(1 << 20))]  # noqa: E731
    interleave.interleave({"a": work, "b": work}, rounds=3, warmup=0, workers=[os.getpid()])
    assert all("rest" in (before, now) for before, now in itertools.pairwise(events))
    events.clear()
    interleave.interleave({"a": work, "b": work}, rounds=3, warmup=0)
    assert "rest" not in events
