"""Executor over the C++ program of a model, on the CPU.

A sequence's logits have the same bits in any batch and for any split of its tokens into chunks, as long as the backend
stays the same (tests/engine/inference/test_program_executor.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.inference.chunk import Chunk, check_token_ids
from peakgpt.engine.inference.kv_cache import ProgramKVCache
from peakgpt.engine.inference.program import ModelProgram
from peakgpt.engine.model.rotary_tables import first_row
from peakgpt.engine.model.transformer import Transformer


class ProgramExecutor:
    """See Executor."""

    note = ""

    def __init__(self, model: Transformer, num_blocks: int, *, cache_dtype: str | None = None):
        """
        Args:
            model: float32 or bfloat16 on the CPU; its weights are read in place.
            num_blocks: blocks of the KV cache.
            cache_dtype: None or "int8", see ProgramKVCache.
        Raises:
            ValueError: unknown cache dtype.
            NotImplementedError: the program does not support the model; the message says why.
        """
        self.config, self.program = model.config, ModelProgram(model)
        self.switch_length = model.config.switch_length
        self.kv_cache = ProgramKVCache(model.config, num_blocks, dtype=self.program.dtype, cache_dtype=cache_dtype)

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks; see Executor.step."""
        return self._run_chunks(chunks, hidden=False)

    def hidden_states(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run all chunks without the head; see Executor.hidden_states."""
        return self._run_chunks(chunks, hidden=True)

    def _run_chunks(self, chunks: Sequence[Chunk], *, hidden: bool) -> Tensor:
        ids, positions, begins, logit_rows = [], [], [0], []
        for chunk in chunks:
            chunk.check(self.config, self.kv_cache.num_blocks)
            ids += chunk.tokens()
            first = first_row(self.switch_length, chunk.length)
            positions += range(first + chunk.past, first + chunk.end)
            end = begins[-1] + len(chunk.token_ids)
            logit_rows += range(end - chunk.num_logits, end)
            begins.append(end)
        width = max(len(chunk.block_table) for chunk in chunks)
        tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in chunks]
        past = [chunk.past for chunk in chunks]
        tables = torch.tensor(tables, dtype=torch.int32)
        return self._run(ids, positions, begins, past, logit_rows, tables, hidden=hidden)

    def decode(self, input_ids: Tensor, positions: np.ndarray, block_tables: np.ndarray) -> Tensor:
        """Run one new token of each sequence; see Executor.decode."""
        rows, past = range(len(positions)), positions.tolist()
        switch, tables = self.switch_length, torch.from_numpy(block_tables)
        positions = past if switch is None else [first_row(switch, p + 1) + p for p in past]
        return self._run(input_ids.tolist(), positions, [*rows, len(rows)], past, rows, tables)

    def _run(self, ids, positions, begins, past, logit_rows, tables: Tensor, *, hidden: bool = False) -> Tensor:
        """Return the logits of some rows, (R, V), or with `hidden` what the head reads, (R, C). Both are float32.

        `positions` are rows of the learned table, or of `lookup_tables`.
        """
        if ids:
            check_token_ids(min(ids), max(ids), self.config.vocab_size)
        # One tensor for all integers: five small ones would cost more than the rest of this function.
        numbers = torch.tensor([*ids, *positions, *begins, *past, *logit_rows])
        counts = len(ids), len(positions), len(begins), len(past), len(logit_rows)
        ids_, positions_, begins_, past_, selected = numbers.split(counts)
        c, cache = self.config, self.kv_cache
        out = torch.empty(len(logit_rows), c.n_embd if hidden else c.vocab_size, dtype=torch.float32)
        self.program.run(
            rows=len(ids), ids=ids_, positions=positions_, sequences=len(past), begins=begins_, past=past_,
            tables=tables, table_row=tables.shape[1], int8_cache=cache.is_int8, keys=cache.keys, values=cache.values,
            layer_bytes=cache.layer_bytes, logit_rows=len(logit_rows), selected=selected,
            logits=None if hidden else out, hidden=out if hidden else None,
        )  # fmt: skip
        return out.mul_(c.logit_scale) if hidden and c.logit_scale != 1.0 else out  # the head scales logits itself
