"""Where a measurement was taken: commit, device, versions, threads, allocator settings."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.hardware.cpu_threads import cpu_quota
from peakgpt.kernels.hardware.device import describe, gpu_clocks


def environment(device: torch.device | str | None = None, *, commit: str | None = None) -> dict[str, Any]:
    """Describe where a measurement was taken, as JSON values.

    Args:
        device: "cpu" (default) or a CUDA device.
        commit: revision of the source. The default is read from git; pass it if the folder has no git history.
    Returns:
        date (UTC), commit, device (with driver and versions), clocks of a GPU (MHz, W, C; empty if nvidia-smi fails),
        threads, cpu_quota (CPUs whose time the process gets; None without a limit), isa and malloc (settings of the
        allocator).
    """
    device = torch.device(device or "cpu")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": dataclasses.asdict(describe(device)),
        "clocks": gpu_clocks(device),
        "threads": torch.get_num_threads(),
        "cpu_quota": cpu_quota(),
        "isa": describe("cpu").arch,
        "malloc": _malloc_settings(),
    }


def keep_pages_note(device: torch.device) -> str:
    """Use the allocator settings of peakgpt's Trainer for every contender in this process; return a note on them."""
    if device.type != "cpu":
        return ""
    reason = keep_pages()
    return f"the allocator is unchanged: {reason}" if reason else "freed memory is kept, for every contender"


def _commit() -> str | None:
    """Return HEAD of the checkout that holds this file, with "+dirty" if it has changes; None outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # The package may be installed inside the checkout of another project, whose HEAD is not ours.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _malloc_settings() -> dict[str, str]:
    """Return the allocator settings of the C library: on a CPU, page faults are half of the time that eager loses."""
    settings = {k: v for k, v in os.environ.items() if k == "GLIBC_TUNABLES" or k.startswith("MALLOC_")}
    if preload := os.environ.get("LD_PRELOAD"):
        settings["LD_PRELOAD"] = " ".join(Path(p).name for p in preload.replace(":", " ").split())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists():
        settings["transparent_hugepage"] = pages.read_text().partition("[")[2].partition("]")[0]
    return settings
