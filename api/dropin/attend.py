"""Attention as transformers' modules ask for it: a mask that stays what it says, and the options they hand over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.attention import attention

# What models hand through to attention although it is for others.
NOT_FOR_ATTENTION = frozenset({
    "position_ids", "cache_position", "use_cache", "num_items_in_batch", "ignore_index", "shift_labels",
    "output_hidden_states", "return_dict", "max_length_q", "max_length_k", "cu_seq_lens_k",
})  # fmt: skip
TAKES_NO_MASK = (
    'this model applies its mask itself, so that attn_implementation="peakgpt" would never run: '
    'got a model without AttentionInterface, expected peakgpt.patch(model) or attn_implementation="eager"'
)


class Mask(NamedTuple):
    """What a (B, 1, T, S) mask says, aligned at the end where T != S.

    Args:
        causal: query i sees no key after it.
        window: keys that a query sees, itself counted.
        start, length: (B,) int64, the range of each sequence's keys.
        keys: (B, S) bool, live keys, where they are no range or, while compiling, can not be looked at.
        documents: (N + 1,) int64 offsets of the documents in the B * T tokens of the batch.
        unpacked: a bool tensor that must hold: while compiling nobody can look for documents in position_ids.
    """

    causal: bool
    window: int | None = None
    start: Tensor | None = None
    length: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    unpacked: Tensor | None = None

    def __radd__(self, other):
        raise TypeError(TAKES_NO_MASK)

    __add__ = __radd__

    def __getattr__(self, name: str):  # what a tensor has and this has not
        raise AttributeError(TAKES_NO_MASK)


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
    """What transformers' attention modules call.

    Args:
        module: whose attention it is.
        query: (B, H, T, D). key, value: (B, K, S, D).
        attention_mask: from `mask`; or a dense (B or 1, H or 1, T, S), bool or to be added; None means causal (if
            is_causal or the module says so) for T = S, every key for one query, and for other S the first T keys, which
            is how the prompt of a static cache comes.
        dropout, scaling: as in `attention`; scaling None means 1 / sqrt(D).
        position_bias: (1 or B, H, T, S), added to the scores; it gets a gradient.
        cu_seq_lens_q: (N + 1,) offsets of packed documents, for B = 1; comes before what position_ids say.
        others: what is not None and not known to concern others raises.
    Returns:
        ((B, T, H, D), None): no weights.
    Raises:
        ValueError: an option that this attention has not, or that goes with no other.
    """
    _refuse(others)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    queries = q.shape[1]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < queries < k.shape[1]:
            k, v = k[:, :queries], v[:, :queries]
            position_bias = None if position_bias is None else position_bias[..., :queries]
        attention_mask = Mask(causal, sliding_window if causal else None)
    return attend(q, k, v, attention_mask, position_bias, cu_seq_lens_q, scale=scaling, dropout=dropout), None


def attend(
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
    """`attention` of (B, T, H, D) under what a mask says; (B, T, H, D), contiguous."""
    options = {"scale": scale, "dropout": dropout, "alibi": alibi}
    if isinstance(mask, Tensor):
        bias = _sum(bias, additive(mask, q))
        if documents is not None:
            raise ValueError("attention: got a dense mask and packed documents, expected one of them")
        return attention(q, k, v, causal=False, window=window, bias=full(bias, q, k), **options)
    windows = [w for w in (window, mask.window) if w is not None]
    options["window"] = min(windows) if windows else None
    causal = mask.causal and q.shape[1] > 1  # one query sees every key: saying so spares the backends a mask
    if documents is None and mask.documents is None:
        if mask.unpacked is not None:
            torch._assert_async(mask.unpacked, "packed position_ids while compiling: expected cu_seq_lens_q with them")
        if mask.keys is not None:
            bias = _sum(bias, additive(mask.keys[:, None, None], q))
        return attention(
            q, k, v, causal=causal, kv_start=mask.start, kv_len=mask.length, bias=full(bias, q, k), **options
        )
    if bias is not None or mask.start is not None or mask.keys is not None:
        raise ValueError("attention: got packed documents with padding or a position bias, expected them alone")
    rows = [t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v)]
    y = attention(*rows, causal=causal, cu_seqlens=mask.documents if documents is None else documents, **options)
    return y.view(q.shape)


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and value is not False and name not in NOT_FOR_ATTENTION:
            raise ValueError(
                f'attn_implementation="peakgpt": got {name}={type(value).__name__}, expected None: '
                "it is not known here what this would change"
            )


def additive(mask: Tensor, q: Tensor) -> Tensor:
    """A mask to be added: the least number of what the scores are computed in where a bool one is False."""
    if mask.dtype != torch.bool:
        return mask
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _sum(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def full(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias over all queries and keys; what it repeats costs no memory."""
    return None if bias is None else bias.expand(-1, -1, q.shape[1], k.shape[1])
