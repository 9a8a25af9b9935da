"""Attention over one packed projection: the kernels of `attention` on slices; the gradients fill one tensor.

With cos and sin, the rotary kernel writes the rotated projection, which is saved for backward. The backward kernels
rotate dq and dk back in registers, in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from peakgpt.kernels.gpu import rotary
from peakgpt.kernels.gpu.attention import attention
from peakgpt.kernels.ops.attention import rotated_heads

NO_GRADIENT = rotary.NO_GRADIENT


def _split(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = (qkv.shape[2] - n_head) // 2
    return qkv.split((n_head, kv_heads, kv_heads), dim=2)


def objection(qkv: Tensor, *_, n_head: int, interleaved: bool = False, **params) -> str | None:
    return attention.objection(*_split(qkv, n_head), **params)


def declines(qkv: Tensor, cos=None, sin=None, cu_seqlens=None, sinks=None, *, n_head: int, interleaved=False, **params):
    return attention.declines(*_split(qkv, n_head), cu_seqlens, sinks, **params)


def forward(
    outputs, saved, qkv: Tensor, cos, sin, cu_seqlens, sinks, *, n_head: int, interleaved: bool, **params
) -> None:
    lse, *rotated = saved
    if rotated:
        rotary.rotate(qkv, cos, sin, rotated[0], rotated_heads(qkv, n_head), interleaved)
        (qkv,) = rotated
    attention.fill_forward(outputs[0], lse, *_split(qkv, n_head), cu_seqlens=cu_seqlens, sinks=sinks, **params)


def backward(grads, inputs, outputs, saved, needs, *, n_head: int, **params) -> Sequence[Tensor | None]:
    qkv, cos, sin, cu_seqlens, sinks = inputs
    lse, *rotated = saved
    if rotated:
        (qkv,) = rotated
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, *dkv = _split(dqkv, n_head)
    dsinks = torch.empty(sinks.shape, dtype=sinks.dtype, device=sinks.device) if needs[4] else None
    attention.fill_backward(
        dq, tuple(dkv), grads[0], outputs[0], lse, *_split(qkv, n_head), dsinks=dsinks, cos=cos, sin=sin,
        cu_seqlens=cu_seqlens, sinks=sinks, **params,
    )  # fmt: skip
    return dqkv, None, None, None, dsinks
