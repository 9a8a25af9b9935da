"""The clock: every duration this project reports is taken and stored here.

    per round r and contender c:    t[c, r] = seconds of n_c calls / n_c, with n_c so that one timing lasts >= 2 ms
    disturbance of a round        = (busy ticks of other processes + stolen ticks) / all ticks of our CPUs
    ratio(a, b)                   = median over r of t[a, r] / t[b, r]

Contenders run round-robin, so that a slow second of the machine hits all of them, and ratios pair rounds for the same
reason. /proc/stat and /proc/self/stat: proc(5), Linux man-pages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from peakgpt.kernels.files import write_atomically

MIN_TIMING_S = 2e-3  # perf_counter and a thread pool's wake-up cost some 10 us: under 1 % of this
JUDGED_S = 0.2  # /proc/stat counts in 10 ms ticks: 0.2 s on one CPU is 20 ticks, so that 10 % is 2
TICK_ERROR = 2  # each reading may be off by one tick at either end
MAX_DISTURBANCE = 0.10
MIN_KEPT_SHARE, MIN_KEPT = 0.5, 3
REST_S = 0.02  # libgomp's threads spin for 7 ms after a parallel region (2-core Zen 4, 2026-11)


# ---- seconds


def stopwatch(device: torch.device | str | None = None) -> Callable[..., float]:
    """Return the function that times a call on a device.

    Args:
        device: "cpu" (default) or a CUDA device.
    Returns:
        seconds(fn, calls=1) -> seconds of one call, the mean over `calls` calls in a row: CUDA events after a
        synchronize on a GPU, time.perf_counter on a CPU.
    Raises:
        ValueError: another kind of device.
    """
    device = torch.device(device or "cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"can time on cpu or cuda, got device {str(device)!r}")

    def cpu_seconds(fn: Callable[[], Any], calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - start) / calls

    def cuda_seconds(fn: Callable[[], Any], calls: int = 1) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                fn()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return cuda_seconds if device.type == "cuda" else cpu_seconds


# ---- what else ran meanwhile


@dataclass(frozen=True)
class Ticks:
    """A reading of the kernel's CPU counters, in clock ticks summed over the CPUs we may run on."""

    total: int
    busy: int  # every process, ours included
    stolen: int  # taken by the hypervisor
    own: int  # this process, the children it has waited for, and its workers


def parse_ticks(stat: str, own_stats: Sequence[str], cpus: set[int]) -> Ticks:
    """Read the counters out of the text of /proc/stat and of /proc/PID/stat of each process that is ours.

    Args:
        stat: lines "cpuN user nice system idle iowait irq softirq steal ..." (user includes guest).
        own_stats: "pid (name) state ...", utime, stime, cutime, cstime as fields 14 to 17; name may hold spaces.
        cpus: numbers of the CPUs to count.
    """
    names = {f"cpu{n}" for n in cpus}
    rows = [list(map(int, f[1:9])) for f in map(str.split, stat.splitlines()) if f and f[0] in names]
    user, nice, system, idle, iowait, irq, softirq, stolen = map(sum, zip(*rows, strict=True))
    busy = user + nice + system + irq + softirq
    own = sum(int(ticks) for own in own_stats for ticks in own.rpartition(")")[2].split()[11:15])
    return Ticks(total=busy + idle + iowait + stolen, busy=busy, stolen=stolen, own=own)


def read_ticks(workers: Sequence[int] = ()) -> Ticks | None:
    """Read the counters now, the processes `workers` counted as ours; None where the system has no /proc/stat."""
    try:
        own = [Path(f"/proc/{pid}/stat").read_text() for pid in ("self", *workers)]
        return parse_ticks(Path("/proc/stat").read_text(), own, os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        return None


def disturbance(before: Ticks | None, after: Ticks | None) -> float:
    """Return the share of our CPUs' time that others took between two readings, 0..1; 0 when it can not be known.

    A child that is still running and no worker counts as foreign: the kernel adds its time to ours when it ends.
    """
    if before is None or after is None or after.total <= before.total:
        return 0.0
    foreign = (after.busy - before.busy) - (after.own - before.own)
    taken = max(foreign, 0) + (after.stolen - before.stolen) - TICK_ERROR
    return min(max(taken / (after.total - before.total), 0.0), 1.0)


def keep_undisturbed(disturbances: Sequence[float]) -> tuple[list[int], str]:
    """Choose the rounds to keep.

    Args:
        disturbances: share of foreign CPU per round, 0..1.
    Returns:
        (indices of the kept rounds in order, note): rounds over 10 % are dropped, but half of the rounds and at least
        three stay, the least disturbed. The note says what was dropped, or kept against the rule; else it is empty.
    """
    rounds = range(len(disturbances))
    quiet = [i for i in rounds if disturbances[i] <= MAX_DISTURBANCE]
    least = min(len(disturbances), max(MIN_KEPT, math.ceil(MIN_KEPT_SHARE * len(disturbances))))
    if len(quiet) >= least:
        dropped = len(disturbances) - len(quiet)
        return quiet, f"{dropped} rounds with over {MAX_DISTURBANCE:.0%} foreign CPU dropped" if dropped else ""
    kept = sorted(sorted(rounds, key=lambda i: disturbances[i])[:least])
    worst = max(disturbances[i] for i in kept)
    return kept, (
        f"disturbed: only {len(quiet)} of {len(disturbances)} rounds had at most {MAX_DISTURBANCE:.0%} foreign CPU; "
        f"kept the {least} least disturbed, up to {worst:.0%}"
    )


# ---- contenders


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    q25: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, q25, q75)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, one sample per kept round.

    Samples of contenders from one `interleave` pair up: sample i of each is from the same round.
    """

    samples_s: tuple[float, ...]
    dropped: int = 0  # rounds
    note: str = ""
    calls: int = 1  # per sample

    def __post_init__(self) -> None:
        if not self.samples_s:
            raise ValueError("expected at least one sample, got none")

    def noted(self, *notes: str) -> Timing:
        """The same with further notes."""
        return dataclasses.replace(self, note="; ".join(filter(None, [self.note, *notes])))

    def each(self, count: int) -> Timing:
        """Of one of `count` equal things that a call does."""
        return dataclasses.replace(self, samples_s=tuple(s / count for s in self.samples_s), calls=count * self.calls)

    @property
    def kept(self) -> int:
        return len(self.samples_s)

    @property
    def median_s(self) -> float:
        return Spread.of(self.samples_s).median

    @property
    def q25_s(self) -> float:
        return Spread.of(self.samples_s).q25

    @property
    def q75_s(self) -> float:
        return Spread.of(self.samples_s).q75


def ratio(a: Timing, b: Timing) -> Spread:
    """Return a's time over b's, the median and quartiles of the per-round ratios: above 1, b is faster.

    Raises:
        ValueError: the two do not come from the same rounds.
    """
    if a.kept != b.kept:
        raise ValueError(f"expected timings from the same rounds, got {a.kept} and {b.kept} samples")
    return Spread.of(tuple(x / y for x, y in zip(a.samples_s, b.samples_s, strict=True)))


def interleave(
    contenders: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str | None = None,
    budget_s: float | None = None,
    workers: Sequence[int] = (),
) -> dict[str, Timing]:
    """Time contenders round-robin; the order rotates by one each round.

    Args:
        contenders: name -> function without arguments; it must stand being called any number of times.
        rounds: timings per contender before any is dropped.
        warmup: untimed calls of each contender first.
        device: "cpu" (default) or a CUDA device.
        workers: process ids of running children that do the contenders' work. Before each timing there is a rest then,
            because one process' spinning threads would take a core from the next one.
        budget_s: start no new round after this many seconds, warm-up included, but run at least three.
    Returns:
        name -> Timing. On Linux CPUs, rounds with more than 10 % foreign CPU or steal time are dropped for all
        contenders alike, see `keep_undisturbed`; the counters are too coarse for one short round, so a run of rounds
        of at least 0.2 s is judged as one.
    Raises:
        ValueError: no contender, or rounds < 1, or warmup < 0.
    """
    if not contenders or rounds < 1 or warmup < 0:
        raise ValueError(
            f"expected contenders, rounds >= 1 and warmup >= 0, got {len(contenders)} contenders, "
            f"rounds={rounds}, warmup={warmup}"
        )
    seconds = _rested(stopwatch(device)) if workers else stopwatch(device)
    watch = (lambda: read_ticks(workers)) if torch.device(device or "cpu").type == "cpu" else lambda: None
    start = time.perf_counter()
    calls = {name: _calls(fn, warmup, seconds) for name, fn in contenders.items()}

    names, timed, disturbances = list(contenders), [], []
    while len(timed) < rounds and not _over(start, budget_s, len(timed)):
        before, block, first = watch(), time.perf_counter(), len(timed)
        while len(timed) < rounds and not _over(start, budget_s, len(timed)):
            turn = len(timed) % len(names)
            timed.append({n: seconds(contenders[n], calls[n]) for n in names[turn:] + names[:turn]})
            if time.perf_counter() - block >= JUDGED_S:
                break
        disturbances += [disturbance(before, watch())] * (len(timed) - first)

    kept, note = keep_undisturbed(disturbances)
    if len(timed) < rounds:
        note = "; ".join(filter(None, [f"{len(timed)} of {rounds} rounds fitted into {budget_s:g} s", note]))
    return {
        n: Timing(tuple(timed[i][n] for i in kept), dropped=len(timed) - len(kept), note=note, calls=calls[n])
        for n in names
    }


def _rested(seconds: Callable[..., float]) -> Callable[..., float]:
    def rest_and_time(fn: Callable[[], Any], calls: int = 1) -> float:
        time.sleep(REST_S)
        return seconds(fn, calls)

    return rest_and_time


def _calls(fn: Callable[[], Any], warmup: int, seconds: Callable[..., float]) -> int:
    """Warm fn up and return how many calls make a timing of MIN_TIMING_S."""
    for _ in range(warmup):
        fn()
    calls = 1
    # The quickest of three, because the first calls may still be cold; one look is enough far above the limit.
    while (seen_s := seconds(fn, calls) * calls) < 10 * MIN_TIMING_S:
        seen_s = min(seen_s, *(seconds(fn, calls) * calls for _ in range(2)))
        if seen_s >= MIN_TIMING_S:
            break
        calls = max(calls + 1, min(10 * calls, math.ceil(calls * MIN_TIMING_S / max(seen_s, 1e-9))))
    return calls


def _over(start: float, budget_s: float | None, done: int) -> bool:
    return budget_s is not None and done >= MIN_KEPT and time.perf_counter() - start > budget_s


# ---- results


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured case of one contender: the only schema that the trainer and the benchmarks write.

    `flops` are model FLOPs (6N + 12 L H Q T, for MFU) or work FLOPs (what the op must compute, causal = half, for
    rooflines); `flops_kind` says which, and the two never share a column.
    """

    bench: str
    case: dict[str, Any]  # shape and options, JSON values
    contender: str
    backend: str
    device: str
    dtype: str
    median_s: float
    q25_s: float
    q75_s: float
    rounds: int  # kept
    dropped: int
    samples_s: list[float] = field(default_factory=list)  # of the kept rounds; those of one case pair up
    flops: float | None = None  # per call
    flops_kind: str | None = None  # "model" or "work"
    bytes: float | None = None  # per call, that the op must move
    memory_bytes: int | None = None  # most that one call allocated on a GPU, or that a worker process held meanwhile
    base_bytes: int | None = None  # of that, what a worker process holds before it builds anything
    peak_flops_s: float | None = None
    peak_bytes_s: float | None = None
    peak_source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.q25_s <= self.median_s <= self.q75_s < math.inf:
            raise ValueError(
                f"expected 0 < q25_s <= median_s <= q75_s, got {self.q25_s}, {self.median_s}, {self.q75_s}"
            )
        if self.flops_kind not in ("model", "work", None) or (self.flops is None) != (self.flops_kind is None):
            raise ValueError(
                f"expected flops with flops_kind 'model' or 'work', or neither, got {self.flops}, {self.flops_kind!r}"
            )

    @classmethod
    def of(cls, timing: Timing, **fields: Any) -> Result:
        """Make the result of a timing; `fields` are the ones that a Timing does not know."""
        return cls(
            median_s=timing.median_s, q25_s=timing.q25_s, q75_s=timing.q75_s, samples_s=list(timing.samples_s),
            rounds=timing.kept, dropped=timing.dropped, note=timing.note, **fields,
        )  # fmt: skip

    @property
    def tflops(self) -> float | None:
        """TFLOP/s at the median."""
        return None if self.flops is None else self.flops / self.median_s / 1e12

    @property
    def gbs(self) -> float | None:
        """GB/s at the median, 1 GB = 1e9 bytes."""
        return None if self.bytes is None else self.bytes / self.median_s / 1e9

    @property
    def flops_fraction(self) -> float | None:
        """Achieved over peak FLOP/s, 0..1: MFU when flops_kind is "model"."""
        return self.tflops * 1e12 / self.peak_flops_s if self.tflops is not None and self.peak_flops_s else None

    @property
    def bytes_fraction(self) -> float | None:
        """Achieved over peak bytes/s, 0..1: MBU in decoding."""
        return self.gbs * 1e9 / self.peak_bytes_s if self.gbs is not None and self.peak_bytes_s else None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON values, without what can be derived."""
        return dataclasses.asdict(self)


SCHEMA = 2


def write_results(
    path: str | os.PathLike[str], results: Sequence[Result], environment: dict[str, Any], *,
    checks: Sequence[dict[str, Any]] = (), failures: Sequence[dict[str, Any]] = (),
) -> None:  # fmt: skip
    """Write results and where they come from as one JSON file, whole or not at all.

    Args:
        path: of the file; folders are made.
        results, environment: as measured, as `environment` gives it.
        checks: what was compared with float64, a row each (peakgpt.bench.check).
        failures: what could not be measured, a row each (peakgpt.bench.findings).
    """
    path = Path(path)
    document = {"schema": SCHEMA, "environment": environment, "results": [r.to_json() for r in results],
                "checks": list(checks), "failures": list(failures)}  # fmt: skip
    text = "{\n" + ",\n".join(f"{json.dumps(key)}: {_json_rows(value)}" for key, value in document.items()) + "\n}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{text}\n".encode())


def _json_rows(value: Any) -> str:
    """JSON with a line for each item of a list: two files compare well, and samples do not fill pages."""
    if not isinstance(value, list):
        return json.dumps(value, indent=1, allow_nan=False)
    return "[" + ",".join(f"\n{json.dumps(item, allow_nan=False)}" for item in value) + "]"


def read_results(path: str | os.PathLike[str]) -> tuple[list[Result], dict[str, Any]]:
    """Read back what `write_results` wrote.

    Returns:
        (results, environment).
    Raises:
        ValueError: not such a file, another schema, or an unknown or missing key.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a JSON file of results, got {os.fspath(path)}: {error}") from error
    _expect_keys(f"{os.fspath(path)}", document, {"schema", "environment", "results", "checks", "failures"})
    if document["schema"] != SCHEMA:
        raise ValueError(f"{os.fspath(path)}: expected schema {SCHEMA}, got {document['schema']!r}")
    fields = {f.name for f in dataclasses.fields(Result)}
    for i, row in enumerate(document["results"]):
        _expect_keys(f"{os.fspath(path)}, result {i}", row, fields)
    return [Result(**row) for row in document["results"]], document["environment"]


def _expect_keys(where: str, got: Any, expected: set[str]) -> None:
    if not isinstance(got, dict) or set(got) != expected:
        keys = set(got) if isinstance(got, dict) else set()
        raise ValueError(
            f"{where}: expected the keys of the result schema, got unknown {sorted(keys - expected)}, "
            f"missing {sorted(expected - keys)}"
        )


def environment(device: torch.device | str | None = None, *, commit: str | None = None) -> dict[str, Any]:
    """Describe where a measurement was taken, as JSON values.

    Args:
        device: "cpu" (default) or a CUDA device.
        commit: revision of the source, where the tree came without its history; else asked from git.
    Returns:
        date (UTC), commit, device (with driver and versions), clocks of a GPU (MHz, W, C; empty where nvidia-smi does
        not answer), threads, isa and the settings of the allocator.
    """
    from peakgpt.kernels.hardware.device import describe, gpu_clocks  # device.py measures with this clock

    device = torch.device(device or "cpu")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": dataclasses.asdict(describe(device)),
        "clocks": gpu_clocks(device),
        "threads": torch.get_num_threads(),
        "isa": describe("cpu").arch,
        "malloc": _malloc_settings(),
    }


def _commit() -> str | None:
    """Return HEAD, "+dirty" with changes, of the checkout that holds this very file; None outside one."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An environment may lie inside some other project's checkout: that one's HEAD is not ours.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _malloc_settings() -> dict[str, str]:
    """Return what changes how the C library gives out memory; fresh pages are half of eager's loss on CPU."""
    settings = {k: v for k, v in os.environ.items() if k == "GLIBC_TUNABLES" or k.startswith("MALLOC_")}
    if preload := os.environ.get("LD_PRELOAD"):
        settings["LD_PRELOAD"] = " ".join(Path(p).name for p in preload.replace(":", " ").split())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        settings["transparent_hugepage"] = pages.read_text().partition("[")[2].partition("]")[0]
    return settings
