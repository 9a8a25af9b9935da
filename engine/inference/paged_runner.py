"""A model's ops over new tokens of many sequences at once, against a cache in blocks.

The rows of all sequences go through the model together, so that weights are read once a step; only rows whose logits
are wanted go through the head. A step of one new token for each sequence, which most steps are, is one graph on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK, Chunk
from peakgpt.engine.inference.decode_graphs import BUCKETS, DecodeGraphs, on_16_bytes
from peakgpt.engine.inference.paged_cache import PagedCache, PagedMemory, Rows
from peakgpt.engine.model.positions import Positions, alibi_slopes, rotary_table

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer


class PagedRunner:
    """A model as it is, with the cache of all its sequences; see Runner."""

    def __init__(self, model: Transformer, *, blocks: int, reason: str = "", cache: str | None = None):
        """
        Args:
            model: without relative positions, on any device.
            blocks: of the cache, BLOCK tokens each.
            reason: for not being the CPU program.
            cache: "int8" keeps keys and values in bytes; None in the model's dtype.
        """
        c, weight = model.config, model.transformer.wte.weight
        self.model, self.config, self.reason, self.device = model, c, reason, weight.device
        self.memory = PagedMemory(c, blocks, dtype=weight.dtype, device=weight.device, cache=cache)
        self.turns = rotary_table(c.rotary_dim, c.rotary_base, 0, c.block_size, self.device) if c.rotary_dim else None
        self.slopes = alibi_slopes(c.n_head, self.device) if c.position == "alibi" else None
        # What graphs read must stay where it is, whatever the model's parameters become.
        self.weights = [t.detach() for t in (*model.parameters(), *model.buffers())]
        obstacle = "the host reads how many rows each expert has" if c.experts else None
        width = -(-c.block_size // BLOCK)
        # Weakly, or cache and graphs would wait for the garbage collector, which may come while others are recorded.
        me = weakref.proxy(self)
        self.graphs = DecodeGraphs(lambda rows: me._pass(rows), width=width, device=self.device, obstacle=obstacle)

    def holds(self, model: Transformer) -> bool:
        """Whether a model's weights still lie where the graphs read them."""
        now = (*model.parameters(), *model.buffers())
        return [t.data_ptr() for t in now] == [t.data_ptr() for t in self.weights]

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks once.

        Returns:
            (sum of `logits`, V) float32 on the model's device: each chunk's last tokens, in order.
        Raises:
            ValueError: an id out of range, more tokens than block_size, or too few blocks.
        """
        for chunk in chunks:
            chunk.check(self.config, self.memory.blocks)
        new = (chunk.ids.tolist() if isinstance(chunk.ids, Tensor) else chunk.ids for chunk in chunks)
        ids = np.array([*chain.from_iterable(new)])
        if not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(f"runner: ids from {ids.min()} to {ids.max()}, expected 0 to vocab_size "
                             f"{self.config.vocab_size} - 1")  # fmt: skip
        ends, tables = np.array([chunk.past + len(chunk.ids) for chunk in chunks]), self._tables(chunks)
        if len(chunks) <= BUCKETS[-1] and all(len(chunk.ids) == chunk.logits == 1 for chunk in chunks):
            return self.graphs(ids, ends - 1, tables).to(torch.float32, copy=True)
        return self._pass(self._rows(chunks, ids, ends, tables)).float()

    @torch.no_grad()
    def decode(self, ids: Tensor, places: np.ndarray, tables: np.ndarray) -> Tensor:
        """Run one new token of each sequence without looking at it; see DecodeGraphs.

        Returns:
            (B, V) in the model's dtype; overwritten by a later step.
        """
        return self.graphs(ids, places, tables)

    def _tables(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """Each sequence's blocks, (B, width) int32."""
        tables = np.zeros((len(chunks), self.graphs.width), dtype=np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.blocks)] = chunk.blocks[: len(row)]
        return tables

    def _rows(self, chunks: Sequence[Chunk], ids: np.ndarray, ends: np.ndarray, tables: np.ndarray) -> Rows:
        counts = np.array([len(chunk.ids) for chunk in chunks])
        begins = np.concatenate([[0], counts.cumsum()])
        places = np.concatenate([np.arange(chunk.past, end) for chunk, end in zip(chunks, ends, strict=True)])
        slots = tables[np.arange(len(chunks)).repeat(counts), places // BLOCK] * BLOCK + places % BLOCK
        wanted = zip(chunks, begins[1:], strict=True)
        take = np.concatenate([np.arange(end - chunk.logits, end) for chunk, end in wanted])
        tables = tables[:, : -(-ends.max() // BLOCK)]
        parts = (ids, places, slots, ends, tables.ravel(), begins, take)
        first = [0, *np.cumsum([on_16_bytes(len(part)) for part in parts]).tolist()]
        numbers = torch.empty(first[-1], dtype=torch.int32, pin_memory=self.graphs.pins)
        for part, at in zip(parts, first, strict=False):
            numbers.numpy()[at : at + len(part)] = part
        numbers = numbers.to(self.device, non_blocking=True)
        views = (numbers[at : at + len(part)] for part, at in zip(parts, first, strict=False))
        ids, places, slots, lengths, blocks, begins, take = views
        fresh = not any(chunk.past for chunk in chunks)
        return Rows(ids, places, slots, lengths, blocks.view(tables.shape), begins, take, fresh)

    def _pass(self, rows: Rows) -> Tensor:
        """The logits of the rows that are taken, (R, V)."""
        turns = None
        if self.turns is not None:
            turns = tuple(table.index_select(0, rows.places) for table in self.turns)
        where = Positions(turns, self.config.rotary_interleaved, self.slopes)
        h = self.model.packed_hidden_states(rows.ids, rows.places, where, PagedCache(self.memory, rows))
        h = h if rows.take is None else h.index_select(0, rows.take)
        return self.model.compute_logits(h) if len(h) else h.new_empty(0, self.config.vocab_size)
