"""One new token for each of many sequences, as a graph for every few batch sizes.

A step of B sequences is padded to one of BUCKETS; its function is recorded once a bucket and replayed:

    host     ids, places, slots, lengths, tables -> one pinned buffer, one copy to where the graph reads them
    graph    embedding .. head; nothing in it waits for the host or depends on what only the host knows
    padding  sequences of length 0, whose keys and values go nowhere and whose attention is zero

Tables are as wide as the longest text. A width for each length would be one more graph each, and saves nothing: a part
of a split that a text does not have ends at once, and splits share `decode_parts` programs, at most eight a processor.
The buffer is 4 (4 + width) bytes a sequence: 5 KB for 64 of GPT-2's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.graph_capture import GraphedFunction, graph_factory
from peakgpt.engine.inference.block_pool import BLOCK
from peakgpt.engine.inference.paged_cache import Rows

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a graph
NUMBERS = 4  # of a sequence beside its table: id, place, slot, length


def on_16_bytes(count: int) -> int:
    """Where the int32s after `count` others begin: kernels are compiled anew for pointers that are not on 16 bytes."""
    return -(-count // 4) * 4


class DecodeGraphs:
    """Runs a function of Rows, one a sequence, as it is or as graphs."""

    def __init__(
        self, run: Callable[[Rows], Tensor], *, width: int, device: torch.device, obstacle: str | None = None
    ):
        """
        Args:
            run: gives a row of logits a sequence.
            width: blocks of the longest text.
            device: of the model.
            obstacle: why it can not be recorded, where that is known.
        """
        self.run, self.width, self.obstacle = run, width, obstacle
        self.pins = device.type == "cuda"
        self.record = None if obstacle else graph_factory(device, share_memory=True)
        self.held = torch.zeros(self._size(BUCKETS[-1]), dtype=torch.int32, device=device)
        self.steps: dict[int, GraphedFunction] = {}

    def __call__(self, ids: Tensor | Sequence[int], places: np.ndarray, tables: np.ndarray) -> Tensor:
        """Run one step; nothing waits for the device.

        Args:
            ids: (B,), at most BUCKETS[-1]; may lie on the device.
            places: (B,) integers, where each stands in its text.
            tables: (B, width) int32, each sequence's blocks.
        Returns:
            (B, V); overwritten by a later step.
        """
        count = len(places)
        bucket = next(b for b in BUCKETS if b >= count)
        numbers = torch.zeros(self._size(bucket), dtype=torch.int32, pin_memory=self.pins)
        rows = self._rows(numbers, bucket)
        rows.places.numpy()[:count] = places
        rows.slots.fill_(-1)
        rows.slots.numpy()[:count] = tables[np.arange(count), places // BLOCK] * BLOCK + places % BLOCK
        rows.lengths.numpy()[:count] = places + 1
        rows.tables.numpy()[:count] = tables
        known = not isinstance(ids, Tensor)
        if known:
            rows.ids.numpy()[:count] = ids
        self.held[: len(numbers)].copy_(numbers, non_blocking=True)
        if not known:
            self.held[:count].copy_(ids, non_blocking=True)
        if bucket not in self.steps:
            self.steps[bucket] = self._captured(bucket)
        (logits,) = self.steps[bucket]()
        return logits[:count]

    def _rows(self, numbers: Tensor, bucket: int) -> Rows:
        """A step's integers as they lie one after the other."""
        *columns, tables = numbers.split([*[on_16_bytes(bucket)] * NUMBERS, bucket * self.width])
        return Rows(*(column[:bucket] for column in columns), tables.view(bucket, self.width))

    def _size(self, bucket: int) -> int:
        return NUMBERS * on_16_bytes(bucket) + bucket * self.width

    def _captured(self, bucket: int) -> GraphedFunction:
        rows, run = self._rows(self.held[: self._size(bucket)], bucket), self.run
        step = GraphedFunction(lambda: (run(rows),), self.record, lambda: None, copy_outputs=False)
        step.obstacle = self.obstacle or step.obstacle
        return step
