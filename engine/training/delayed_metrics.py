"""DelayedMetrics: read numbers from a GPU one step late, so that the host never waits for the running step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DelayedMetrics:
    """Copies one number per step from the device to the host, without waiting for the step that computes it."""

    def __init__(self, device: torch.device):
        self.device, self.pending = device, None

    def put(self, label: Any, value: Tensor) -> list[tuple[Any, float]]:
        """Start the copy of a number.

        Args:
            label: returned with the number, such as the step.
            value: a scalar on the device.
        Returns:
            [(label, number)] of the previous call on a GPU, of this call on other devices; or [].
        """
        if self.device.type != "cuda":
            return [(label, float(value))]
        arrived = self.take()
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.pending = (label, host, event)
        return arrived

    def take(self) -> list[tuple[Any, float]]:
        """Wait for the number of the last `put` and return [(label, number)]; [] if there is none."""
        if self.pending is None:
            return []
        (label, host, event), self.pending = self.pending, None
        event.synchronize()
        return [(label, float(host))]
