"""The heads of a packed projection qkv (B, T, H + 2 K, D): queries, keys and values, as attention takes them.

Norms and rotary embedding prepare queries and keys. Forward saves the result for backward:

    rotary only    the projection with rotated queries and keys, instead of qkv
    norms          the normalized and rotated queries and keys (B, T, H + K, D) besides qkv, and r of `qk_norm`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the views (q, k, v)."""
    kv_heads = (qkv.shape[2] - n_head) // 2
    return qkv.split((n_head, kv_heads, kv_heads), dim=2)


def rotated_heads(qkv: Tensor, n_head: int) -> int:
    """H + K, the number of heads of a packed projection that rotary embedding rotates."""
    return (n_head + qkv.shape[2]) // 2


def prepared_heads(qkv: Tensor, prepared: Sequence[Tensor], n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the views (q, k, v) that attention takes; `prepared` has the saved tensors, none if nothing prepares."""
    if not prepared:
        return split_heads(qkv, n_head)
    heads = prepared[0].shape[2]
    if heads == qkv.shape[2]:
        return split_heads(prepared[0], n_head)
    return *prepared[0].split((n_head, heads - n_head), dim=2), qkv[:, :, heads:]


def prepare_heads(
    prepared: Sequence[Tensor], qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_norm: Tensor | None,
    k_norm: Tensor | None, *, rotate: Callable[..., None], normalize: Callable[..., None], n_head: int,
    interleaved: bool, norm_eps: float | None, norm_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fill the saved tensors by `rotate` or `normalize`, kernels of a backend. Return (q, k, v)."""
    if q_norm is not None:
        qk, r = prepared
        normalize(
            qk, r, qkv[:, :, : qk.shape[2]], q_norm, k_norm, cos, sin, n_head=n_head, interleaved=interleaved,
            eps=norm_eps, offset=norm_offset,
        )  # fmt: skip
    elif prepared:
        rotate(qkv, cos, sin, prepared[0], rotated_heads(qkv, n_head), interleaved)
    return prepared_heads(qkv, prepared, n_head)
