"""The mathematics of attention in eager torch: which keys a query sees, and the scores with every option."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.ops.philox import philox


def default_scale(head_dim: int, scale: float | None) -> float:
    """The factor on q k^T: `scale`, or 1 / sqrt(D) if it is None."""
    return head_dim**-0.5 if scale is None else scale


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """Return softcap tanh(scores / softcap); the scores unchanged if softcap is None."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def live_pairs(queries: int, keys: int, causal: bool, window: int | None) -> int:
    """The number of live (query, key) pairs of one head."""
    reach = [min(keys, max(0, i + 1 + keys - queries)) if causal else keys for i in range(queries)]
    return sum(reach) if window is None else sum(min(r, window) for r in reach)


def live_mask(q, k, causal, window, kv_start=None, kv_len=None, cu_seqlens=None) -> Tensor | None:
    """Boolean (B or 1, 1, T, S) mask of the live pairs, None if all pairs are live."""
    tokens, keys = q.shape[1], k.shape[1]
    i = torch.arange(tokens, device=q.device)[:, None] + keys - tokens
    j = torch.arange(keys, device=q.device)[None, :]
    terms = []
    if causal:
        terms.append(j <= i)
    if window is not None:
        terms.append(j > i - window)
    if cu_seqlens is not None:
        document = torch.searchsorted(
            cu_seqlens, torch.arange(tokens, device=q.device, dtype=cu_seqlens.dtype), right=True
        )
        terms.append(document[:, None] == document[None, :])
    if kv_start is not None:
        terms.append(j[None, None] >= kv_start[:, None, None, None])
    if kv_len is not None:
        end = kv_len if kv_start is None else kv_start + kv_len
        terms.append(j[None, None] < end[:, None, None, None])
    mask = None
    for term in terms:
        mask = term if mask is None else mask & term
    return mask if mask is None or mask.dim() == 4 else mask[None, None]


def dropout_mask(seed: Tensor, dropout: float, batch: int, heads: int, tokens: int, keys: int) -> Tensor:
    """Mask of the attention weights that dropout keeps: boolean (B, H, T, S), the same for every backend.

    Weight (b, h, i, j) is kept if word j % 4 of Philox with counter (i, j / 4, b, h) is at least dropout * 2^32.
    """
    b, h, i, group = torch.meshgrid(
        *(torch.arange(n, device=seed.device) for n in (batch, heads, tokens, (keys + 3) // 4)), indexing="ij"
    )
    words = torch.stack(philox((i, group, b, h), seed.long()), -1)  # (B, H, T, S / 4, 4)
    return words.flatten(3)[..., :keys] >= int(dropout * 2**32)


def softmax_weights(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the keys, (B, H, T, S); zero in a row whose scores are all -inf.

    Args:
        scores: (B, H, T, S).
        sinks: (H,), one more logit of each row. Its weight is left out of the result.
    """
    keys = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), -1)
    dead = (scores == float("-inf")).all(-1, keepdim=True)  # a softmax over no keys is NaN, and so is its gradient
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    return weights if sinks is None else weights[..., :keys]


def matmul_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, scale: float, keep: Tensor | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, dropout_p: float = 0.0, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention by two matrix products, with softcap, sinks and factors `keep` on the weights.

    torch can differentiate it twice and in forward mode, which its fused kernels do not support.
    """
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = cap_scores(q @ k.transpose(-2, -1) * scale, softcap)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
    weights = softmax_weights(scores, sinks)
    weights = F.dropout(weights, dropout_p) if keep is None else weights * keep
    return weights.to(v.dtype) @ v


def attend(
    function, q, k, v, *, causal, window, scale, softcap, dropout, seed, alibi, bias, sinks, kv_start, kv_len,
    cu_seqlens,
) -> Tensor:  # fmt: skip
    """Attention by `function`, which takes (B, H, T, D) operands and the options of F.scaled_dot_product_attention.

    An option that this function of torch does not have is computed by `matmul_attention`.
    """
    mask = live_mask(q, k, causal, window, kv_start, kv_len, cu_seqlens)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options: dict[str, Any] = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
    added = bias
    if alibi is not None:
        i = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
        distance = torch.arange(k.shape[2], device=q.device) - i
        slopes = (alibi[:, None, None] * distance).to(q.dtype)[None]
        added = slopes if bias is None else bias + slopes
    dead = None
    if mask is not None:
        dead = ~mask.any(-1, keepdim=True)
        mask = mask | dead  # a softmax over no keys is NaN, so a dead row attends to all keys and its output is zeroed
        added = mask if added is None else added.masked_fill(~mask, float("-inf"))
    more = {"softcap": softcap, "sinks": sinks}
    if dropout > 0 and seed is not None:
        more["keep"] = dropout_mask(seed, dropout, *q.shape[:3], k.shape[2]) / (1 - dropout)
    else:
        options["dropout_p"] = dropout
    if any(value is not None for value in more.values()):
        function, options = matmul_attention, {**options, **more}
    y = function(q, k, v, attn_mask=added, scale=default_scale(q.shape[-1], scale), **options)
    y = y if dead is None else y.masked_fill(dead, 0.0)
    return y.transpose(1, 2).contiguous()
