"""Page faults of a process, and the cost of a fresh page.

A fault that the kernel serves from memory is minor, one that reads a disk is major (proc(5), /proc/PID/stat fields 10
and 12). If a hypervisor takes pages from an idle guest, the guest counts no fault when it uses them again: the access
is only slower. `interleave` detects this by the first call of a turn.
"""

from __future__ import annotations

import mmap
import statistics
import time
from pathlib import Path

import numpy as np

FRESH_BYTES = 16 << 20
FRESH_REPEATS = 5


def read_faults(pid: int | None = None) -> tuple[int, int] | None:
    """Return the (minor, major) page faults of a process so far; None without /proc or without the process.

    Args:
        pid: of the process; None means this one.
    """
    try:
        return parse_faults(Path(f"/proc/{pid or 'self'}/stat").read_text())
    except OSError:
        return None


def parse_faults(stat: str) -> tuple[int, int]:
    """Parse /proc/PID/stat: "pid (name) state ...", minflt as field 10, majflt as 12; name may hold spaces."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[7]), int(fields[9])


def fresh_page_s() -> float:
    """Measure what the first write to a page costs: seconds per page of the system's page size, the median of some.

    It depends on the machine, on what a hypervisor does with the memory, and on the system's setting for huge pages.
    """
    return statistics.median(_first_touch_s() for _ in range(FRESH_REPEATS))


def _first_touch_s() -> float:
    with mmap.mmap(-1, FRESH_BYTES) as memory:
        pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        first_s, again_s = (_write_s(pages) for _ in range(2))
        count = len(pages)
        del pages  # a view would keep the mapping open
    return max(first_s - again_s, 0.0) / count


def _write_s(pages: np.ndarray) -> float:
    start = time.perf_counter()
    pages[:] = 1
    return time.perf_counter() - start
