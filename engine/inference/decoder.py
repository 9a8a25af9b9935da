"""A batch of prompts that is decoded in lockstep: each step adds one token to every sequence.

`generate` and `beam_search` run on a Decoder; `Engine`, whose sequences come and go, does not.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import numpy as np
from torch import Tensor

from peakgpt.engine.inference.block_pool import BlockPool, blocks_for
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.executor import Executor, keep_for_reuse, make_decode_executor, may_be_kept
from peakgpt.engine.inference.kv_cache import ContiguousKVCache
from peakgpt.engine.model.transformer import Transformer


class Decoder(Protocol):
    """Sequences of a batch, and the model that continues them."""

    def step(self, input_ids: Tensor) -> Tensor:
        """Run new tokens, (B, T), after the past ones; return the logits of the last token of each sequence, (B, V)."""

    def reorder(self, parents: Tensor) -> None:
        """Replace sequence i by a copy of sequence parents[i]; the batch may grow."""

    def rewind(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens of every sequence; not after `reorder`."""


def make_decoder(
    model: Transformer, batch: int, max_tokens: int, new_tokens: int, start: Tensor | None = None, *,
    num_beams: int = 1,
) -> Decoder:  # fmt: skip
    """Make the fastest decoder of a model.

    Args:
        batch: B prompts.
        max_tokens: maximum length of a sequence, prompt included.
        new_tokens: number of decoding steps.
        start: (B,) first token of each left-padded prompt; None without padding.
        num_beams: maximum number of sequences that continue one prompt.
    """
    executor = make_decode_executor(model, batch * num_beams * blocks_for(max_tokens), new_tokens)
    if executor is None:
        return ContiguousDecoder(model, batch, max_tokens, start)
    decoder = PagedDecoder(executor, batch, start)
    if may_be_kept(executor):
        weakref.finalize(decoder, keep_for_reuse, model, executor).atexit = False
    return decoder


class ContiguousDecoder:
    """Runs a model's torch ops on a contiguous KV cache; see Decoder."""

    def __init__(self, model: Transformer, batch: int, max_tokens: int, start: Tensor | None = None):
        self.model, self.start = model, start
        self.kv_cache = ContiguousKVCache(model.config, batch, max_tokens, dtype=model.dtype, device=model.device)

    def step(self, input_ids: Tensor) -> Tensor:
        return self.model.last_logits(input_ids, self.kv_cache, self.start)[:, 0]

    def reorder(self, parents: Tensor) -> None:
        self.kv_cache.reorder(parents)
        self.start = None if self.start is None else self.start[parents]

    def rewind(self, num_tokens: int) -> None:
        self.kv_cache.length = num_tokens


class PagedDecoder:
    """Runs an executor; sequences with a common prefix share its blocks. See Decoder."""

    def __init__(self, executor: Executor, batch: int, start: Tensor | None = None):
        self.executor, self.pool = executor, BlockPool(executor.kv_cache.num_blocks)
        self.start = [0] * batch if start is None else start.tolist()
        self.past = [0] * batch  # tokens of each sequence that are in the cache
        self.block_tables: list[list[int]] = [[] for _ in range(batch)]
        self.padded_tables: np.ndarray | None = None  # block_tables as (B, W) int32; None after a change

    def step(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] == 1 and all(self.past):
            return self._decode(input_ids[:, 0])
        rows = input_ids.tolist()
        if not any(self.past):  # the prompts: leave out their padding
            rows = [row[first:] for row, first in zip(rows, self.start, strict=True)]
        chunks = []
        for sequence, row in enumerate(rows):
            past = self._grow(sequence, len(row))
            chunks.append(Chunk(row, past, self.block_tables[sequence]))
        return self.executor.step(chunks)

    def rewind(self, num_tokens: int) -> None:
        self.past = [num_tokens - first for first in self.start]

    def reorder(self, parents: Tensor) -> None:
        order, old_tables, past = parents.tolist(), self.block_tables, self.past
        self.block_tables, self.past, self.padded_tables = [], [past[parent] for parent in order], None
        continued, copies = set(), []
        for child, parent in enumerate(order):
            table = list(old_tables[parent])
            # A block that is not full needs one owner that writes to it: the first child; the other children copy it.
            shared = past[parent] // self.pool.block_tokens if parent in continued else len(table)
            continued.add(parent)
            for block in table[:shared]:
                self.pool.share(block)
            copies += [(child, i) for i in range(shared, len(table))]
            self.block_tables.append(table)
        for table in old_tables:
            for block in table:
                self.pool.release(block)
        for child, i in copies:
            block = self.pool.allocate()
            self.executor.kv_cache.copy_block(self.block_tables[child][i], block)
            self.block_tables[child][i] = block

    def _decode(self, input_ids: Tensor) -> Tensor:
        """Run one token of each sequence; the device may still be computing its value."""
        positions = np.array([self._grow(sequence, 1) for sequence in range(len(input_ids))])
        if self.padded_tables is None:
            width = blocks_for(self.executor.config.block_size)
            self.padded_tables = np.zeros((len(input_ids), width), dtype=np.int32)
            for row, table in zip(self.padded_tables, self.block_tables, strict=True):
                row[: len(table)] = table
        return self.executor.decode(input_ids, positions, self.padded_tables)

    def _grow(self, sequence: int, new_tokens: int) -> int:
        """Add new tokens to a sequence, allocate their blocks, and return the number of tokens before them."""
        table, past = self.block_tables[sequence], self.past[sequence]
        self.past[sequence] += new_tokens
        while len(table) * self.pool.block_tokens < self.past[sequence]:
            table.append(self.pool.allocate())
            self.padded_tables = None
        return past
