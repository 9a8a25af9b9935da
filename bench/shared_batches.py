"""Training of several contenders on the same batches, in alternating stretches of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

STRETCH = 10  # steps; long against the timer's resolution, short against changes of a shared machine's load


class SharedBatches:
    """Give every contender the same batches; a batch is kept until all contenders have taken it."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, contenders: Iterable[str]):
        self.batches, self.device = batches, device
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.taken = dict.fromkeys(contenders, 0)
        self.dropped = 0  # batches that every contender has taken

    def take(self, contender: str) -> tuple[Tensor, Tensor]:
        """Return the next batch of a contender."""
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
        """Stop keeping batches for a contender."""
        del self.taken[contender]


def stretch(
    name: str, trainer: Any, batches: SharedBatches, on_step: Callable[[str, int, float], None], steps: int = STRETCH
) -> Callable[[], None]:
    """Return a function that makes `steps` updates of a contender and calls on_step(name, step, loss) after each."""

    def run() -> None:
        for _ in range(steps):
            loss = trainer.step(*batches.take(name))
            on_step(name, trainer.done, float(loss))

    return run
