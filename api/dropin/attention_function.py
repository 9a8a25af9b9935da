"""The attention function of `attn_implementation="peakgpt"`, and the compact mask that it takes.

`mask_function.py` makes the masks and registers both functions in transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.attention import attention

# Keyword arguments that models pass to every attention function and that do not change attention.
IGNORED_KEYWORDS = frozenset({
    "position_ids", "cache_position", "use_cache", "num_items_in_batch", "ignore_index", "shift_labels",
    "output_hidden_states", "return_dict", "max_length_q", "max_length_k", "cu_seq_lens_k",
})  # fmt: skip
NO_MASK_ARITHMETIC = (
    'this model applies its mask itself, so that attn_implementation="peakgpt" would never run: '
    'got a model without AttentionInterface, expected peakgpt.patch(model) or attn_implementation="eager"'
)


class Mask(NamedTuple):
    """A (B, 1, T, S) attention mask in compact form. For T != S the last query is aligned with the last key.

    Args:
        causal: query i does not see later keys.
        window: number of keys that a query sees, its own position included.
        start, length: (B,) int64, the range of valid keys of each sequence.
        keys: (B, S) bool, valid keys. Used if they are not one range, and under torch.compile, which cannot read them.
        documents: (N + 1,) int64 offsets of packed documents in the B * T tokens of the batch.
        unpacked: bool tensor that is asserted at run time. torch.compile cannot read position_ids, so packed ones must
            not occur.
    """

    causal: bool
    window: int | None = None
    start: Tensor | None = None
    length: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    unpacked: Tensor | None = None

    def __radd__(self, other):
        raise TypeError(NO_MASK_ARITHMETIC)

    __add__ = __radd__

    def __getattr__(self, name: str):  # a model uses it as a tensor
        raise AttributeError(NO_MASK_ARITHMETIC)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention for a module of transformers, with the signature of its AttentionInterface.

    Args:
        module: the attention module. Only its `is_causal` is read.
        query: (B, H, T, D). key, value: (B, K, S, D).
        attention_mask: a Mask; or a dense (B or 1, H or 1, T, S) tensor, bool or additive; or None. None
            is a causal mask if `is_causal` (default: of the module) is true. One query then sees all keys. For
            1 < T < S only the first T keys are used: this is the prompt in a static cache.
        dropout, scaling: as `dropout` and `scale` of `peakgpt.attention`. scaling None means 1 / sqrt(D).
        position_bias: (1 or B, H, T, S), added to the scores. It gets a gradient.
        cu_seq_lens_q: (N + 1,) offsets of packed documents, for B = 1. Overrides documents derived from position_ids.
        others: arguments in IGNORED_KEYWORDS are ignored; any other that is not None or False raises.
    Returns:
        ((B, T, H, D), None). Attention weights are never returned.
    Raises:
        ValueError: an unknown option, or a combination that is not supported.
    """
    _reject_unknown(others)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    queries = q.shape[1]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < queries < k.shape[1]:
            k, v = k[:, :queries], v[:, :queries]
            position_bias = None if position_bias is None else position_bias[..., :queries]
        attention_mask = Mask(causal, sliding_window if causal else None)
    return masked_attention(q, k, v, attention_mask, position_bias, cu_seq_lens_q, scale=scaling, dropout=dropout), None


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor,
    bias: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """Call `peakgpt.attention` on (B, T, H, D) tensors with a compact or dense mask; return (B, T, H, D)."""
    options = {"scale": scale, "dropout": dropout, "alibi": alibi}
    if isinstance(mask, Tensor):
        bias = _sum(bias, additive_mask(mask, q))
        if documents is not None:
            raise ValueError("attention: got a dense mask and packed documents, expected one of them")
        return attention(q, k, v, causal=False, window=window, bias=expand_bias(bias, q, k), **options)
    windows = [w for w in (window, mask.window) if w is not None]
    options["window"] = min(windows) if windows else None
    causal = mask.causal and q.shape[1] > 1  # one query sees every key, and backends are faster without a mask
    if documents is None and mask.documents is None:
        if mask.unpacked is not None:
            torch._assert_async(mask.unpacked, "packed position_ids while compiling: expected cu_seq_lens_q with them")
        if mask.keys is not None:
            bias = _sum(bias, additive_mask(mask.keys[:, None, None], q))
        return attention(
            q, k, v, causal=causal, kv_start=mask.start, kv_len=mask.length, bias=expand_bias(bias, q, k), **options
        )
    if bias is not None or mask.start is not None or mask.keys is not None:
        raise ValueError("attention: got packed documents with padding or a position bias, expected them alone")
    rows = [t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v)]
    y = attention(*rows, causal=causal, cu_seqlens=mask.documents if documents is None else documents, **options)
    return y.view(q.shape)


def _reject_unknown(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and value is not False and name not in IGNORED_KEYWORDS:
            raise ValueError(
                f'attn_implementation="peakgpt": got {name}={type(value).__name__}, expected None: '
                "peakgpt does not know this option"
            )


def additive_mask(mask: Tensor, q: Tensor) -> Tensor:
    """Turn a bool mask into an additive one: False becomes the lowest value of the dtype of the scores."""
    if mask.dtype != torch.bool:
        return mask
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _sum(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def expand_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Expand the bias to all queries and keys, as a view without new memory."""
    return None if bias is None else bias.expand(-1, -1, q.shape[1], k.shape[1])
