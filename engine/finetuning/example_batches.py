"""Training batches of examples, epoch after epoch, each in a random order.

The order of an epoch comes from the raw words of Philox with the key (seed, epoch), as in engine/data/batches.py. A
batch may span two epochs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from peakgpt.engine.finetuning.examples import Examples, token_count
from peakgpt.engine.finetuning.task import Task


class ExampleBatches:
    """An endless iterator over batches of a task.

    Attributes:
        tokens_seen: tokens of all batches that this object has returned, without padding.
    """

    def __init__(self, examples: Examples, task: Task, batch: int, seed: int):
        """
        Args:
            examples: the rows of batches, at least one.
            task: collates them.
            batch: B.
            seed: 0 to 2^64 - 1; seed and epoch determine the order.
        """
        self.examples, self.task, self.batch, self.seed = examples, task, batch, seed
        self.tokens_seen = 0
        self._go_to(0, 0)

    def __iter__(self) -> ExampleBatches:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        return self.take(self.batch)

    def take(self, rows: int) -> tuple[Tensor, ...]:
        """Return a batch of the next rows."""
        examples = [self.examples[self._next()] for _ in range(rows)]
        self.tokens_seen += sum(map(token_count, examples))
        return self.task.collate(examples)

    def skip(self, rows: int) -> None:
        """Leave out the next batch of this number of rows."""
        for _ in range(rows):
            self._next()

    def describe(self, position: dict[str, Any], rows: int) -> str:
        """Say which rows the batch of this number of rows after a position has, in words."""
        batches = ExampleBatches(self.examples, self.task, self.batch, self.seed)
        batches.load_state_dict(position)
        numbers = [batches._next() for _ in range(rows)]
        return f"epoch {batches.epoch}, rows {', '.join(map(str, numbers[:8]))}{' ...' if rows > 8 else ''}"

    def _next(self) -> int:
        """Return the number of the next row, and move behind it."""
        if self.index == len(self.order):
            self._go_to(self.epoch + 1, 0)
        self.index += 1
        return int(self.order[self.index - 1])

    def _go_to(self, epoch: int, index: int) -> None:
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(len(self.examples))
        self.epoch, self.index, self.order = epoch, index, np.argsort(words, kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the data and seed that it belongs to."""
        return {"data": self.examples.digest, "seed": self.seed, "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the next rows are those that would have followed it.

        Raises:
            ValueError: the state belongs to other data or another seed, or is outside of the epoch; nothing changes.
        """
        for key, value in {"data": self.examples.digest, "seed": self.seed}.items():
            if state.get(key) != value:
                raise ValueError(f"data position: got {key}={state.get(key)!r}, expected {value!r}")
        epoch, index = state.get("epoch"), state.get("index")
        if type(epoch) is not int or type(index) is not int or epoch < 0 or not 0 <= index <= len(self.examples):
            raise ValueError(f"data position: got epoch={epoch!r}, index={index!r}, expected integers from 0 and index "
                             f"to {len(self.examples)}")  # fmt: skip
        self._go_to(epoch, index)
