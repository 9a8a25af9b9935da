"""`bench neighbours`: turns on a quiet and on a busy machine pair up, and no neighbour outlives its turn.

The machine of most tests is a clock that contenders advance, so that shares are exact.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peakgpt.bench import busy_machine, interleave, neighbours
from peakgpt.bench.busy_machine import time_on_busy_machine
from peakgpt.bench.busy_neighbours import BUSY_LOOP, busy_neighbours
from peakgpt.bench.contenders.contender import Workload
from peakgpt.bench.cpu_load import Ticks, read_ticks
from peakgpt.bench.cpu_quota import CpuQuota
from peakgpt.bench.decode import DecodeCase
from peakgpt.bench.interleave import raise_failure
from peakgpt.bench.neighbours import NeighboursCase
from peakgpt.bench.quiet_share import BUSY, COPIES, MACHINE, NEIGHBOURS, QUIET, QUOTA, quiet_share, share_text
from peakgpt.bench.report import comparisons, filled_table, tables
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Timing, ratio
from peakgpt.engine.model.presets import preset

CPU = torch.device("cpu")


class FakeMachine:
    """A machine that n neighbours slow down by 1 + n, and a quota by 2."""

    def __init__(self, monkeypatch):
        self.now_s, self.load, self.turns, self.accounted = 0.0, 0, [], set()
        monkeypatch.setattr(interleave.time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(interleave.time, "sleep", lambda seconds: self.turns.append("rest"))
        monkeypatch.setattr(interleave, "read_ticks", self.ticks)
        monkeypatch.setattr(busy_machine, "busy_neighbours", self.loaded)

    def ticks(self, pids):
        self.accounted.add(pids)
        own = round(100 * self.now_s)
        return Ticks(2 * own, own, 0, own)

    @contextlib.contextmanager
    def loaded(self, count):
        self.load += count
        self.turns.append(f"load {count}")
        try:
            yield
        finally:
            self.load -= count
            self.turns.append("end")

    def limits(self, pid):
        return self.loaded(1)


class FakeWorker:
    """A step takes `seconds`, times the slowdown of the machine. Once that has been busy, it may fail under a load."""

    def __init__(self, machine, pid, seconds, fails_under=None):
        self.machine, self.pid, self.seconds, self.fails_under = machine, pid, seconds, fails_under

    def step(self):
        self.begin()
        self.finish()

    def begin(self):
        self.machine.turns.append(f"begin {self.pid}")

    def finish(self):
        if self.fails_under == self.machine.load and "load 1" in self.machine.turns:
            raise RuntimeError("failed")
        self.machine.turns.append(f"finish {self.pid}")
        self.machine.now_s += self.seconds * (1 + self.machine.load)


@pytest.fixture
def machine(monkeypatch):
    return FakeMachine(monkeypatch)


def timed(machine, workers, copies, *, quota=None, rounds=6, on_failure=raise_failure):
    return time_on_busy_machine(workers, copies, quota, rounds=rounds, budget_s=None, on_failure=on_failure)


def test_every_condition_is_timed_in_the_same_rounds(machine):
    workers = {"a": FakeWorker(machine, 1, 0.5), "b": FakeWorker(machine, 2, 0.25)}
    copies = {"a": FakeWorker(machine, 3, 0.5)}
    timings = timed(machine, workers, copies, quota=machine)
    assert list(timings) == [
        *(("a", where) for where in (QUIET, *NEIGHBOURS.values(), QUOTA, COPIES)),
        *(("b", where) for where in (QUIET, *NEIGHBOURS.values(), QUOTA)),
    ]
    assert len({tuple(t.turns.rounds) for t in timings.values()}) == 1
    shares = {key: ratio(timings[key[0], QUIET], t).median for key, t in timings.items()}
    assert [shares["a", where] for where in (QUIET, *BUSY)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2, 1])
    assert timings["a", COPIES].samples_s == timings["a", QUIET].samples_s == pytest.approx((0.5,) * 6)


def test_neighbours_begin_before_the_rest_and_end_after_the_turn(machine):
    timed(machine, {"a": FakeWorker(machine, 1, 0.5)}, {}, rounds=1)
    for load in ("load 1", "load 2"):
        begin = machine.turns.index(load)
        assert machine.turns[begin : begin + 5] == [load, "rest", "begin 1", "finish 1", "end"]


def test_copies_step_at_the_same_time(machine):
    timed(machine, {"a": FakeWorker(machine, 1, 0.5)}, {"a": FakeWorker(machine, 2, 0.5)}, rounds=1)
    begin = machine.turns.index("begin 2")
    assert machine.turns[begin - 1 : begin + 3] == ["begin 1", "begin 2", "finish 1", "finish 2"]


def test_every_process_is_ours_and_counted_once(machine):
    """Fails if a process with turns in several conditions is counted in each: then foreign CPU would be missed."""
    timed(machine, {"a": FakeWorker(machine, 1, 0.5)}, {"a": FakeWorker(machine, 2, 0.5)})
    assert machine.accounted == {(1, 2)}


def test_a_condition_that_fails_ends_its_neighbours_and_loses_no_other_timing(machine):
    failures = []
    workers = {"a": FakeWorker(machine, 1, 0.5, fails_under=2), "b": FakeWorker(machine, 2, 0.5)}
    timings = timed(machine, workers, {}, on_failure=lambda name, error: failures.append(name))
    assert failures == [f"a, {NEIGHBOURS[2]}"] and machine.load == 0
    assert [where for name, where in timings if name == "a"] == [QUIET, NEIGHBOURS[1]]
    assert [where for name, where in timings if name == "b"] == [QUIET, *NEIGHBOURS.values()]


def test_a_contender_without_a_quiet_time_has_no_share(machine):
    workers = {"a": FakeWorker(machine, 1, 0.5, fails_under=0), "b": FakeWorker(machine, 2, 0.5)}
    timings = timed(machine, workers, {}, on_failure=lambda name, error: None)
    assert {name for name, _ in timings} == {"b"}


def test_busy_turns_that_vary_do_not_look_like_cold_memory(machine):
    """The first call beside neighbours is slow, in every turn. Fails if such turns are looked at."""
    worker, counts = FakeWorker(machine, 1, 0.5), []

    def finish():
        machine.now_s += 5.0 if machine.turns[-2:] == ["rest", "begin 1"] and machine.load else 0.5
        counts.append(machine.load)

    worker.finish = finish
    timing = timed(machine, {"a": worker}, {}, rounds=8)["a", QUIET]
    assert timing.first_call == "timed" and "cold" not in timing.note and timing.dropped == 0
    assert counts.count(1) == counts.count(2) == 8


# ---- real processes


def is_running(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_neighbours_run_until_the_context_ends_however_it_ends(error):
    with contextlib.suppress(ValueError, KeyboardInterrupt), busy_neighbours(2) as pids:
        assert len(set(pids)) == 2 and all(map(is_running, pids))
        if error:
            raise error
    assert not any(map(is_running, pids))


def test_a_neighbour_that_does_not_start_ends_the_others(monkeypatch):
    monkeypatch.setattr("peakgpt.bench.busy_neighbours.BUSY_LOOP", "raise SystemExit(3)")
    message = "busy neighbour ended with exit code 3, expected it to run"
    with pytest.raises(RuntimeError, match=message), busy_neighbours(2):
        pass


def test_a_neighbour_ends_when_the_process_that_started_it_is_gone():
    command = [sys.executable, "-I", "-S", "-c", BUSY_LOOP, str(os.getppid())]  # another parent than its own
    assert subprocess.run(command, timeout=60, stdout=subprocess.DEVNULL).returncode == 0


def test_the_time_of_neighbours_is_ours_when_they_have_ended():
    """Fails if the parent does not wait for a neighbour: CPU time of foreign processes drops a round."""
    before = read_ticks()
    if before is None:
        pytest.skip("no /proc/stat")
    ticks = 0
    with busy_neighbours(1) as (pid,):
        while ticks < 20:
            ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    assert read_ticks().own - before.own >= ticks


# ---- CPU quota


def control_groups(root, *, subtree="cpu memory", path="/user/job"):
    """Write the files of a system with a control group of version 2; return the base of the groups."""
    base = root / "sys/fs/cgroup"
    (base / path.strip("/")).mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"4:memory:/x\n0::{path}\n")
    (base / "user" / "cgroup.subtree_control").write_text(subtree)
    (base / "user/job/cgroup.subtree_control").write_text("")
    return base


def test_quota_holds_a_process_in_a_group_during_the_turn_alone(tmp_path):
    base = control_groups(tmp_path)
    quota = CpuQuota(1.0, tmp_path)
    assert quota.group.parent == base / "user" and quota.home == base / "user/job"
    assert (quota.group / "cpu.max").read_text() == "100000 100000"
    with pytest.raises(RuntimeError), quota.limits(77):
        assert (quota.group / "cgroup.procs").read_text() == "77"
        raise RuntimeError
    assert (quota.home / "cgroup.procs").read_text() == "77"
    for file in quota.group.iterdir():  # the kernel's files go with the folder
        file.unlink()
    quota.close()
    assert not quota.group.exists()


def test_no_quota_without_a_group_whose_children_have_one(tmp_path):
    control_groups(tmp_path, subtree="memory")
    with pytest.raises(OSError, match="no control group of version 2 above this process"):
        CpuQuota(1.0, tmp_path)
    with pytest.raises(OSError, match="proc/self/cgroup"):  # another system than Linux
        CpuQuota(1.0, tmp_path / "none")


def test_a_path_outside_of_the_container_means_the_base(tmp_path):
    base = control_groups(tmp_path)
    (tmp_path / "proc/self/cgroup").write_text("0::/not/visible\n")
    (base / "cgroup.subtree_control").write_text("cpu")
    assert CpuQuota(0.5, tmp_path).group.parent == base


# ---- shares and tables


def row(contender, machine, samples_s, **changes):
    case = {"work": "decode", "tokens": 4, **({MACHINE: machine} if machine else {})}
    return Result.of(Timing(tuple(samples_s)), bench="neighbours", case=case, contender=contender, backend="auto",
                     device="cpu", dtype="bfloat16", **changes)  # fmt: skip


def rows():
    quiet = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]  # the machine is half as fast in every second round
    return [
        row("peakgpt", QUIET, quiet),
        row("peakgpt", NEIGHBOURS[1], [t * f for t, f in zip(quiet, (2, 2, 2, 2, 1.25, 4, 4), strict=True)]),
        row("peakgpt", COPIES, [t / 0.97 for t in quiet]),
        row("eager", QUIET, [2 * t for t in quiet]),
        row("eager", NEIGHBOURS[1], [8 * t for t in quiet]),
    ]


def test_share_is_the_median_of_the_quotients_of_the_rounds():
    found = rows()
    share = quiet_share(found[0], found, NEIGHBOURS[1])
    assert (share.median, share.q25, share.q75) == (0.5, 0.375, 0.5)
    assert share.interval == pytest.approx((0.25, 0.8), rel=0.01)  # the extremes of 7 rounds
    assert share_text(share) == "50 % (38 to 50), 25 to 80"
    assert quiet_share(found[3], found, NEIGHBOURS[1]).median == 0.25
    assert quiet_share(found[3], found, COPIES) is None and share_text(None) == ""
    other_rounds = row("eager", COPIES, [1.0, 2.0])
    assert quiet_share(found[3], [other_rounds], COPIES) is None


def test_table_has_one_row_for_each_contender_and_no_empty_condition():
    headings, cells = filled_table(rows())
    assert headings == ["contender", "quiet tokens/s", NEIGHBOURS[1], COPIES, "rounds"]
    assert [line[0] for line in cells] == ["peakgpt", "eager"]
    assert cells[0][2].startswith("50 %") and cells[0][3].startswith("97 %") and cells[1][2].startswith("25 %")
    (text,) = tables(rows())
    assert len(text.strip().splitlines()) == 5 and "machine" not in text.splitlines()[4]


def test_contenders_are_compared_within_each_condition():
    (text,) = comparisons(rows())
    lines = text.splitlines()
    assert "2.00 x" in next(line for line in lines if "machine" not in line and "eager" in line)
    assert "4.00 x" in next(line for line in lines if f"machine {NEIGHBOURS[1]}" in line)


# ---- the case and its flags


def parsed(*flags, device=CPU):
    parser = argparse.ArgumentParser()
    neighbours.add_arguments(parser)
    return neighbours.cases(parser.parse_args(flags), device)


def test_cases_are_decoding_and_training_in_bfloat16():
    found = parsed()
    assert [case.name for case in found] == [
        "neighbours/decode/gpt2/1x16+32/bfloat16", "neighbours/decode/gpt2/8x16+32/bfloat16",
        "neighbours/train/gpt2/4x256/bfloat16",
    ]  # fmt: skip
    assert found[0].all_contenders(CPU) == ["peakgpt", "eager", "llama.cpp", "openvino"]
    assert found[2].all_contenders(CPU) == ["peakgpt", "eager, tuned malloc"]
    chosen = parsed("--streams", "3", "--dtype", "int8", "--dtype", "float32")
    assert [case.name.split("/", 1)[1] for case in chosen] == [
        "decode/gpt2/3x16+32/int8", "decode/gpt2/3x16+32/float32", "train/gpt2/4x256/float32"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--work", "train", "--streams", "2"), "got --streams without decoding, expected --work decode"),
        (("--work", "train", "--dtype", "int8"), "got --work train with --dtype int8, expected bfloat16 or float32"),
    ],
)
def test_flags_without_effect_are_errors(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(*flags)


def test_a_gpu_is_refused():
    with pytest.raises(ValueError, match="bench neighbours: got device cuda, expected --device cpu"):
        parsed(device=torch.device("cuda"))


def test_a_tiny_model_in_processes_with_real_neighbours(monkeypatch):
    failures = []
    config = preset("gpt2-tiny", n_layer=1, vocab_size=64, n_embd=48)
    inner = DecodeCase("tiny", config, Workload(1, 4, 2), "float32")
    monkeypatch.setattr(neighbours, "_quota", lambda stack: (None, "no quota here"))
    found = NeighboursCase(inner, rounds=2, only=("peakgpt",)).measure(CPU, lambda n, e: failures.append(n))
    assert failures == []
    machines = [*NEIGHBOURS.values(), COPIES]
    assert [(r.contender, r.case.get(MACHINE)) for r in found] == [
        ("peakgpt", machine) for machine in (None, *machines)
    ]
    assert all("no quota here" in r.note and r.case["work"] == "decode" and r.tokens_per_s > 0 for r in found)
    assert len({tuple(r.turns.rounds) for r in found}) == 1
