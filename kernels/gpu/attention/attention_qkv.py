"""Attention over one packed projection: the kernels of `attention` on slices; the gradients fill one tensor.

With cos and sin, the rotary kernel writes the rotated projection, which is saved for backward. The backward kernels
rotate dq and dk back in registers, in float32. With norms, the kernel of `qk_norm` writes the normalized and rotated
queries and keys, which are saved besides qkv, and its backward kernel finishes dq and dk in place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peakgpt.kernels.gpu import rotary
from peakgpt.kernels.gpu.attention import attention
from peakgpt.kernels.gpu.norm import qk_norm
from peakgpt.kernels.ops.qkv_heads import prepare_heads, prepared_heads, rotated_heads, split_heads

NO_GRADIENT = rotary.NO_GRADIENT


def objection(
    qkv: Tensor, cos=None, sin=None, cu_seqlens=None, q_norm=None, k_norm=None, sinks=None, *, n_head: int,
    interleaved: bool = False, norm_eps=None, norm_offset=0.0, **params,
) -> str | None:  # fmt: skip
    reason = None
    if q_norm is not None:
        reason = qk_norm.objection(qkv[:, :, : rotated_heads(qkv, n_head)], q_norm, k_norm, n_head=n_head)
    return reason or attention.objection(*split_heads(qkv, n_head), **params)


def declines(
    qkv: Tensor, cos=None, sin=None, cu_seqlens=None, q_norm=None, k_norm=None, sinks=None, *, n_head: int,
    interleaved=False, norm_eps=None, norm_offset=0.0, **params,
) -> str | None:  # fmt: skip
    return attention.declines(*split_heads(qkv, n_head), cu_seqlens, sinks, **params)


def forward(
    outputs, saved, qkv: Tensor, cos, sin, cu_seqlens, q_norm, k_norm, sinks, *, n_head: int, interleaved: bool,
    norm_eps, norm_offset, **params,
) -> None:  # fmt: skip
    lse, *prepared = saved
    heads = prepare_heads(
        prepared, qkv, cos, sin, q_norm, k_norm, rotate=rotary.rotate, normalize=qk_norm.normalize, n_head=n_head,
        interleaved=interleaved, norm_eps=norm_eps, norm_offset=norm_offset,
    )  # fmt: skip
    attention.fill_forward(outputs[0], lse, *heads, cu_seqlens=cu_seqlens, sinks=sinks, **params)


def backward(
    grads, inputs, outputs, saved, needs, *, n_head: int, interleaved: bool, norm_eps, norm_offset, **params
) -> Sequence[Tensor | None]:
    qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks = inputs
    lse, *prepared = saved
    whole = prepared[0] if qkv is None else qkv
    dqkv = torch.empty(whole.shape, dtype=whole.dtype, device=whole.device)
    dq, *dkv = split_heads(dqkv, n_head)
    dsinks = torch.empty(sinks.shape, dtype=sinks.dtype, device=sinks.device) if needs[6] else None
    rotation = {"cos": cos, "sin": sin, "interleaved": interleaved} if q_norm is None else {}
    attention.fill_backward(
        dq, tuple(dkv), grads[0], outputs[0], lse, *prepared_heads(whole, prepared, n_head), dsinks=dsinks,
        cu_seqlens=cu_seqlens, sinks=sinks, **rotation, **params,
    )  # fmt: skip
    if q_norm is None:
        return dqkv, *[None] * 5, dsinks
    qk, r = prepared
    dqk, x = dqkv[:, :, : qk.shape[2]], qkv[:, :, : qk.shape[2]]
    options = {"n_head": n_head, "interleaved": interleaved, "offset": norm_offset}
    return dqkv, None, None, None, *qk_norm.gradients(dqk, dqk, r, x, q_norm, k_norm, cos, sin, **options), dsinks
