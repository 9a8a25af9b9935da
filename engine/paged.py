"""Keys and values of many sequences in blocks of one memory: which blocks are whose.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import torch

from peakgpt.engine.config import GPTConfig
from peakgpt.kernels.cpu.ext import _C


class BlockMemory:
    """The memory of a cache for the CPU programs; its layout inside of a block is theirs (csrc/cache_attention.h)."""

    block = _C.cache_block  # tokens

    def __init__(self, config: GPTConfig, blocks: int, *, dtype: torch.dtype):
        """Allocate `blocks` blocks for every layer's keys and values."""
        c = config
        self.blocks = blocks
        self.layer_bytes = blocks * c.n_kv_head * self.block * c.head_dim * dtype.itemsize
        # 64 bytes more: the last block is read a little past its end.
        self.keys, self.values = torch.empty(2, c.n_layer * self.layer_bytes + 64, dtype=torch.uint8).unbind()
