"""Memory that a process can still take, and the most that it has taken.

On Linux the limits of control groups count: cgroups(7), version 2 and version 1.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path("/")
# Version -> folder of the hierarchy, files of the limit and of the use, and the cached files that can be dropped.
VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
VERSION_1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SWAP_2 = ("memory.swap.max", "memory.swap.current")


def available_bytes(device: torch.device, *, with_swap: bool = False, root: Path = ROOT) -> int:
    """Return the bytes that this process can still take on a device.

    Args:
        device: a CUDA device, or the CPU within the limits of the control groups.
        with_swap: count the CPU's free swap too.
        root: of the file system, for tests.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    system = _meminfo(root)
    if not system:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # not Linux: half of all memory
    swap = system.get("SwapFree", 0) if with_swap else 0
    free = system["MemAvailable"] + swap
    for memory_left, swap_left in _limits(root):
        free = min(free, memory_left + min(swap, swap_left))
    return free


def reset_peak(device: torch.device) -> None:
    """Begin to count `peak_bytes` anew, from the memory that this process has now; on Linux and on GPUs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or a file system that is read-only
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has had: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, TypeError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def used_bytes(device: torch.device) -> int:
    """Return the memory that this process has now; 0 if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _meminfo(root: Path) -> dict[str, int]:
    """Return name -> bytes of /proc/meminfo; empty if there is none."""
    with suppress(OSError):
        found = re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        sizes = {name: 1024 * int(size) for name, size in found}
        return sizes if "MemAvailable" in sizes else {}
    return {}


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (memory left, swap left) in bytes of each limited control group that this process is in."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                folder, limit, used, cache = VERSION_2 if controllers == "" else VERSION_1
                base = root / folder
                group = base / path.lstrip("/")
                # In a container without a namespace of its own the path is not there, and the base is its group.
                while group != base.parent:
                    if (left := _left(group, limit, used)) is not None:
                        left += _statistic(group, cache)
                        swap = _left(group, *SWAP_2) if controllers == "" else 0
                        yield left, sys.maxsize if swap is None else swap
                    group = group.parent


def _left(group: Path, limit: str, used: str) -> int | None:
    """Return limit - used in bytes; None without a limit."""
    with suppress(OSError, ValueError):  # ValueError: "max", no limit
        return max(int((group / limit).read_text()) - int((group / used).read_text()), 0)
    return None


def _statistic(group: Path, name: str) -> int:
    with suppress(OSError, TypeError):
        return int(re.search(rf"^{name} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)[1])
    return 0
