"""The clock of benchmarks and of measured peaks: seconds of a call on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def stopwatch(device: torch.device | str | None = None) -> Callable[..., float]:
    """Return a function that times calls on a device.

    Args:
        device: "cpu" (default) or a CUDA device.
    Returns:
        seconds(fn, calls=1) -> seconds of one call, the mean over `calls` consecutive calls. On a GPU by CUDA events
        after a synchronize, on a CPU by time.perf_counter.
    Raises:
        ValueError: not a cpu or cuda device.
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
