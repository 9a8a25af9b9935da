"""A CPU quota, as containers have it, by a control group of version 2: cpu.max of cgroups(7).

There is no other way to one here: stopping and continuing a process by signals, as cpulimit does, takes the CPU from
all of its threads at the same times, and a quota does not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PERIOD_US = 100_000  # the kernel's default


class CpuQuota:
    """A control group whose threads together get the time of some CPUs, on any of the CPUs."""

    def __init__(self, cpus: float, root: Path = Path("/")):
        """
        Args:
            cpus: seconds of CPU time in each second.
            root: of the file system; for tests.
        Raises:
            OSError: there is no control group of version 2 to make, or it may not be written.
        """
        base = root / "sys/fs/cgroup"
        self.home = _group_of_this_process(root, base)
        self.group = _parent_with_quotas(self.home, base) / f"peakgpt-bench-{os.getpid()}"
        self.group.mkdir()
        try:
            (self.group / "cpu.max").write_text(f"{round(cpus * PERIOD_US)} {PERIOD_US}")
            with self.limits(os.getpid()):  # shows that processes may be moved
                pass
        except OSError:
            self.close()
            raise

    @contextlib.contextmanager
    def limits(self, pid: int) -> Iterator[None]:
        """Keep a process in the group, with all of its threads, until the context ends."""
        (self.group / "cgroup.procs").write_text(str(pid))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                (self.home / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group. No process may be in it."""
        self.group.rmdir()


def _group_of_this_process(root: Path, base: Path) -> Path:
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    group = base / path.lstrip("/")
    # In a container without a namespace of its own the path is not there, and the base is its group.
    return group if group.is_dir() else base


def _parent_with_quotas(group: Path, base: Path) -> Path:
    """Return the nearest group, from `group` up to `base`, whose children have a cpu.max."""
    while group != base.parent:
        with contextlib.suppress(OSError):
            if "cpu" in (group / "cgroup.subtree_control").read_text().split():
                return group
        group = group.parent
    raise OSError("no control group of version 2 above this process gives its children a cpu.max")
