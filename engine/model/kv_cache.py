"""What attention layers ask of a KV cache; the caches themselves are in `peakgpt.engine.inference`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionCache(Protocol):
    """What a model's layers know of where past tokens are."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None,
        alibi: Tensor | None, bias: Tensor | None, kv_start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Take in the keys and values of new tokens, (B, T, K, D), and attend to all that a layer then has.

        Args:
            layer: whose part of the cache.
            q: (B, T, H, D); the rest as in peakgpt.kernels.ops.attention.
        Returns:
            (B, T, H, D)
        """


class SequenceCache(AttentionCache, Protocol):
    """A cache of one batch of sequences of equal length, which the model appends to."""

    length: int  # tokens in the cache
