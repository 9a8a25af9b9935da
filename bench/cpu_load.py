"""CPU time that other processes and the hypervisor take during a measurement, and which rounds to keep.

    disturbance of a round = (busy ticks of other processes + stolen ticks) / all ticks of our CPUs

/proc/stat and /proc/PID/stat: proc(5), Linux man-pages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TICK_ERROR = 2  # each reading may be off by one tick at either end
MAX_DISTURBANCE = 0.10
MIN_KEPT_SHARE, MIN_KEPT = 0.5, 3


@dataclass(frozen=True)
class Ticks:
    """A reading of the kernel's CPU counters: clock ticks, summed over the CPUs that this process may use."""

    total: int
    busy: int  # of every process, including ours
    stolen: int  # taken by the hypervisor
    own: int  # of this process, of the children it has waited for, and of its running workers


def parse_ticks(stat: str, own_stats: Sequence[str], cpus: set[int]) -> Ticks:
    """Parse the text of /proc/stat, and of /proc/PID/stat of each of our processes.

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
    """Read the counters; None without /proc/stat.

    Args:
        workers: ids of child processes whose time counts as ours.
    """
    try:
        own = [Path(f"/proc/{pid}/stat").read_text() for pid in ("self", *workers)]
        return parse_ticks(Path("/proc/stat").read_text(), own, os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        return None


def disturbance(before: Ticks | None, after: Ticks | None) -> float:
    """Return the share of our CPUs' time that other processes took between two readings: 0..1, 0 if unknown.

    A running child that is not a worker counts as foreign: the kernel adds its time to ours only when it ends.
    """
    if before is None or after is None or after.total <= before.total:
        return 0.0
    foreign = (after.busy - before.busy) - (after.own - before.own)
    taken = max(foreign, 0) + (after.stolen - before.stolen) - TICK_ERROR
    return min(max(taken / (after.total - before.total), 0.0), 1.0)


def keep_undisturbed(disturbances: Sequence[float]) -> tuple[list[int], str]:
    """Choose the rounds to keep.

    Args:
        disturbances: share of foreign CPU time of each round, 0..1.
    Returns:
        (indices of the kept rounds in order, note). Rounds over 10 % are dropped, but at least half of the rounds and
        at least three stay: the least disturbed. The note is empty if nothing was dropped or kept against the rule.
    """
    rounds = range(len(disturbances))
    quiet = [i for i in rounds if disturbances[i] <= MAX_DISTURBANCE]
    minimum = min(len(disturbances), max(MIN_KEPT, math.ceil(MIN_KEPT_SHARE * len(disturbances))))
    if len(quiet) >= minimum:
        dropped = len(disturbances) - len(quiet)
        return quiet, f"{dropped} rounds with over {MAX_DISTURBANCE:.0%} foreign CPU dropped" if dropped else ""
    kept = sorted(sorted(rounds, key=lambda i: disturbances[i])[:minimum])
    worst = max(disturbances[i] for i in kept)
    return kept, (
        f"disturbed: only {len(quiet)} of {len(disturbances)} rounds had at most {MAX_DISTURBANCE:.0%} foreign CPU; "
        f"kept the {minimum} least disturbed, up to {worst:.0%}"
    )
