"""Loss spikes, handled as for PaLM: go back to an earlier checkpoint, and leave out the data around the spike.

A loss is a spike if it is above  mean + sigma * standard deviation  of the last `spike_window` losses. Chowdhery et al.
2022, "PaLM", arXiv:2204.02311, section 5.1, restarted from a checkpoint about 100 steps before the spike and skipped
200 to 500 batches: those since the checkpoint, and some after the spike. The same data did no harm with other weights.

The weights go back, the position in the data does not: no batch is seen twice, and a second spike meets other data.
Checkpoints after the one that was loaded are deleted, as they lead to the spike. A run that is killed before its next
save continues from that checkpoint, meets the same spike, and goes back in the same way, so that it has the same bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peakgpt.engine.training.train_config import TrainConfig

MAX_ROLLBACKS = 10  # to one checkpoint; more of them are a training that other data do not help


@dataclass(frozen=True)
class LossSpike:
    """A loss was a spike. The caller may go back with `CheckpointManager.roll_back`; otherwise the training goes on.

    Args:
        step: number of the update, from 1.
        loss: mean loss of its batch.
        threshold: the least loss that was a spike.
    """

    step: int
    loss: float
    threshold: float

    def __str__(self) -> str:
        return f"step {self.step}  loss spike {self.loss:.4f}, above {self.threshold:.4f}"

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl."""
        return {"step": self.step, "spike_loss": self.loss, "spike_threshold": self.threshold}


@dataclass(frozen=True)
class RolledBack:
    """The training went back because of a spike.

    Args:
        step: of the checkpoint that was loaded.
        spike: why.
        skipped_batches: left out after the batch of the spike.
    """

    step: int
    spike: LossSpike
    skipped_batches: int

    def __str__(self) -> str:
        return f"{self.spike}; back to step {self.step}, {self.skipped_batches} more batches left out"

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl."""
        return {**self.spike.row(), "step": self.step, "spike_step": self.spike.step,
                "skipped_batches": self.skipped_batches}  # fmt: skip


class SpikeDetector:
    """Compares each loss with those before it. A part of the loop: a checkpoint contains the losses."""

    def __init__(self, config: TrainConfig):
        """
        Args:
            config: has a spike_sigma.
        """
        self.sigma, self.losses = config.spike_sigma, deque[float](maxlen=config.spike_window)

    def check(self, step: int, loss: float) -> LossSpike | None:
        """Return the event of a finite loss that is a spike; the loss joins those that define the next one."""
        threshold = math.inf
        if (count := len(self.losses)) == self.losses.maxlen:
            mean = math.fsum(self.losses) / count
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self.losses) / count)
            threshold = mean + self.sigma * deviation
        self.losses.append(loss)
        return LossSpike(step, loss, threshold) if loss > threshold else None

    def state_dict(self) -> dict[str, Any]:
        """Return the losses."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the losses of `state_dict`."""
        self.losses = deque(state["losses"], self.losses.maxlen)
