"""DelayedMetrics: read numbers from a GPU one step late, so that the host never waits for the running step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DelayedMetrics:
    """Copies numbers of each step from the device to the host, without waiting for the step that computes them."""

    def __init__(self, device: torch.device):
        self.device, self.pending = device, None

    def put(self, label: Any, *values: Tensor) -> list[tuple[Any, ...]]:
        """Start the copy of the numbers of a step.

        Args:
            label: returned with the numbers, such as the step.
            values: scalars on the device.
        Returns:
            [(label, *numbers)] of the previous call on a GPU, of this call on other devices; or [].
        """
        if self.device.type != "cuda":
            return [(label, *map(float, values))]
        arrived = self.take()
        hosts = [torch.empty((), dtype=value.dtype, pin_memory=True) for value in values]
        for host, value in zip(hosts, values, strict=True):
            host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.pending = (label, hosts, event)
        return arrived

    def take(self) -> list[tuple[Any, ...]]:
        """Wait for the numbers of the last `put` and return [(label, *numbers)]; [] if there are none."""
        if self.pending is None:
            return []
        (label, hosts, event), self.pending = self.pending, None
        event.synchronize()
        return [(label, *map(float, hosts))]
