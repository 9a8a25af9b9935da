"""Keys and values of many sequences in blocks, for a model that runs by its ops: where a step writes and reads them.

Which block is whose, engine/inference/block_pool.py decides. New tokens are stored, then each attends to its
sequence's blocks where they lie: nothing is gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK, check_cache
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.cache_store import cache_store


class PagedMemory:
    """Keys and values of all layers, (L, blocks, BLOCK, K, D) each; in bytes with a scale for each head of a token."""

    def __init__(
        self, config: GPTConfig, blocks: int, *, dtype: torch.dtype, device: torch.device, cache: str | None = None
    ):
        """Allocate.

        Args:
            dtype: of the model.
            cache: "int8", as kernels/ops/cache_store.py rounds; None is the dtype.
        Raises:
            ValueError: an unknown cache.
        """
        check_cache(cache)
        c = config
        shape = c.n_layer, blocks, BLOCK, c.n_kv_head, c.head_dim
        self.blocks = blocks
        kept = torch.int8 if cache == "int8" else dtype
        self.keys, self.values = (torch.empty(shape, dtype=kept, device=device) for _ in "kv")
        self.scales: tuple[Tensor, ...] = ()
        if cache == "int8":
            self.scales = tuple(torch.empty(shape[:-1], device=device) for _ in "kv")

    def layer(self, layer: int) -> tuple[Tensor, ...]:
        """A layer's keys and values, and their scales where there are."""
        return tuple(memory[layer] for memory in (self.keys, self.values, *self.scales))

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in (self.keys, self.values, *self.scales))

    def copy(self, source: int, target: int) -> None:
        """Copy one block, of all layers."""
        for memory in (self.keys, self.values, *self.scales):
            memory[:, target] = memory[:, source]


class Rows(NamedTuple):
    """N new tokens of B sequences one after the other, int32 on the model's device: what a pass reads of them.

    Args:
        ids: (N,). places: (N,), where each stands in its text.
        slots: (N,), where its keys and values go, block * BLOCK + place in it; -1 for nowhere.
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
    """The memory as one pass sees it; see engine/inference/kv_cache.py."""

    def __init__(self, memory: PagedMemory, rows: Rows):
        self.memory, self.rows = memory, rows

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None,
        alibi: Tensor | None, bias: Tensor | None, kv_start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q is (1, N, H, D), all sequences' rows; so are k and v, (1, N, K, D)."""
        assert bias is None and kv_start is None, "rows of many sequences have neither a bias by pair nor padding"
        rows, (keys, values, *scales) = self.rows, self.memory.layer(layer)
        cache_store(k[0], v[0], keys, values, rows.slots, *scales)
        options = {"window": window, "scale": scale, "alibi": alibi}
        if rows.fresh:  # whole prompts: tiles of 128 queries instead of 16
            return attention(q, k, v, cu_seqlens=rows.begins if len(rows.lengths) > 1 else None, **options)
        return attention_decode(q[0], keys, values, rows.tables, rows.lengths, rows.begins, *scales, **options)[None]
