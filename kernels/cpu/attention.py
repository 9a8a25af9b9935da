"""Attention on the CPU: csrc/attention.cpp and attention_backward.cpp, tiles of 64 x 64 with online softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.attention import default_scale
from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, threads

MAX_WIDTH = 256  # the widest head that the tests cover
NO_GRADIENT = ("alibi",)


def objection(q, k, v, alibi, bias, kv_start, kv_len, cu_seqlens, *, causal, window, scale, dropout) -> str | None:
    if dropout > 0:
        return "takes no dropout"
    if bias is not None:
        return "takes no additive bias"
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= MAX_WIDTH:
        return f"takes head widths that are multiples of 8 up to {MAX_WIDTH}, got {q.shape[3]}"
    if k.shape[1] >= 2**24:
        return f"takes up to 2**24 - 1 keys, got {k.shape[1]}"
    return dtype_objection(q)


def forward(outputs, saved, q, k, v, alibi, bias, kv_start, kv_len, cu_seqlens, *, dropout, **params):
    sides = {"alibi": alibi, "kv_start": kv_start, "kv_len": kv_len, "cu_seqlens": cu_seqlens}
    attend(outputs[0], saved[0], q, k, v, **sides, **params)


def backward(grads, inputs, outputs, saved, needs, *, dropout, **params):
    q, k, v, alibi, _, kv_start, kv_len, cu_seqlens = inputs
    need_q, need_k, need_v, *_ = needs
    dq, dk, dv = _empty_if(need_q, q), _empty_if(need_k or need_v, k), _empty_if(need_k or need_v, v)
    sides = {"alibi": alibi, "kv_start": kv_start, "kv_len": kv_len, "cu_seqlens": cu_seqlens}
    gradients((dq, dk, dv), grads[0], outputs[0], saved[0], q, k, v, **sides, **params)
    return dq, dk if need_k else None, dv if need_v else None, *[None] * 5


def attend(out, lse, q, k, v, **options) -> None:
    """Fill out (B, T, H, D), contiguous, and lse (B, H, T); options as in `_problem`."""
    q, k, v = (_unit_last(t) for t in (q, k, v))
    options = _converted(**options)
    _C.attention_forward(
        *_problem(q, k, v, **options), address(out), address(lse),
        *_strided(None), *_strided(None), *_strided(None), *_strided(None), threads(),
    )  # fmt: skip


def gradients(into, dout, out, lse, q, k, v, **options) -> None:
    """Fill into = (dq, dk, dv), strided like any view with a contiguous last axis; None where not wanted."""
    q, k, v, dout = (_unit_last(t) for t in (q, k, v, dout))
    options = _converted(**options)
    _C.attention_backward(
        *_problem(q, k, v, **options), address(out), address(lse),
        *_strided(dout), *(value for t in into for value in _strided(t)), threads(),
    )  # fmt: skip


def _empty_if(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None


def _unit_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_SIDES = {"alibi": torch.float32, "kv_start": torch.int64, "kv_len": torch.int64, "cu_seqlens": torch.int64}


def _converted(**options) -> dict:
    """The options with their vectors contiguous, in the dtypes that the kernels read."""
    for name, dtype in _SIDES.items():
        if (tensor := options.get(name)) is not None:
            options[name] = tensor.to(dtype).contiguous()
    return options


def _strided(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides over batch, token, head."""
    return (0, 0, 0, 0) if tensor is None else (address(tensor), *tensor.stride()[:3])


def _problem(
    q, k, v, *, causal=True, window=None, scale=None, alibi=None, kv_start=None, kv_len=None, cu_seqlens=None
) -> tuple:
    """The fields of AttentionArgs that both passes read."""
    batch, queries, heads, width = q.shape
    return (
        DTYPES[q.dtype], batch, queries, k.shape[1], heads, k.shape[2], width, *_strided(q), *_strided(k), *_strided(v),
        address(alibi), address(kv_start), address(kv_len),
        address(cu_seqlens), 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        causal, window or 0, default_scale(width, scale),
    )  # fmt: skip
