"""Attention in eager torch that returns its weights too, with the masks of `peakgpt.attention`.

For callers who ask for the weights (output_attentions, need_weights), and for a dropout module that must be called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.kernels.ops.attention_math import cap_scores, default_scale, live_mask, softmax_weights


def attention_and_weights(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, alibi: Tensor | None = None,
    sinks: Tensor | None = None, scale: float | None = None, softcap: float | None = None,
    dropout: float | nn.Module = 0.0, cu_seqlens: Tensor | None = None, **masks: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `peakgpt.attention` and the weights after dropout.

    Args:
        q, k, v, bias, alibi, sinks, scale, softcap: as in `peakgpt.attention`.
        dropout: a rate, or the module to call on the weights.
        cu_seqlens: (N + 1,) offsets of documents in the B * T tokens of the batch. They end with every sequence.
        masks: causal, window, kv_start, kv_len of `peakgpt.attention`.
    Returns:
        (B, T, H, D), and (B, H, T, S) in the dtype of v. A query that sees no key gives zeros in both.
    """
    live = _both(live_mask(q, k, **masks), None if cu_seqlens is None else _same_document(cu_seqlens, *q.shape[:2]))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = cap_scores((q @ k.transpose(-2, -1)).float() * default_scale(q.shape[-1], scale), softcap)
    if alibi is not None:
        i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
        scores = scores + alibi[:, None, None] * (torch.arange(k.shape[2], device=q.device) - i)
    if bias is not None:
        scores = scores + bias
    if live is not None:
        scores = scores.masked_fill(~live, float("-inf"))
    weights = softmax_weights(scores, sinks).to(v.dtype)
    weights = dropout(weights) if isinstance(dropout, nn.Module) else F.dropout(weights, dropout)
    return (weights @ v).transpose(1, 2), weights


def _same_document(offsets: Tensor, batch: int, tokens: int) -> Tensor:
    """Return a (B, 1, T, T) bool mask of the pairs in one document."""
    token = torch.arange(batch * tokens, device=offsets.device, dtype=offsets.dtype)
    document = torch.searchsorted(offsets, token, right=True).view(batch, 1, tokens)
    return document[..., :, None] == document[..., None, :]


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a & b
