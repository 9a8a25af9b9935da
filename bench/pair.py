"""peakgpt and PyTorch eager on the same weights and batches, in alternating stretches of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

STRETCH = 10  # steps; long against a timer, short against a shared machine's moods


class SharedBatches:
    """Hands every contender the same batches: each draws on its own, what the slower has yet to take is kept."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, contenders: Iterable[str]):
        self.batches, self.device = batches, device
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.taken = dict.fromkeys(contenders, 0)
        self.dropped = 0  # batches that all have taken

    def take(self, contender: str) -> tuple[Tensor, Tensor]:
        """The next batch of this contender."""
        index = self.taken[contender] - self.dropped
        if index == len(self.kept):
            self.kept.append(tuple(t.to(self.device, non_blocking=True) for t in next(self.batches)))
        self.taken[contender] += 1
        pair = self.kept[index]
        while self.kept and min(self.taken.values()) > self.dropped:
            self.kept.pop(0)
            self.dropped += 1
        return pair

    def forget(self, contender: str) -> None:
        """Stop keeping batches for a contender that has ended."""
        del self.taken[contender]


def stretch(
    name: str, trainer: Any, batches: SharedBatches, on_step: Callable[[str, int, float], None], steps: int = STRETCH
) -> Callable[[], None]:
    """A function that makes `steps` updates of one contender and tells on_step(name, step, loss) of each."""

    def run() -> None:
        for _ in range(steps):
            loss = trainer.step(*batches.take(name))
            on_step(name, trainer.done, float(loss))

    return run
