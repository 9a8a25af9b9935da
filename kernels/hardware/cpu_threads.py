"""The number of threads of a kernel on a CPU: torch's, but no more than its quota of CPU time keeps busy.

torch chooses the number of physical cores, unless the user sets another one. A container may see many cores and get the
time of a few: with a quota of one CPU, two threads run for half of each period of 100 ms, and stand still for the other
half. One thread does the same work and never stands still.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the number of CPUs whose time the control groups of this process grant it; None without a limit.

    Each group above that of the process limits it too: the smallest quota counts. Linux describes the files in
    Documentation/admin-guide/cgroup-v2.rst (cpu.max) and, for version 1, Documentation/scheduler/sched-bwc.rst.

    Args:
        root: the root of the file system.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = [quota for group in groups for quota in _quotas(root / "sys/fs/cgroup", *group.split(":", 2)[1:])]
    return min(quotas, default=None)


def _quotas(mounts: Path, controllers: str, path: str) -> Iterator[float]:
    """Yield the quotas of a group and of those above it. In a container the upper part of the path may be missing."""
    if controllers == "":  # version 2
        mount, files = mounts, ("cpu.max",)
    elif "cpu" in controllers.split(","):
        mount, files = mounts / "cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    else:
        return
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder.is_relative_to(mount):
            with contextlib.suppress(OSError, ValueError):  # the root of version 2 has no such file
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if quota.isdigit():  # not "max" or "-1"
                    yield int(quota) / int(period)


def limited_threads(quota: float | None) -> Callable[[], int]:
    """Return a function that returns torch's number of threads, limited by a quota of CPUs."""
    if quota is None:
        return torch.get_num_threads  # called for each kernel
    most = math.ceil(quota)
    return lambda: min(torch.get_num_threads(), most)


threads = limited_threads(cpu_quota())


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch's operators of this thread on `count` threads inside the block."""
    before = torch.get_num_threads()
    if count == before:  # setting the same number would clear the caches of oneDNN
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
