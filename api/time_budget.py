"""The wall time of a command, shared by its phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class TimeBudget:
    """When each phase of a command should end. A phase that needs less leaves the rest to the later ones."""

    def __init__(self, total_s: float, ends: Mapping[str, float], clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            total_s: of the command, from now on.
            ends: for each phase the share of the total, 0..1, at which it should end.
            clock: seconds.
        """
        self.total_s, self.ends, self.clock = total_s, ends, clock
        self._start_s = clock()

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._start_s

    def left_s(self, phase: str) -> float:
        """Return the seconds until a phase should end; 0 after it."""
        return max(0.0, self.ends[phase] * self.total_s - self.spent_s)

    def take(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Yield items until the phase should end, and the first one always."""
        for item in items:
            yield item
            if self.left_s(phase) == 0.0:
                return
