"""Attention over one packed projection on the CPU: the kernels of cpu/attention.py on views of qkv and of dqkv.

With rotary embedding the forward pass saves the rotated projection, and the backward pass of attention applies the
inverse rotation to dq and dk tile by tile. With norms the forward pass saves the normalized queries and keys, and the
kernel of cpu/qk_norm.py finishes dq and dk in place.
"""

from __future__ import annotations

import torch

from peakgpt.kernels.cpu import attention, qk_norm, rotary
from peakgpt.kernels.ops.qkv_heads import prepare_heads, prepared_heads, split_heads

NO_GRADIENT = rotary.NO_GRADIENT


def objection(
    qkv, cos=None, sin=None, cu_seqlens=None, q_norm=None, k_norm=None, sinks=None, *, n_head, interleaved=False,
    norm_eps=None, norm_offset=0.0, **params,
) -> str | None:  # fmt: skip
    reason = None if cos is None else rotary.objection(qkv, cos)
    if q_norm is not None:
        reason = reason or qk_norm.objection(qkv, q_norm, k_norm)
    return reason or attention.objection(*split_heads(qkv, n_head), **params)


def forward(
    outputs, saved, qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks, *, n_head, interleaved, norm_eps, norm_offset,
    **params,
):  # fmt: skip
    lse, *prepared = saved
    heads = prepare_heads(
        prepared, qkv, cos, sin, q_norm, k_norm, rotate=rotary.rotate, normalize=qk_norm.normalize, n_head=n_head,
        interleaved=interleaved, norm_eps=norm_eps, norm_offset=norm_offset,
    )  # fmt: skip
    attention.attend(outputs[0], lse, *heads, cu_seqlens=cu_seqlens, sinks=sinks, **params)


def backward(
    grads, inputs, outputs, saved, needs, *, n_head, interleaved, norm_eps, norm_offset, **params
):
    qkv, cos, sin, cu_seqlens, q_norm, k_norm, sinks = inputs
    lse, *prepared = saved
    whole = prepared[0] if qkv is None else qkv
    dqkv = torch.empty_like(whole, memory_format=torch.contiguous_format)
    into = dict(zip(("dq", "dk", "dv"), split_heads(dqkv, n_head), strict=True))
    dsinks = into["dsinks"] = sinks.new_empty(sinks.shape, dtype=torch.float32) if needs[6] else None
    rotation = {"cos": cos, "sin": sin, "interleaved": interleaved} if q_norm is None else {}
    heads = prepared_heads(whole, prepared, n_head)
    options = {"cu_seqlens": cu_seqlens, "sinks": sinks, **rotation, **params}
    attention.gradients(into, grads[0], outputs[0], lse, *heads, **options)
    dsinks = None if dsinks is None else dsinks.to(sinks.dtype)
    if q_norm is None:
        return dqkv, *[None] * 5, dsinks
    qk, r = prepared
    dqk = dqkv[:, :, : qk.shape[2]]
    dw = qk_norm.gradients(
        dqk, dqk, r, qkv[:, :, : qk.shape[2]], q_norm, k_norm, cos, sin, needs=needs[4:6], n_head=n_head,
        interleaved=interleaved, offset=norm_offset,
    )  # fmt: skip
    return dqkv, None, None, None, *dw, dsinks
