"""Attention over one packed projection on the CPU: the kernels of cpu/attention.py on views of qkv and of dqkv.

With rotary embedding the forward pass saves the rotated projection, and the backward pass of attention applies the
inverse rotation to dq and dk tile by tile.
"""

from __future__ import annotations

import torch

from peakgpt.kernels.cpu import attention, rotary
from peakgpt.kernels.ops.attention import rotated_heads

NO_GRADIENT = rotary.NO_GRADIENT


def objection(qkv, cos=None, sin=None, *_, n_head, interleaved=False, **params) -> str | None:
    reason = None if cos is None else rotary.objection(qkv, cos)
    return reason or attention.objection(*_split(qkv, n_head), **params)


def forward(outputs, saved, qkv, cos, sin, cu_seqlens, sinks, *, n_head, interleaved, **params):
    lse, *rotated = saved
    if rotated:
        rotary.rotate(qkv, cos, sin, rotated[0], rotated_heads(qkv, n_head), interleaved)
        (qkv,) = rotated
    attention.attend(outputs[0], lse, *_split(qkv, n_head), cu_seqlens=cu_seqlens, sinks=sinks, **params)


def backward(grads, inputs, outputs, saved, needs, *, n_head, **params):
    qkv, cos, sin, cu_seqlens, sinks = inputs
    lse, *rotated = saved
    if rotated:
        (qkv,) = rotated
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    into = dict(zip(("dq", "dk", "dv"), _split(dqkv, n_head), strict=True))
    into["dsinks"] = sinks.new_empty(sinks.shape, dtype=torch.float32) if needs[4] else None
    options = {"cos": cos, "sin": sin, "cu_seqlens": cu_seqlens, "sinks": sinks, **params}
    attention.gradients(into, grads[0], outputs[0], lse, *_split(qkv, n_head), **options)
    return dqkv, None, None, None, into["dsinks"].to(sinks.dtype) if needs[4] else None


def _split(qkv, n_head):
    """Return the views (q, k, v)."""
    kv_heads = (qkv.shape[2] - n_head) // 2
    return qkv[:, :, :n_head], qkv[:, :, n_head : n_head + kv_heads], qkv[:, :, n_head + kv_heads :]
