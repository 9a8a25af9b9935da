"""Attention on the CPU: csrc/attention/attention_forward.cpp and attention_backward.cpp, tiles of 64 x 64."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads, unit_last
from peakgpt.kernels.ops.attention_math import default_scale

MAX_WIDTH = 256  # the widest head that the tests cover
# The tensors of the contract after q, k and v, with the dtype that the kernels read; None: several dtypes.
_OPTIONS = {
    "alibi": torch.float32,
    "bias": None,
    "sinks": torch.float32,
    "kv_start": torch.int64,
    "kv_len": torch.int64,
    "cu_seqlens": torch.int64,
    "seed": torch.int64,
}


def objection(q, k, *_, **__) -> str | None:
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= MAX_WIDTH:
        return f"takes head widths that are multiples of 8 up to {MAX_WIDTH}, got {q.shape[3]}"
    if k.shape[1] >= 2**24:
        return f"takes up to 2**24 - 1 keys, got {k.shape[1]}"
    return dtype_objection(q)


def forward(outputs, saved, q, k, v, *options, **params):
    attend(outputs[0], saved[0], q, k, v, **dict(zip(_OPTIONS, options, strict=True)), **params)


def backward(grads, inputs, outputs, saved, needs, **params):
    q, k, v, alibi, bias, sinks, *_ = inputs
    need_q, need_k, need_v, need_alibi, need_bias, need_sinks, *_ = needs
    dq, dk, dv = _empty_if(need_q, q), _empty_if(need_k or need_v, k), _empty_if(need_k or need_v, v)
    # Summed in float32, so that the gradient of a shared bias in bfloat16 is rounded once.
    dalibi = alibi.new_empty(alibi.shape, dtype=torch.float32) if need_alibi else None
    dbias = bias.new_zeros(bias.shape, dtype=torch.float32) if need_bias else None
    dsinks = sinks.new_empty(sinks.shape, dtype=torch.float32) if need_sinks else None
    into = {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "dalibi": dalibi, "dsinks": dsinks}
    options = dict(zip(_OPTIONS, inputs[3:], strict=True))
    gradients(into, grads[0], outputs[0], saved[0], q, k, v, **options, **params)
    dalibi = dalibi.to(alibi.dtype) if need_alibi else None
    dbias = dbias.to(bias.dtype) if need_bias else None
    dsinks = dsinks.to(sinks.dtype) if need_sinks else None
    return dq, dk if need_k else None, dv if need_v else None, dalibi, dbias, dsinks, *[None] * 4


def attend(out, lse, q, k, v, **options) -> None:
    """Compute attention; `_problem` has the options.

    Args:
        out: (B, T, H, D) contiguous, written.
        lse: (B, H, T) float32, written.
        q, k, v: (B, T, H, D) and (B, S, K, D).
    """
    _C.attention_forward(**_problem(q, k, v, **options), out=out, lse=lse, threads=threads())


def gradients(into, dout, out, lse, q, k, v, *, cos=None, sin=None, interleaved=False, **options) -> None:
    """Compute the gradients of attention.

    Args:
        into: the gradients to write, by name: dq, dk, dv with contiguous last axis, dbias float32 zeros, dalibi and
            dsinks float32.
        dout, out, lse: gradient and results of the forward pass.
        q, k, v: as in `attend`. With cos and sin they are results of `rotary`, and dq and dk become the gradients of
            its inputs.
    """
    dalibi, dsinks = into.get("dalibi"), into.get("dsinks")
    rotation = {}
    if cos is not None:
        rotation = {
            "cos": cos.float(),
            "minus_sin": -sin.float(),
            "pairs": cos.shape[1],
            "interleaved": interleaved,
        }
    _C.attention_backward(
        **_problem(q, k, v, **options),
        out=out,
        lse=lse,
        dout=unit_last(dout),
        dq=into.get("dq"),
        dk=into.get("dk"),
        dv=into.get("dv"),
        **rotation,
        dbias=into.get("dbias"),
        dalibi=dalibi,
        dalibi_rows=None if dalibi is None else lse.new_zeros(3, *lse.shape),
        dsinks=dsinks,
        dsinks_rows=None if dsinks is None else torch.empty_like(lse),
        threads=threads(),
    )


def _empty_if(needed: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if needed else None


def _problem(q, k, v, *, causal=True, window=None, scale=None, softcap=None, dropout=0.0, seed=None, bias=None,
             cu_seqlens=None, **vectors) -> dict[str, object]:  # fmt: skip
    """Return the fields of AttentionProblem in csrc/attention/attention.h; vectors: alibi, sinks, kv_start, kv_len."""
    assert dropout == 0.0 or seed is not None
    batch, queries, heads, width = q.shape
    problem = {
        "dtype": DTYPES[q.dtype],
        "batch": batch,
        "queries": queries,
        "keys": k.shape[1],
        "heads": heads,
        "kv_heads": k.shape[2],
        "width": width,
        "q": unit_last(q),
        "k": unit_last(k),
        "v": unit_last(v),
        "causal": causal,
        "scale": default_scale(width, scale),
        "window": window or 0,
        "softcap": softcap or 0.0,
    }
    for name, vector in vectors.items():
        if vector is not None:
            problem[name] = vector.to(_OPTIONS[name])
    if cu_seqlens is not None:
        problem["cu_seqlens"] = cu_seqlens.to(torch.int64)
        problem["documents"] = cu_seqlens.shape[0] - 1
    if bias is not None:
        bias = bias.resolve_neg()
        problem |= {"bias": bias, "bias_dtype": DTYPES[bias.dtype], "bias_batch": bias.shape[0]}
        problem["bias_heads"] = bias.shape[1]
        names = ("bias_stride_b", "bias_stride_h", "bias_stride_t", "bias_stride_s")
        problem |= zip(names, bias.stride(), strict=True)
    if dropout:
        problem |= {"dropout": dropout, "seed": seed.to(torch.int64)}
    return problem
