"""Keys and values of many sequences in blocks, for a model that runs by its ops: where a step writes and reads them.

Which block is whose, engine/paged.py decides. New tokens are stored, then each attends to its sequence's blocks where
they lie: nothing is gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.config import GPTConfig
from peakgpt.engine.paged import BLOCK
from peakgpt.kernels.attention import attention
from peakgpt.kernels.attention_decode import attention_decode


class PagedMemory:
    """Keys and values of all layers, (L, blocks + 1, BLOCK, K, D) each; the last block takes what nobody reads."""

    def __init__(self, config: GPTConfig, blocks: int, *, dtype: torch.dtype, device: torch.device):
        """Allocate `blocks` blocks, and the spare one."""
        c = config
        shape = c.n_layer, blocks + 1, BLOCK, c.n_kv_head, c.head_dim
        self.blocks = blocks
        # Zeros: what is masked is multiplied by 0, and NaN would stay.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, source: int, target: int) -> None:
        """Copy one block, of all layers."""
        for memory in (self.keys, self.values):
            memory[:, target] = memory[:, source]


class Rows(NamedTuple):
    """N new tokens of B sequences one after the other, int32 on the model's device: what a pass reads of them.

    Args:
        ids: (N,). places: (N,), where each stands in its text. slots: (N,), block * BLOCK + place in it.
        lengths: (B,), tokens of each sequence, the new ones counted; 0 for one that is not there.
        tables: (B, M), its blocks.
        begins: (B + 1,), where its rows begin, and N; None: one row each.
        take: (R,), the rows whose logits are wanted; None for all.
        fresh: whether nobody has older tokens: then the blocks need not be read.
    """

    ids: Tensor
    places: Tensor
    slots: Tensor
    lengths: Tensor
    tables: Tensor
    begins: Tensor | None = None
    take: Tensor | None = None
    fresh: bool = False


class PagedCache:
    """The memory as one pass sees it; see engine/cache.py."""

    def __init__(self, memory: PagedMemory, rows: Rows):
        self.memory, self.rows = memory, rows

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None,
        alibi: Tensor | None, bias: Tensor | None, kv_start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q is (1, N, H, D), all sequences' rows; so are k and v, (1, N, K, D)."""
        assert bias is None and kv_start is None, "rows of many sequences have neither a bias by pair nor padding"
        rows, caches = self.rows, (self.memory.keys[layer], self.memory.values[layer])
        for cache, new in zip(caches, (k, v), strict=True):
            cache.flatten(0, 1)[rows.slots] = new[0]
        options = {"window": window, "scale": scale, "alibi": alibi}
        if rows.fresh:  # whole prompts: tiles of 128 queries instead of 16
            return attention(q, k, v, cu_seqlens=rows.begins if len(rows.lengths) > 1 else None, **options)
        return attention_decode(q[0], *caches, rows.tables, rows.lengths, rows.begins, **options)[None]
