"""KV caches: contiguous for one batch, in blocks for many sequences.

    ContiguousKVCache   (L, B, capacity, K, D)                torch ops, sequences of equal length
    PagedKVCache        (L, num_blocks, BLOCK_TOKENS, K, D)   torch ops; optionally int8 with scales
    ProgramKVCache      bytes                                 C++ program; layout in csrc/attention/cache_attention.h

`BlockPool` decides which sequence owns which block.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.ops.attention import attention

CACHE_DTYPES = ("int8",)  # None means the model's own dtype


class KVCache(Protocol):
    """Keys and values of all layers in blocks."""

    num_blocks: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers."""


def head_bytes(config: GPTConfig, dtype: torch.dtype, cache_dtype: str | None) -> int:
    """Bytes of one token's keys (or values) of one head.

    Raises:
        ValueError: unknown cache dtype.
    """
    _check_cache_dtype(cache_dtype)
    return config.head_dim * dtype.itemsize if cache_dtype is None else config.head_dim + 4  # a float32 scale


def _check_cache_dtype(cache_dtype: str | None) -> None:
    if cache_dtype not in (None, *CACHE_DTYPES):
        raise ValueError(f"cache is {cache_dtype!r}, expected None or one of {', '.join(CACHE_DTYPES)}")


class ContiguousKVCache:
    """Preallocated keys and values of every layer for one batch of sequences of equal length.

    Layers write with `attend`; the model advances `length` after the last layer.
    """

    text_tokens = 0

    def __init__(self, config: GPTConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str):
        """Allocate (L, B, capacity, K, D) for keys and for values."""
        shape = config.n_layer, batch, capacity, config.n_kv_head, config.head_dim
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, T, K, D), after the cached tokens of one layer; return all its keys and values.

        Raises:
            ValueError: the batch differs, or the capacity is too small.
        """
        end = self.length + k.shape[1]
        if k.shape[0] != self.keys.shape[1] or end > self.capacity:
            raise ValueError(
                f"cache: {k.shape[0]} sequences of {end} tokens, "
                f"expected {self.keys.shape[1]} of at most {self.capacity}"
            )
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """See AttentionCache. A single query attends to every key, so it needs no causal mask."""
        k, v = self.append(layer, k, v)  # (B, S, K, D)
        return attention(q, k, v, causal=q.shape[1] > 1, **options)

    def reorder(self, parents: Tensor) -> None:
        """Replace sequence i by a copy of sequence parents[i]; the batch may grow."""
        self.keys, self.values = self.keys[:, parents], self.values[:, parents]


class PagedKVCache:
    """Blocks for torch ops; the attention over them is in engine/inference/paged_attention.py."""

    def __init__(
        self, config: GPTConfig, num_blocks: int, *, dtype: torch.dtype, device: torch.device,
        cache_dtype: str | None = None,
    ):  # fmt: skip
        """Allocate (L, num_blocks, BLOCK_TOKENS, K, D) for keys and for values.

        Args:
            dtype: of the model.
            cache_dtype: "int8" stores bytes and one scale for each head of each token, rounded as
                kernels/ops/cache_store.py says; None stores the model's dtype.
        Raises:
            ValueError: unknown cache dtype.
        """
        _check_cache_dtype(cache_dtype)
        c = config
        shape = c.n_layer, num_blocks, BLOCK_TOKENS, c.n_kv_head, c.head_dim
        self.num_blocks = num_blocks
        stored = torch.int8 if cache_dtype == "int8" else dtype
        self.keys, self.values = (torch.empty(shape, dtype=stored, device=device) for _ in "kv")
        self.scales: tuple[Tensor, ...] = ()
        if cache_dtype == "int8":
            scale_dtype = torch.promote_types(dtype, torch.float32)
            self.scales = tuple(torch.empty(shape[:-1], dtype=scale_dtype, device=device) for _ in "kv")

    def layer(self, layer: int) -> tuple[Tensor, ...]:
        """Keys and values of one layer, and with int8 their scales."""
        return tuple(tensor[layer] for tensor in (self.keys, self.values, *self.scales))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.scales))

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers."""
        for tensor in (self.keys, self.values, *self.scales):
            tensor[:, target] = tensor[:, source]


class ProgramKVCache:
    """Blocks for the C++ program, which defines their layout (csrc/attention/cache_attention.h)."""

    def __init__(self, config: GPTConfig, num_blocks: int, *, dtype: torch.dtype, cache_dtype: str | None = None):
        """Allocate the blocks of every layer.

        Args:
            dtype: of the model.
            cache_dtype: "int8" stores bytes and one scale for each head of each token; None the model's dtype.
        Raises:
            ValueError: unknown cache dtype.
        """
        c = config
        self.num_blocks, self.is_int8 = num_blocks, cache_dtype == "int8"
        self.layer_bytes = num_blocks * c.n_kv_head * BLOCK_TOKENS * head_bytes(c, dtype, cache_dtype)
        # 64 bytes more: the program's vector loads read past the end of the last block.
        self.keys, self.values = torch.empty(2, c.n_layer * self.layer_bytes + 64, dtype=torch.uint8).unbind()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers."""
        for memory in (self.keys, self.values):
            blocks = memory[:-64].view(-1, self.num_blocks, self.layer_bytes // self.num_blocks)
            blocks[:, target] = blocks[:, source]
