"""Peak memory of a call on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_allocated_bytes(fn: Callable[[], Any], device: torch.device) -> int | None:
    """Call fn once and return the peak of allocated bytes minus those allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    return torch.cuda.max_memory_allocated(device) - before
