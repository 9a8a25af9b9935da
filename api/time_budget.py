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

    def left_s(self, phase: str, *, at_least: float = 0.0) -> float:
        """Return the seconds until a phase should end, `at_least` or more."""
        return max(at_least, self.ends[phase] * self.total_s - (self.clock() - self._start_s))

    def take(self, phase: str, items: Iterable[T], *, at_least: float = 0.0) -> Iterator[T]:
        """Yield items until the phase should end, the first one always, and for `at_least` seconds."""
        stop_s = self.clock() + self.left_s(phase, at_least=at_least)
        for item in items:
            yield item
            if self.clock() >= stop_s:
                return
