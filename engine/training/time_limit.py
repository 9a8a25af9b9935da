"""Plan the steps of a run that must end at a given time, whatever the machine does.

    steps = done + (time left - reserve) / seconds of a step

The plan is made again before every step. The learning rate follows, because it depends on the share of the planned
steps that is done: a slower machine gets a shorter schedule, and the schedule is complete. The seconds of a step are
the mean over the last steps: over many while much time is left, so that one slow step changes little, and over few near
the end, so that the plan is exact.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

SHARE = 0.1  # of the time left: so long a part of the past counts
MIN_STEPS, MAX_STEPS = 4, 256  # of this part
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
        self._steps: deque[float] = deque(maxlen=MAX_STEPS)  # seconds
        self._observed = 0

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

        None fits if there is less time than the last step took. The first step compiles and allocates, so the second
        one fits into half of its time; the first does not count once there is a second.
        """
        left_s, reserve_s = self.left_s, self.reserve_s()
        if self._observed == 1:  # a reserve computed from the first step may be too high
            if left_s < self._steps[0]:
                return int(left_s >= self._steps[0] / 2)
            reserve_s = min(reserve_s, left_s / 2)
            return max(1, int((left_s - reserve_s) / self._steps[0]))
        left_s -= reserve_s
        if left_s < self._steps[-1]:
            return 0
        count, total_s = 0, 0.0
        for step_s in reversed(self._steps):
            if count >= MIN_STEPS and total_s >= SHARE * left_s:
                break
            count, total_s = count + 1, total_s + step_s
        return int(left_s * count / total_s)

    @property
    def typical_step_s(self) -> float:
        """Median seconds of the last steps, which a few slow ones do not change; 0 before the first step."""
        return statistics.median_low(self._steps) if self._steps else 0.0

    def observe(self, step_s: float) -> None:
        """Take the seconds of a step into account."""
        if self._observed == 1:
            self._steps.clear()
        self._observed += 1
        self._steps.append(step_s)
