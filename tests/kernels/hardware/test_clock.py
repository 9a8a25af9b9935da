"""The clock: which rounds it drops, its ratios, and the schema of results. Nothing here depends on how fast we are."""

import itertools
import json
import math
import os
import subprocess

import pytest

from peakgpt.kernels.hardware import clock
from peakgpt.kernels.hardware.clock import Result, Spread, Ticks, Timing

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


class FakeMachine:
    """A clock that a contender moves by hand, and the CPU counters of two CPUs beside it."""

    def __init__(self, monkeypatch):
        self.now_s, self.foreign, self.stolen, self.calls = 0.0, 0.0, 0.0, []
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(clock, "read_ticks", self.ticks)

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


def test_parse_ticks_sums_the_cpus_we_may_use():
    ticks = clock.parse_ticks(STAT, [SELF], {0, 1})
    assert ticks == Ticks(total=645 + 879, busy=133 + 265, stolen=15, own=11 + 22 + 33 + 44)


def test_read_ticks_on_this_machine():
    ticks = clock.read_ticks()
    if ticks is None:
        pytest.skip("no /proc/stat")
    assert ticks.total > ticks.busy >= 0
    later = clock.read_ticks()
    assert later.total >= ticks.total and later.own >= ticks.own


@pytest.mark.parametrize(
    "foreign, stolen, expected",
    [(0, 0, 0.0), (2, 0, 0.0), (22, 0, 0.10), (0, 42, 0.20), (12, 10, 0.10), (500, 0, 1.0), (-3, 0, 0.0)],
)
def test_disturbance(foreign, stolen, expected):
    before = Ticks(1000, 500, 10, 300)
    after = Ticks(1200, 500 + 80 + foreign, 10 + stolen, 300 + 80)
    assert clock.disturbance(before, after) == pytest.approx(expected)


def test_disturbance_unknown_is_none():
    ticks = Ticks(10, 5, 0, 5)
    assert clock.disturbance(None, ticks) == clock.disturbance(ticks, None) == clock.disturbance(ticks, ticks) == 0.0


def test_keep_undisturbed():
    assert clock.keep_undisturbed([0.0, 0.1, 0.0]) == ([0, 1, 2], "")
    kept, note = clock.keep_undisturbed([0.0, 0.11, 0.1, 0.0, 0.9])
    assert kept == [0, 2, 3] and "2 rounds" in note and "dropped" in note
    # Too many disturbed: the least disturbed half stays, in order, and it says so.
    kept, note = clock.keep_undisturbed([0.5, 0.2, 0.9, 0.0, 0.3, 0.8, 0.7, 0.6])
    assert kept == [0, 1, 3, 4] and "only 1 of 8" in note and "50%" in note
    assert clock.keep_undisturbed([0.5, 0.6])[0] == [0, 1]


def test_interleave_rotates_and_measures(machine):
    contenders = {name: machine.contender(name, s) for name, s in [("a", 0.5), ("b", 0.25), ("c", 1.0)]}
    timings = clock.interleave(contenders, rounds=4, warmup=2)
    # Two warm-up calls and one to see how long a call takes, then the rounds.
    assert "".join(machine.calls) == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"
    assert {n: t.samples_s for n, t in timings.items()} == {"a": (0.5,) * 4, "b": (0.25,) * 4, "c": (1.0,) * 4}
    assert all(t.dropped == 0 and t.note == "" and t.calls == 1 for t in timings.values())


def test_interleave_repeats_what_is_fast(machine):
    timing = clock.interleave({"a": machine.contender("a", 3e-6)}, rounds=5)["a"]
    assert timing.calls == math.ceil(clock.MIN_TIMING_S / 3e-6)
    assert timing.median_s == pytest.approx(3e-6)


def test_interleave_is_not_misled_by_a_cold_start(machine):
    def cold(call):
        machine.now_s += 1e-3 if call <= 3 else 0

    timing = clock.interleave({"a": machine.contender("a", 2e-5, cold)}, rounds=5)["a"]
    assert timing.calls * 2e-5 >= clock.MIN_TIMING_S


def test_interleave_drops_a_disturbed_round_for_every_contender(machine):
    def foreign_in_round_3(call):
        if call == 2 + 3:  # after the warm-up and the first look
            machine.foreign += 40
            machine.now_s += 0.4

    def stolen_in_round_5(call):
        if call == 2 + 5:
            machine.stolen += 60

    timings = clock.interleave(
        {"a": machine.contender("a", 0.5, foreign_in_round_3), "b": machine.contender("b", 0.5, stolen_in_round_5)},
        rounds=8,
    )
    for timing in timings.values():
        assert timing.samples_s == pytest.approx((0.5,) * 6)
        assert timing.dropped == 2 and "2 rounds" in timing.note


def test_interleave_judges_short_rounds_together(machine):
    """1/16 s are 12 ticks: one tick of rounding would look like a disturbance, so 0.2 s are judged as one."""

    def foreign_in_the_first(call):
        machine.foreign += 30 if call == 3 else 0

    timing = clock.interleave({"a": machine.contender("a", 1 / 16, foreign_in_the_first)}, rounds=12)["a"]
    assert timing.dropped == 4 and timing.kept == 8


def test_interleave_budget(machine):
    timing = clock.interleave({"a": machine.contender("a", 1.0)}, rounds=100, budget_s=7.5)["a"]
    assert timing.kept == 6 and "6 of 100 rounds" in timing.note
    assert clock.interleave({"a": machine.contender("a", 1.0)}, rounds=100, budget_s=0)["a"].kept == clock.MIN_KEPT


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"rounds": 3, "warmup": -1}, {"rounds": 3, "contenders": {}}])
def test_interleave_bad_input(bad):
    with pytest.raises(ValueError, match="expected contenders, rounds >= 1"):
        clock.interleave(**{"contenders": {"a": int}, **bad})


def test_stopwatch_devices():
    assert clock.stopwatch()(lambda: None, calls=3) >= 0
    with pytest.raises(ValueError, match="cpu or cuda, got device 'meta'"):
        clock.stopwatch("meta")


def test_timing_of_each_of_several():
    timing = Timing((4.0, 6.0), dropped=1, note="n", calls=3)
    assert timing.each(2) == Timing((2.0, 3.0), dropped=1, note="n", calls=6)


def test_spread_and_ratio():
    assert Spread.of((4.0,)) == Spread(4.0, 4.0, 4.0)
    assert Spread.of((1.0, 2.0, 3.0, 4.0, 100.0)) == Spread(3.0, 2.0, 4.0)
    # Paired by round: a round in which the machine was four times slower leaves the ratio alone.
    a, b = Timing((2.0, 8.0, 2.0)), Timing((1.0, 4.0, 1.0))
    assert clock.ratio(a, b) == Spread(2.0, 2.0, 2.0)
    a = Timing((2.0, 9.0, 8.0))  # medians would say 8
    assert clock.ratio(a, b).median == 2.25
    with pytest.raises(ValueError, match="3 and 1 samples"):
        clock.ratio(a, Timing((1.0,)))
    with pytest.raises(ValueError, match="got none"):
        Timing(())


def result(**changes):
    fields = {
        "bench": "op", "case": {"rows": 1024, "causal": True}, "contender": "cpu", "backend": "cpu",
        "device": "AMD EPYC", "dtype": "float32", "flops": 3e9, "flops_kind": "work", "bytes": 2e9,
        "peak_flops_s": 6e9, "peak_bytes_s": 8e9, "peak_source": "measured",
    }  # fmt: skip
    return Result.of(Timing((1.0, 2.0, 3.0), dropped=4, note="n"), **{**fields, **changes})


def test_result_derives():
    r = result()
    assert (r.median_s, r.q25_s, r.q75_s, r.rounds, r.dropped, r.note) == (2.0, 1.5, 2.5, 3, 4, "n")
    assert r.tflops == pytest.approx(1.5e-3) and r.gbs == pytest.approx(1.0)
    assert r.flops_fraction == pytest.approx(0.25) and r.bytes_fraction == pytest.approx(0.125)
    bare = result(flops=None, flops_kind=None, bytes=None)
    assert bare.tflops is bare.gbs is bare.flops_fraction is bare.bytes_fraction is None
    assert result(peak_flops_s=None).flops_fraction is None


@pytest.mark.parametrize("bad", [{"flops_kind": "sparse"}, {"flops_kind": None}, {"flops": None}])
def test_result_names_its_flops(bad):
    with pytest.raises(ValueError, match="'model' or 'work'"):
        result(**bad)


@pytest.mark.parametrize("bad", [{"median_s": 0.0, "q25_s": 0.0}, {"median_s": 9.0}, {"median_s": math.nan}])
def test_result_times_are_ordered(bad):
    with pytest.raises(ValueError, match="q25_s <= median_s"):
        Result(**{**result().to_json(), **bad})


def test_contenders_in_processes_start_rested(monkeypatch):
    events = []
    monkeypatch.setattr(clock.time, "sleep", lambda seconds: events.append("rest"))
    work = lambda: [events.append("work"), sum(range(1 << 20))]  # noqa: E731
    clock.interleave({"a": work, "b": work}, rounds=3, warmup=0, workers=[os.getpid()])
    assert all("rest" in (before, now) for before, now in itertools.pairwise(events))
    events.clear()
    clock.interleave({"a": work, "b": work}, rounds=3, warmup=0)
    assert "rest" not in events


def test_results_round_trip(tmp_path):
    path = tmp_path / "new" / "results.json"
    results, environment = [result(), result(contender="eager", flops=None, flops_kind=None)], {"threads": 2}
    clock.write_results(path, results, environment)
    assert clock.read_results(path) == (results, environment)
    clock.write_results(path, results[:1], environment)
    assert clock.read_results(path)[0] == results[:1]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    clock.write_results(path, [result()], {})
    with pytest.raises(ValueError):
        clock.write_results(path, [result(bytes=math.inf)], {})  # no JSON number

    def broken(fd):
        raise OSError("disk full")

    monkeypatch.setattr(clock.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        clock.write_results(path, [], {})
    assert clock.read_results(path)[0] == [result()]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def _unknown(document):
    document["results"][0]["speed"] = 1


def _missing(document):
    del document["results"][0]["dtype"]


def _top_level(document):
    document["author"] = "me"


def _schema(document):
    document["schema"] = 99


@pytest.mark.parametrize(
    "damage, message",
    [(_unknown, "unknown \\['speed'\\]"), (_missing, "missing \\['dtype'\\]"), (_top_level, "unknown \\['author'\\]"),
     (_schema, "expected schema 2, got 99")],
)  # fmt: skip
def test_read_results_refuses(tmp_path, damage, message):
    path = tmp_path / "results.json"
    clock.write_results(path, [result()], {})
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        clock.read_results(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_read_results_refuses_other_files(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="results"):
        clock.read_results(path)


def test_environment(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libjemalloc.so")
    environment = clock.environment("cpu", commit="abc")
    assert json.loads(json.dumps(environment)) == environment
    assert environment["commit"] == "abc" and environment["clocks"] == {} and environment["threads"] >= 1
    assert environment["device"]["kind"] == "cpu" and environment["device"]["versions"]["torch"]
    assert environment["malloc"]["GLIBC_TUNABLES"] == "glibc.malloc.mmap_max=0"
    assert environment["malloc"]["LD_PRELOAD"] == "libjemalloc.so"


def test_commit_is_of_the_checkout_that_holds_the_clock(tmp_path, monkeypatch):
    """Installed inside another project's checkout, that project's HEAD is not ours."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    file = tmp_path / "clock.py"
    file.write_text("")
    monkeypatch.setattr(clock, "__file__", str(file))
    assert clock._commit() is None
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    assert clock._commit() is None
    for command in (["add", "clock.py"], ["commit", "-q", "-m", "ours"]):
        subprocess.run([*git, *command], check=True)
    head = clock._commit()
    assert len(head) == 40
    file.write_text("changed")
    assert clock._commit() == head + "+dirty"
