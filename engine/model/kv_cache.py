"""The KV cache interface of attention layers; the caches are in `peakgpt.engine.inference`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionCache(Protocol):
    """A model's view of its KV cache during one forward pass."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None,
        softcap: float | None, alibi: Tensor | None, bias: Tensor | None, sinks: Tensor | None,
        kv_start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Store the keys and values of new tokens, (B, T, K, D), and attend to all cached tokens of the layer.

        Args:
            layer: index of the layer.
            q: (B, T, H, D); the other arguments as in peakgpt.kernels.ops.attention.
        Returns:
            (B, T, H, D)
        """


class SequenceCache(AttentionCache, Protocol):
    """The KV cache of one batch of sequences of equal length, which the model extends."""

    length: int  # tokens in the cache
    text_tokens: int  # of the whole text, if its tokens come in parts; 0: not known
