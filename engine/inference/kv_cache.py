"""The keys and values of past tokens, so that a decode step computes only its own."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.ops.attention import attention


class KVCache:
    """Preallocated keys and values of every layer for one batch of equally long sequences.

    Layers write with `attend`; the model moves `length` on once all of them have.
    """

    def __init__(self, config: GPTConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str):
        """Allocate (L, B, capacity, K, D) for keys and for values."""
        shape = config.n_layer, batch, capacity, config.n_kv_head, config.head_dim
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, both (B, T, K, D), behind what one layer holds; returns all of its keys and values.

        Raises:
            ValueError: the batch differs, or there is no room for T more.
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
        """See AttentionCache. One query sees every key: saying so spares the backends a mask."""
        k, v = self.append(layer, k, v)  # (B, S, K, D)
        return attention(q, k, v, causal=q.shape[1] > 1, **options)
