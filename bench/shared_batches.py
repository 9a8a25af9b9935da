"""The same batches for several contenders that train in turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

STRETCH = 10  # steps per turn: far longer than the resolution of the timer, shorter than load changes of the machine


class SharedBatches:
    """Give every contender the same batches; a batch is kept until all contenders have taken it."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, contenders: Iterable[str]):
        self.batches, self.device = batches, device
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.taken = dict.fromkeys(contenders, 0)
        self.dropped = 0  # batches that every contender has taken

    def take(self, contender: str) -> tuple[Tensor, Tensor]:
        """Return the next batch of a contender."""
        index = self.taken[contender] - self.dropped
        if index == len(self.pending):
            self.pending.append(tuple(t.to(self.device, non_blocking=True) for t in next(self.batches)))
        self.taken[contender] += 1
        pair = self.pending[index]
        while self.pending and min(self.taken.values()) > self.dropped:
            self.pending.pop(0)
            self.dropped += 1
        return pair

    def remove(self, contender: str) -> None:
        """Remove a contender, so that no batch is kept for it."""
        del self.taken[contender]
