"""Attention of new tokens to a PagedKVCache: the cache that a model's layers use during one step.

`PagedAttention` serves tokens of many sequences at once and reads the blocks in place. `GatheredAttention` serves one
sequence and copies its blocks: relative positions are a bias per token pair, which the paged op does not support.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.kv_cache import PagedKVCache
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.cache_store import cache_store


class TokenBatch(NamedTuple):
    """N new tokens of B sequences, concatenated; all int32 on the model's device.

    Args:
        ids: (N,) token ids.
        positions: (N,) positions in their sequences.
        slots: (N,) where keys and values go, block * BLOCK_TOKENS + offset; -1 stores nothing.
        lengths: (B,) tokens of each sequence, new ones included; 0 for padding.
        block_tables: (B, M) blocks of each sequence.
        begins: (B + 1,) first row of each sequence, and N; None if each has one row.
        logit_rows: (R,) rows to compute logits for; None for all.
        is_prefill: whether no sequence has past tokens, so that attention does not read the cache.
        table_rows: (N,) rows of the positions in `lookup_tables`; None if each row is the end of its text.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    lengths: Tensor
    block_tables: Tensor
    begins: Tensor | None = None
    logit_rows: Tensor | None = None
    is_prefill: bool = False
    table_rows: Tensor | None = None


class PagedAttention:
    """The cache of one step for all its sequences; see AttentionCache."""

    def __init__(self, kv_cache: PagedKVCache, batch: TokenBatch):
        self.kv_cache, self.batch = kv_cache, batch

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None,
        softcap: float | None, alibi: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        kv_start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q is (1, N, H, D), the rows of all sequences; k and v are (1, N, K, D)."""
        assert bias is None and kv_start is None, "concatenated sequences have no bias per token pair and no padding"
        batch, (keys, values, *scales) = self.batch, self.kv_cache.layer(layer)
        cache_store(k[0], v[0], keys, values, batch.slots, *scales)
        options = {"window": window, "scale": scale, "softcap": softcap, "alibi": alibi, "sinks": sinks}
        if batch.is_prefill:  # tiles of 128 queries instead of 16
            return attention(q, k, v, cu_seqlens=batch.begins if len(batch.lengths) > 1 else None, **options)
        return attention_decode(
            q[0], keys, values, batch.block_tables, batch.lengths, batch.begins, *scales, **options
        )[None]


class GatheredAttention:
    """The cache of one step for one sequence; see SequenceCache."""

    def __init__(self, kv_cache: PagedKVCache, chunk: Chunk):
        self.kv_cache, self.length, self.text_tokens = kv_cache, chunk.past, chunk.length
        device = kv_cache.keys.device
        self.blocks = torch.tensor(list(chunk.block_table), device=device)
        new = torch.arange(chunk.past, chunk.end, device=device)
        self.slots = self.blocks[new // BLOCK_TOKENS] * BLOCK_TOKENS + new % BLOCK_TOKENS

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """q is (1, T, H, D); k and v are (1, T, K, D)."""
        keys, values, *scales = self.kv_cache.layer(layer)
        cache_store(k[0], v[0], keys, values, self.slots, *scales)
        end = self.length + k.shape[1]
        k_scale, v_scale = scales or (None, None)
        gathered = [self._gather(*pair, end, q.dtype) for pair in ((keys, k_scale), (values, v_scale))]
        return attention(q, *gathered, causal=q.shape[1] > 1, **options)

    def _gather(self, stored: Tensor, scale: Tensor | None, end: int, dtype: torch.dtype) -> Tensor:
        """Return the sequence's first `end` keys or values, (1, end, K, D), dequantized."""
        tokens = stored[self.blocks].flatten(0, 1)[None, :end]
        if scale is None:
            return tokens
        return (tokens * scale[self.blocks].flatten(0, 1)[None, :end, :, None]).to(dtype)
