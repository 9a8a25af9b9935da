"""Plan the steps of a run that must end at a given time, whatever the machine does.

    steps = done + (time left - reserve) / seconds of a step

The plan is made again before every step. The learning rate follows, because it depends on the share of the planned
steps that is done: a slower machine gets a shorter schedule, and the schedule is complete.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

RECENT = 8  # steps whose speed is the present speed of the machine
UNMEASURED_STEPS = 1 << 20  # planned before the first step is measured


class Planned(Protocol):
    """A Trainer, as far as its plan is concerned."""

    steps: int
    steps_done: int


class TimeLimit:
    """Changes the number of planned steps so that the run ends in time."""

    def __init__(
        self, left_s: float, *, max_steps: int | None = None, reserve_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        """
        Args:
            left_s: seconds until the run should end, from now on.
            max_steps: never plan more steps; None: as many as fit.
            reserve_s: returns the seconds that the work after the last step will take, such as the last validation.
            clock: seconds.
        """
        self.end_s, self.max_steps, self.reserve_s, self.clock = clock() + left_s, max_steps, reserve_s, clock
        self._steps: deque[float] = deque(maxlen=RECENT)  # seconds

    @property
    def left_s(self) -> float:
        """Seconds until the run should end; negative after it."""
        return self.end_s - self.clock()

    def plan(self, trainer: Planned) -> None:
        """Plan the steps that are left; call it before each step, and after work that is no step."""
        most = UNMEASURED_STEPS if self.max_steps is None else self.max_steps
        planned = trainer.steps_done + self.fitting_steps() if self._steps else most
        trainer.steps = max(trainer.steps_done, min(planned, most))

    def fitting_steps(self) -> int:
        """Return the number of steps that fit into the time that is left; at least one step must have been observed.

        The speed is the mean of the last few steps, or of the last one alone if it was slower: a step that would end
        too late is not begun.
        """
        step_s = max(sum(self._steps) / len(self._steps), self._steps[-1])
        return max(0, int((self.left_s - self.reserve_s()) / step_s))

    def observe(self, step_s: float) -> None:
        """Take the seconds of a step into account."""
        self._steps.append(step_s)
