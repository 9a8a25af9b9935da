"""Executor over a model's torch ops, on any device.

The tokens of all sequences go through the model together, so that a step reads the weights once; only the rows whose
logits are needed go through the head. On a GPU the usual step, of one new token per sequence, is a CUDA graph.

Two kinds of models run one sequence after the other, without graphs: those with relative positions, see
GatheredAttention; and those with a hook or a module of someone else, which expects sequences of its own, (1, T, C).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, blocks_for
from peakgpt.engine.inference.chunk import Chunk, check_token_ids
from peakgpt.engine.inference.decode_graphs import MAX_BATCH, DecodeGraphs, align_int32
from peakgpt.engine.inference.kv_cache import PagedKVCache
from peakgpt.engine.inference.paged_attention import GatheredAttention, PagedAttention, TokenBatch
from peakgpt.engine.model.plain import Snapshot
from peakgpt.engine.model.positions import Positions, model_slopes
from peakgpt.engine.model.quantized_linear import QuantizedExpertLinear
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.engine.model.rotary_tables import first_row, lookup_tables
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.core.dispatch import BACKENDS, load


class TorchExecutor:
    """See Executor."""

    def __init__(
        self, model: Transformer, num_blocks: int, *, cache_dtype: str | None = None, note: str = "",
        keeps_model: bool = True,
    ):  # fmt: skip
        """
        Args:
            model: on any device; its weights are read in place.
            num_blocks: blocks of the KV cache.
            cache_dtype: None or "int8", see PagedKVCache.
            note: why the C++ program does not run the model.
            keeps_model: whether the executor keeps the model alive.
        Raises:
            ValueError: unknown cache dtype.
        """
        c, dtype = model.config, model.dtype
        self.model = model if keeps_model else weakref.proxy(model)
        self.config, self.note, self.device = c, note, model.device
        self.kv_cache = PagedKVCache(c, num_blocks, dtype=dtype, device=self.device, cache_dtype=cache_dtype)
        self.snapshot = Snapshot(model)
        self.is_one_by_one = c.position in RELATIVE or self.snapshot.change is not None
        self.angles, self.switch_length = lookup_tables(c, self.device) if c.rotary_dim else (), c.switch_length
        self.slopes = model_slopes(c, self.device)
        # Graphs read these addresses: the tensors must outlive a change of the model's parameters.
        self.weights = [t.detach() for t in (*model.parameters(), *model.buffers())]
        obstacle = "the host reads how many rows each expert has" if _reads_counts(model) else None
        # A weak reference: a reference cycle would keep the cache and the graphs until the garbage collector runs,
        # which may be while another graph is captured.
        weak = weakref.proxy(self)
        self.graphs = DecodeGraphs(
            lambda batch: weak._forward(batch), width=blocks_for(c.block_size), device=self.device, obstacle=obstacle
        )

    @torch.no_grad()
    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks; see Executor.step. The logits are on the model's device."""
        ids = self._checked_ids(chunks)
        if self.is_one_by_one:
            return torch.cat([self._run_alone(chunk) for chunk in chunks])
        ends, tables = np.array([chunk.end for chunk in chunks]), self._block_tables(chunks)
        if len(chunks) <= MAX_BATCH and all(map(self._is_decoding, chunks)):
            return self.graphs(ids, ends - 1, tables).to(torch.float32, copy=True)
        return self._forward(self._token_batch(chunks, ids, ends, tables)).float()

    @torch.no_grad()
    def hidden_states(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks without the head; see Executor.hidden_states. The result is on the model's device."""
        ids = self._checked_ids(chunks)
        if self.is_one_by_one:
            return torch.cat([self._hidden_alone(chunk) for chunk in chunks])
        ends, tables = np.array([chunk.end for chunk in chunks]), self._block_tables(chunks)
        return self._hidden(self._token_batch(chunks, ids, ends, tables)).float()

    def _checked_ids(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """The new tokens of all chunks, (N,)."""
        for chunk in chunks:
            chunk.check(self.config, self.kv_cache.num_blocks)
        ids = np.array([*chain.from_iterable(chunk.tokens() for chunk in chunks)])
        check_token_ids(ids.min(), ids.max(), self.config.vocab_size)
        return ids

    @torch.no_grad()
    def decode(self, input_ids: Tensor, positions: np.ndarray, block_tables: np.ndarray) -> Tensor:
        """Run one new token of each sequence without waiting for its value; see Executor.decode."""
        if self.is_one_by_one or len(positions) > MAX_BATCH:
            rows = zip(input_ids[:, None], positions.tolist(), block_tables.tolist(), strict=True)
            return self.step([Chunk(*row) for row in rows])
        return self.graphs(input_ids, positions, block_tables)

    def _is_decoding(self, chunk: Chunk) -> bool:
        """Whether `decode` can run a chunk: one token, whose angles are those of a text that ends with it."""
        if not len(chunk.token_ids) == chunk.num_logits == 1:
            return False
        return self.switch_length is None or self._first_row(chunk.length) == self._first_row(chunk.end)

    def _first_row(self, length: int) -> int:
        return first_row(self.switch_length, length)

    def _run_alone(self, chunk: Chunk) -> Tensor:
        """Logits of one chunk, (num_logits, V)."""
        ids = torch.as_tensor(chunk.token_ids, dtype=torch.int64, device=self.device)
        cache = GatheredAttention(self.kv_cache, chunk)
        return self.model.last_logits(ids[None], cache, count=chunk.num_logits)[0].float()

    def _hidden_alone(self, chunk: Chunk) -> Tensor:
        """Hidden states of one chunk, (num_logits, C)."""
        ids = torch.as_tensor(chunk.token_ids, dtype=torch.int64, device=self.device)
        h = self.model.hidden_states(ids[None], GatheredAttention(self.kv_cache, chunk))[0]
        return h[len(ids) - chunk.num_logits :].float()

    def _block_tables(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """(B, width) int32, padded with 0."""
        tables = np.zeros((len(chunks), self.graphs.width), dtype=np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.block_table)] = chunk.block_table[: len(row)]
        return tables

    def _token_batch(
        self, chunks: Sequence[Chunk], ids: np.ndarray, ends: np.ndarray, tables: np.ndarray
    ) -> TokenBatch:
        counts = np.array([len(chunk.token_ids) for chunk in chunks])
        begins = np.concatenate([[0], counts.cumsum()])
        positions = np.concatenate([np.arange(chunk.past, chunk.end) for chunk in chunks])
        blocks = tables[np.arange(len(chunks)).repeat(counts), positions // BLOCK_TOKENS]
        slots = blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS
        row_ends = zip(chunks, begins[1:], strict=True)
        logit_rows = np.concatenate([np.arange(end - chunk.num_logits, end) for chunk, end in row_ends])
        tables = tables[:, : blocks_for(ends.max())]
        # One copy to the device for all integers.
        parts = [ids, positions, slots, ends, tables.ravel(), begins, logit_rows]
        if self.switch_length is not None:
            first = np.array([self._first_row(chunk.length) for chunk in chunks])
            parts.append(first.repeat(counts) + positions)
        offsets = [0, *np.cumsum([align_int32(len(part)) for part in parts]).tolist()]
        numbers = torch.empty(offsets[-1], dtype=torch.int32, pin_memory=self.graphs.pin_memory)
        for part, offset in zip(parts, offsets, strict=False):
            numbers.numpy()[offset : offset + len(part)] = part
        numbers = numbers.to(self.device, non_blocking=True)
        views = (numbers[offset : offset + len(part)] for part, offset in zip(parts, offsets, strict=False))
        ids, positions, slots, lengths, blocks, begins, logit_rows, *table_rows = views
        is_prefill = not any(chunk.past for chunk in chunks)
        return TokenBatch(
            ids, positions, slots, lengths, blocks.view(tables.shape), begins, logit_rows, is_prefill, *table_rows
        )  # fmt: skip

    def _forward(self, batch: TokenBatch) -> Tensor:
        """Logits of the batch's logit rows, (R, V) in the model's dtype."""
        h = self._hidden(batch)
        return self.model.compute_logits(h) if len(h) else h.new_empty(0, self.config.vocab_size)

    def _hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states of the batch's logit rows, (R, C) in the model's dtype."""
        rows, switch = batch.table_rows, self.switch_length
        if rows is None:
            rows = batch.positions if switch is None else batch.positions + switch * (batch.positions >= switch)
        angles = tuple(tuple(column.index_select(0, rows) for column in table) for table in self.angles)
        positions = Positions(angles, self.config.rotary_interleaved, self.slopes)
        h = self.model.packed_hidden_states(batch.ids, batch.positions, positions, PagedAttention(self.kv_cache, batch))
        return h if batch.logit_rows is None else h.index_select(0, batch.logit_rows)


def _reads_counts(model: Transformer) -> bool:
    """Return whether the host reads how many rows each expert has: quantized experts and the eager function do."""
    if not model.config.experts:
        return False
    fused = (name for name, home in BACKENDS.items() if home == model.device.type)
    is_eager = all(isinstance(load(name, "experts"), str) for name in fused)
    return is_eager or any(isinstance(module, QuantizedExpertLinear) for module in model.modules())
