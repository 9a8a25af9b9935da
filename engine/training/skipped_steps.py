"""Report updates whose loss or gradient norm is not finite, and end the run after MAX_IN_A_ROW of them.

AdamW does not change the weights in such an update (kernels/ops/adamw.py), and training continues with the next batch.
One such update may be a bad batch or an overflow. Many in a row mean that the model is broken. Nothing is saved until
an update is finite again, so the last checkpoint is the last good state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_IN_A_ROW = 10


class Diverged(FloatingPointError):
    """The numbers of a training are not finite any more, and will not become finite."""


@dataclass(frozen=True)
class SkippedStep:
    """An update was skipped, because its loss or gradient norm was not finite.

    Args:
        step: its number, from 1.
        loss: mean loss of its batch.
        grad_norm: norm of the gradients before clipping.
        batch: which data it was, in words.
    """

    step: int
    loss: float
    grad_norm: float
    batch: str

    def __str__(self) -> str:
        return f"step {self.step}  skipped: {self.reason}; batch: {self.batch}"

    @property
    def reason(self) -> str:
        """What is not finite."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        return f"the norm of the gradients is {self.grad_norm}"

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl."""
        return {"step": self.step, "skipped": self.reason, "batch": self.batch}


class SkippedSteps:
    """Counts the updates in a row that were skipped.

    Attributes:
        in_a_row: how many of the last updates were skipped. Do not save if there are any.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def check(self, step: int, loss: float, grad_norm: float, describe: Callable[[], str]) -> SkippedStep | None:
        """Return the event of an update that was skipped; None if its numbers are finite.

        Args:
            step, loss, grad_norm: as in `SkippedStep`.
            describe: returns the batch in words.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        return SkippedStep(step, loss, grad_norm, describe())

    def require_end(self, step: int, *, finished: bool) -> None:
        """Check whether the training can go on, or can end.

        Raises:
            Diverged: the last MAX_IN_A_ROW updates were skipped, or the run has finished with a skipped update.
        """
        if self.in_a_row >= MAX_IN_A_ROW or (finished and self.in_a_row):
            raise Diverged(
                f"step {step}: the last {self.in_a_row} updates were skipped, because their losses or gradients are "
                "not finite, expected finite numbers"
            )
