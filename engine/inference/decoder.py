"""A batch of prompts that is decoded in lockstep: each step adds one token to every sequence.

`generate` and `beam_search` run on a Decoder; `Engine`, whose sequences come and go, does not.
"""

from __future__ import annotations

import weakref
from typing import Protocol

import numpy as np
import torch
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
        """Go back to the first `num_tokens` tokens of every sequence; after `reorder` only to 0, to run them again."""


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
        decoder = ContiguousDecoder(model, batch, max_tokens, start)
    else:
        decoder = PagedDecoder(executor, batch, start)
        if may_be_kept(executor):
            weakref.finalize(decoder, keep_for_reuse, model, executor).atexit = False
    switch = model.config.switch_length
    return decoder if switch is None else RestartingDecoder(decoder, switch, start)


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
        self.past = [max(num_tokens - first, 0) for first in self.start]

    def reorder(self, parents: Tensor) -> None:
        order, old_tables, past = parents.tolist(), self.block_tables, self.past
        self.start = [self.start[parent] for parent in order]
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


class RestartingDecoder:
    """Runs all tokens again when a text becomes longer than `switch_length` of GPTConfig, since its cached keys have
    the angles of shorter texts; see Decoder.
    """  # fmt: skip

    def __init__(self, decoder: Decoder, switch_length: int, start: Tensor | None = None):
        self.decoder, self.switch_length = decoder, switch_length
        self.firsts = None if start is None else start.cpu()  # (B,)
        self.input_ids: Tensor | None = None  # (B, T) tokens of the cache
        self.cached = 0  # tokens of the cache that are valid

    def step(self, input_ids: Tensor) -> Tensor:
        known = self.input_ids
        self.input_ids = input_ids if known is None else torch.cat((known, input_ids.to(known.dtype)), 1)
        past, self.cached = self.cached, self.input_ids.shape[1]
        if past and self._long(past) != self._long(self.cached):
            self.decoder.rewind(0)
            past = 0
        return self.decoder.step(self.input_ids[:, past:])

    def reorder(self, parents: Tensor) -> None:
        self.input_ids = self.input_ids[parents]
        self.firsts = None if self.firsts is None else self.firsts[parents.cpu()]
        self.decoder.reorder(parents)

    def rewind(self, num_tokens: int) -> None:
        is_valid = self._long(num_tokens) == self._long(self.cached)
        self.input_ids, self.cached = self.input_ids[:, :num_tokens], num_tokens if is_valid else 0
        self.decoder.rewind(self.cached)

    def _long(self, length: int) -> list[bool]:
        """Whether each text of the batch is longer than switch_length, if its columns end at `length`."""
        return [length - first > self.switch_length for first in ([0] if self.firsts is None else self.firsts.tolist())]
