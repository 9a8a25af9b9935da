"""Interleaving: rotation, repetition of fast calls, dropped rounds, budget.

No test depends on the speed of the machine.
"""

import itertools
import math
import os

import pytest

from peakgpt.bench import interleave, turns
from peakgpt.bench.cpu_load import Ticks
from peakgpt.bench.intervals import MIN_ROUNDS
from peakgpt.bench.timing import ratio
from peakgpt.bench.turns import BLOCK_CALLS


class FakeMachine:
    """A clock that only contenders advance, and the counters of two CPUs."""

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
    # Two warm-up calls, one call to estimate the duration, then the rounds. A second call in the third and last round
    # shows whether the first call of a turn is slower than the next.
    assert "".join(machine.calls) == "aaabbbccc" + "abc" + "bca" + "ccaabb" + "aabbcc"
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
        if call == 2 + 3:  # after the warm-up and the estimate
            machine.foreign += 80
            machine.now_s += 0.4

    def stolen_in_round_5(call):
        if call == 2 + 6:
            machine.stolen += 60

    timings = interleave.interleave(
        {"a": machine.contender("a", 0.5, foreign_in_round_3), "b": machine.contender("b", 0.5, stolen_in_round_5)},
        rounds=8,
    )
    for timing in timings.values():
        assert timing.samples_s == pytest.approx((0.5,) * 6)
        assert timing.dropped == 2 and "2 rounds" in timing.note


def test_interleave_judges_consecutive_short_rounds_together(machine):
    """1/16 s is 12 ticks, so a rounding error of one tick looks like a disturbance: judge 0.2 s together."""

    def foreign_in_the_first(call):
        machine.foreign += 30 if call == 3 else 0

    timing = interleave.interleave({"a": machine.contender("a", 1 / 16, foreign_in_the_first)}, rounds=12)["a"]
    assert timing.dropped == 3 and timing.kept == 9


def test_interleave_budget(machine):
    def kept(budget_s, **options):
        contenders = {"a": machine.contender("a", 1.0)}
        timing = interleave.interleave(contenders, rounds=100, budget_s=budget_s, **options)["a"]
        assert f"{timing.kept} of 100 rounds" in timing.note
        return timing.kept

    assert kept(0) == MIN_ROUNDS and kept(12.5) > kept(9.5) > MIN_ROUNDS
    assert kept(0, least=2) == 2


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"rounds": 3, "warmup": -1}, {"rounds": 3, "contenders": {}}])
def test_interleave_invalid_arguments_raise(bad):
    with pytest.raises(ValueError, match="expected contenders, rounds >= 1"):
        interleave.interleave(**{"contenders": {"a": int}, **bad})


def test_rest_precedes_each_turn_of_worker_processes(monkeypatch):
    events = []
    monkeypatch.setattr(interleave.time, "sleep", lambda seconds: events.append("rest"))
    contenders = {name: lambda name=name: [events.append(name), sum(range(1 << 20))] for name in "ab"}
    interleave.interleave(contenders, rounds=3, warmup=0, workers={"a": os.getpid(), "b": os.getpid()})
    assert all(before in (now, "rest") or now == "rest" for before, now in itertools.pairwise(events))
    events.clear()
    interleave.interleave(contenders, rounds=3, warmup=0)
    assert "rest" not in events


class Idle:
    """A contender whose memory is taken while others take their turns: the next call is slow."""

    def __init__(self, machine, name, seconds, cold_s, since=0):
        self.machine, self.name, self.seconds, self.cold_s, self.since = machine, name, seconds, cold_s, since

    def __call__(self):
        idled = self.machine.calls and self.machine.calls[-1] != self.name
        self.machine.calls.append(self.name)
        cold = idled and len(self.machine.calls) > self.since
        self.machine.now_s += self.cold_s if cold else self.seconds


def test_cold_memory_is_found_and_the_first_call_of_a_turn_is_not_timed(machine):
    """Fails if the first call counts: both would seem to take 5 s, a ratio of 1 instead of 2."""
    contenders = {name: Idle(machine, name, s, 5.0) for name, s in (("a", 1.0), ("b", 0.5), ("c", 1.0))}
    a, b, _ = interleave.interleave(contenders, rounds=9).values()
    assert a.samples_s == (1.0,) * 7 and b.samples_s == (0.5,) * 7 and ratio(a, b).median == 2.0
    assert a.first_call == b.first_call == "apart" and a.turns.first_s == b.turns.first_s == [5.0] * 7
    assert a.turns.calls == [2, 2] + [1 + BLOCK_CALLS] * 5  # two looks, then blocks
    assert a.turns.rounds == [*range(2, 9)] and a.dropped == 2
    assert "the first call took up to 10.0 x as long as the next ones (b)" in a.note


def test_memory_that_goes_cold_later_costs_the_rounds_without_a_second_call(machine):
    """Round 2 looks. Rounds 3 to 5 have one call a turn and could be cold. Round 6 looks again, round 7 confirms."""
    contenders = {name: Idle(machine, name, 1.0, 5.0, since=17) for name in "ab"}
    timing = interleave.interleave(contenders, rounds=11)["a"]
    assert timing.samples_s == (1.0,) * 6 and timing.turns.rounds == [2, 6, 7, 8, 9, 10] and timing.dropped == 5
    assert "5 rounds before without such calls dropped" in timing.note


def test_the_turns_of_a_contender_that_fails_later_cost_no_rounds(machine):
    """Only its turns lack a second call. Fails if the rounds that it took part in are dropped."""

    def fail(call):
        if call == 2 + 8:
            raise RuntimeError

    failing, fast = machine.contender("f", 1.0, fail), Idle(machine, "a", 1e-3, 0.02)
    timing = interleave.interleave({"a": fast, "f": failing}, rounds=9, on_failure=lambda *_: None)["a"]
    assert timing.first_call == "apart" and timing.dropped == 0


def test_warm_memory_and_a_single_slow_call_change_nothing(machine):
    slow_once = machine.contender("a", 1.0, lambda call: setattr(machine, "now_s", machine.now_s + 3 * (call == 5)))
    timing = interleave.interleave({"a": slow_once, "b": machine.contender("b", 1.0)}, rounds=7)["a"]
    assert timing.first_call == "timed" and "cold" not in timing.note
    assert timing.samples_s == (1.0, 1.0, 2.5, 1.0, 1.0, 1.0, 1.0)
    assert timing.turns.calls == [1, 1, 2, 2, 1, 1, 2]  # a second look after the slow call


def test_disturbed_rounds_do_not_look_like_cold_memory(machine):
    """Other processes take our CPUs in every first call. Fails if such rounds are looked at."""

    def slow_first_call(call):
        if call in (5, 7, 9):
            machine.now_s += 3
            machine.foreign += 300

    a, b = machine.contender("a", 1.0, slow_first_call), machine.contender("b", 1.0)
    timing = interleave.interleave({"a": a, "b": b}, rounds=8)["a"]
    assert timing.first_call == "timed" and "cold" not in timing.note and timing.turns.calls[0] <= 2


def test_call_with_counted_effects_is_never_repeated(machine):
    contenders = {name: Idle(machine, name, 1.0, 5.0) for name in "abc"}
    timing = interleave.interleave(contenders, rounds=5, warmup=0, one_call=True)["a"]
    assert machine.calls.count("a") == 1 + 5 and timing.first_call == "timed" and timing.samples_s == (5.0,) * 5


def test_turns_record_faults_order_and_foreign_cpu(machine, monkeypatch):
    faults = {7: 0, None: 0}

    def read_faults(pid):
        faults[pid] += 100 if pid else 3
        return faults[pid], faults[pid] // 100

    monkeypatch.setattr(turns, "read_faults", read_faults)
    monkeypatch.setattr(interleave.time, "sleep", lambda seconds: None)
    contenders = {name: machine.contender(name, 0.5) for name in "ab"}
    a, b = interleave.interleave(contenders, rounds=4, workers={"a": 7}).values()
    assert a.turns.minor_faults == [100] * 4 and a.turns.major_faults == [1] * 4 and b.turns.minor_faults == [3] * 4
    assert a.turns.positions == [0, 1, 0, 1] and b.turns.positions == [1, 0, 1, 0]
    assert a.turns.rounds == [0, 1, 2, 3] and a.turns.foreign_cpu == [0.0] * 4


def test_peaks_are_measured_right_before_and_after_the_rounds(machine):
    class Meter:
        def measure(self):
            machine.calls.append("peak")
            return {"float32": len(machine.calls)}

        def group(self, before, after):
            return before, after

    timing = interleave.interleave({"a": machine.contender("a", 1.0)}, rounds=3, peaks=Meter())["a"]
    assert machine.calls[:3] == ["a", "a", "peak"] and machine.calls[-1] == "peak"
    assert timing.peaks == ({"float32": 3}, {"float32": len(machine.calls)})
