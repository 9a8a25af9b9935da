"""A model's ops over new tokens of many sequences at once, against a cache in blocks.

The rows of all sequences go through the model together, so that weights are read once a step. A step of one new token
for each sequence, which most steps are, is padded to one of BUCKETS sequences and on a GPU replayed as one graph:

    host     ids, places, slots, lengths, tables -> one pinned buffer, one copy to where the graph reads them
    graph    embedding .. head, which reads them there
    padding  sequences of length 0, whose keys and values go to the spare block and whose attention is zero

Tables are as wide as the longest text: parts of splits that a text does not have end at once, and were they cut to the
longest text of the step, each width would be another graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.capture import Captured, recorder_for
from peakgpt.engine.paged import BLOCK, Chunk
from peakgpt.engine.paged_cache import PagedCache, PagedMemory, Rows
from peakgpt.engine.positions import Positions, alibi_slopes, rotary_table

if TYPE_CHECKING:
    from peakgpt.engine.model import GPT

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a graph; steps of more run as they are


class PagedRunner:
    """A model as it is, with the cache of all its sequences; see Runner."""

    def __init__(self, model: GPT, *, blocks: int, reason: str = ""):
        """
        Args:
            model: without relative positions, on any device.
            blocks: of the cache, BLOCK tokens each.
            reason: for not being the CPU program.
        """
        c, weight = model.config, model.transformer.wte.weight
        self.model, self.config, self.reason, self.device = model, c, reason, weight.device
        self.memory = PagedMemory(c, blocks, dtype=weight.dtype, device=weight.device)
        self.turns = rotary_table(c.rotary_dim, c.rotary_base, 0, c.block_size, self.device) if c.rotary_dim else None
        self.slopes = alibi_slopes(c.n_head, self.device) if c.position == "alibi" else None
        self.width = -(-c.block_size // BLOCK)
        self.held = torch.zeros(BUCKETS[-1] * (4 + self.width), dtype=torch.int32, device=self.device)
        self.steps: dict[int, Captured] = {}

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks once.

        Returns:
            (sum of `logits`, V) float32 on the model's device: each chunk's last tokens, in order. The next step may
            overwrite them.
        Raises:
            ValueError: an id out of range, more tokens than block_size, or too few blocks.
        """
        for chunk in chunks:
            chunk.check(self.config, self.memory.blocks)
        ids = [i for chunk in chunks for i in (chunk.ids.tolist() if isinstance(chunk.ids, Tensor) else chunk.ids)]
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"runner: ids from {min(ids)} to {max(ids)}, expected 0 to vocab_size "
                             f"{self.config.vocab_size} - 1")  # fmt: skip
        if len(chunks) <= BUCKETS[-1] and all(len(chunk.ids) == chunk.logits == 1 for chunk in chunks):
            tables = np.zeros((len(chunks), self.width), dtype=np.int32)
            for row, chunk in zip(tables, chunks, strict=True):
                row[: len(chunk.blocks)] = chunk.blocks
            return self.decode(ids, np.array([chunk.past for chunk in chunks]), tables)
        return self._pass(self._rows(chunks, ids))

    # ---- any step

    def _rows(self, chunks: Sequence[Chunk], ids: list[int]) -> Rows:
        places, slots, take = [], [], []
        begins = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
        for chunk, end in zip(chunks, begins[1:], strict=True):
            own = range(chunk.past, chunk.past + len(chunk.ids))
            places += own
            slots += [chunk.blocks[place // BLOCK] * BLOCK + place % BLOCK for place in own]
            take += range(end - chunk.logits, end)
        width = max(-(-(chunk.past + len(chunk.ids)) // BLOCK) for chunk in chunks)
        tables = [[*chunk.blocks[:width], *[0] * (width - len(chunk.blocks))] for chunk in chunks]
        lengths = [chunk.past + len(chunk.ids) for chunk in chunks]
        parts = (ids, places, slots, lengths, begins, take, [block for table in tables for block in table])
        numbers = torch.tensor([n for part in parts for n in part], dtype=torch.int32, pin_memory=self._pins)
        numbers = numbers.to(self.device, non_blocking=True).split([len(part) for part in parts])
        ids, places, slots, lengths, begins, take, tables = numbers
        fresh = not any(chunk.past for chunk in chunks)
        return Rows(ids, places, slots, lengths, tables.view(-1, width), begins, take, fresh)

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    def _pass(self, rows: Rows) -> Tensor:
        """The logits of the rows that are taken, (R, V)."""
        turns = None
        if self.turns is not None:
            turns = tuple(table.index_select(0, rows.places) for table in self.turns)
        where = Positions(turns, self.config.rotary_interleaved, self.slopes)
        h = self.model.rows(rows.ids, rows.places, where, PagedCache(self.memory, rows))
        return self.model.head(h if rows.take is None else h.index_select(0, rows.take)).float()

    # ---- one new token each

    def decode(self, ids: Tensor | Sequence[int], places: np.ndarray, tables: np.ndarray) -> Tensor:
        """Run one new token of each of B sequences.

        Args:
            ids: (B,), at most BUCKETS[-1]; a tensor may lie on the device: it is not waited for.
            places: (B,) integers, where each stands in its text.
            tables: (B, block_size / BLOCK rounded up) int32, each sequence's blocks.
        Returns:
            (B, V) float32. The next step may overwrite them.
        """
        count = len(places)
        bucket = next(b for b in BUCKETS if b >= count)
        numbers = torch.zeros(bucket * (4 + self.width), dtype=torch.int32, pin_memory=self._pins)
        put = self._parts(numbers, bucket)
        put.places.numpy()[:count] = places
        put.slots.fill_(self.memory.blocks * BLOCK)
        put.slots.numpy()[:count] = tables[np.arange(count), places // BLOCK] * BLOCK + places % BLOCK
        put.lengths.numpy()[:count] = places + 1
        put.tables.numpy()[:count] = tables
        if not isinstance(ids, Tensor):
            put.ids.numpy()[:count] = ids
        self.held[: len(numbers)].copy_(numbers, non_blocking=True)
        if isinstance(ids, Tensor):
            self.held[:count].copy_(ids, non_blocking=True)
        if bucket not in self.steps:
            self.steps[bucket] = self._captured(bucket)
        (logits,) = self.steps[bucket]()
        return logits[:count]

    def _parts(self, numbers: Tensor, bucket: int) -> Rows:
        """A step's numbers as they lie in one buffer."""
        ids, places, slots, lengths, tables = numbers.split([*[bucket] * 4, bucket * self.width])
        return Rows(ids, places, slots, lengths, tables.view(bucket, self.width))

    def _captured(self, bucket: int) -> Captured:
        rows = self._parts(self.held[: bucket * (4 + self.width)], bucket)
        return Captured(lambda: (self._pass(rows),), recorder_for(self.device), lambda: None)
