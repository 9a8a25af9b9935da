"""Decoding steps, one new token per sequence, as CUDA graphs for a few batch sizes. Private to TorchExecutor.

A step of B sequences is padded to the next size of BATCH_SIZES. Its function is captured once per size and replayed:

    host      ids, positions, slots, lengths, block tables -> one pinned buffer, one copy to the graph's input
    graph     embedding .. head; nothing in it waits for the host or depends on values that only the host knows
    padding   sequences of length 0: their keys and values are not stored, and their attention is zero

Block tables have the width of the longest sequence. One graph per width would save nothing: a split of the keys that
begins after the end of a sequence returns at once, and splits share `decode_parts` programs, at most eight per
processor. The buffer takes 4 (4 + width) bytes a sequence: 5 KB for 64 sequences of GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.graph_capture import GraphedFunction, graph_factory
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.inference.paged_attention import TokenBatch

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a graph
MAX_BATCH = BATCH_SIZES[-1]
COLUMNS = 4  # integers of a sequence in addition to its block table: id, position, slot, length


def align_int32(count: int) -> int:
    """Round up to 16 bytes of int32: Triton compiles a kernel again for a pointer that is not 16-byte aligned."""
    return -(-count // 4) * 4


class DecodeGraphs:
    """Runs a function of a TokenBatch with one row per sequence: directly, or as a graph for each batch size."""

    def __init__(
        self, forward: Callable[[TokenBatch], Tensor], *, width: int, device: torch.device, obstacle: str | None = None
    ):
        """
        Args:
            forward: returns one row of logits per sequence.
            width: blocks of the longest sequence.
            device: of the model.
            obstacle: reason why no graph can be captured, if one is known.
        """
        self.forward, self.width, self.obstacle = forward, width, obstacle
        self.pin_memory = device.type == "cuda"
        self.make_graph = None if obstacle else graph_factory(device, share_memory=True)
        self.buffer = torch.zeros(self._buffer_size(MAX_BATCH), dtype=torch.int32, device=device)
        self.steps: dict[int, GraphedFunction] = {}  # by batch size

    def __call__(self, ids: Tensor | Sequence[int], positions: np.ndarray, block_tables: np.ndarray) -> Tensor:
        """Run one step without waiting for the device.

        Args:
            ids: (B,), at most MAX_BATCH; may be on the device.
            positions: (B,) position of each token in its sequence.
            block_tables: (B, width) int32.
        Returns:
            (B, V); the next step overwrites it.
        """
        count = len(positions)
        size = next(size for size in BATCH_SIZES if size >= count)
        numbers = torch.zeros(self._buffer_size(size), dtype=torch.int32, pin_memory=self.pin_memory)
        batch, blocks = self._token_batch(numbers, size), block_tables[np.arange(count), positions // BLOCK_TOKENS]
        batch.positions.numpy()[:count] = positions
        batch.slots.fill_(-1)
        batch.slots.numpy()[:count] = blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS
        batch.lengths.numpy()[:count] = positions + 1
        batch.block_tables.numpy()[:count] = block_tables
        on_host = not isinstance(ids, Tensor)
        if on_host:
            batch.ids.numpy()[:count] = ids
        self.buffer[: len(numbers)].copy_(numbers, non_blocking=True)
        if not on_host:
            self.buffer[:count].copy_(ids, non_blocking=True)
        if size not in self.steps:
            self.steps[size] = self._make_step(size)
        (logits,) = self.steps[size]()
        return logits[:count]

    def _token_batch(self, numbers: Tensor, size: int) -> TokenBatch:
        """Views of a step's integers, in the order in which they are stored."""
        *columns, tables = numbers.split([*[align_int32(size)] * COLUMNS, size * self.width])
        return TokenBatch(*(column[:size] for column in columns), tables.view(size, self.width))

    def _buffer_size(self, size: int) -> int:
        return COLUMNS * align_int32(size) + size * self.width

    def _make_step(self, size: int) -> GraphedFunction:
        batch, forward = self._token_batch(self.buffer[: self._buffer_size(size)], size), self.forward
        step = GraphedFunction(lambda: (forward(batch),), self.make_graph, lambda: None, copy_outputs=False)
        step.obstacle = self.obstacle or step.obstacle
        return step
