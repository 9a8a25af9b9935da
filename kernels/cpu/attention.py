"""Attention on the CPU: csrc/attention.cpp and attention_backward.cpp, tiles of 64 x 64 with online softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, threads
from peakgpt.kernels.ops.attention import default_scale

MAX_WIDTH = 256  # the widest head that the tests cover


def objection(q, k, *_, **__) -> str | None:
    if q.shape[3] % 8 or not 8 <= q.shape[3] <= MAX_WIDTH:
        return f"takes head widths that are multiples of 8 up to {MAX_WIDTH}, got {q.shape[3]}"
    if k.shape[1] >= 2**24:
        return f"takes up to 2**24 - 1 keys, got {k.shape[1]}"
    return dtype_objection(q)


def forward(outputs, saved, q, k, v, *sides, **params):
    attend(outputs[0], saved[0], q, k, v, **dict(zip(_SIDES, sides, strict=True)), **params)


def backward(grads, inputs, outputs, saved, needs, **params):
    q, k, v, alibi, bias, *_ = inputs
    need_q, need_k, need_v, need_alibi, need_bias, *_ = needs
    dq, dk, dv = _empty_if(need_q, q), _empty_if(need_k or need_v, k), _empty_if(need_k or need_v, v)
    # Summed in float32, so a shared bias in bfloat16 rounds once; as large as the bias itself, without what broadcasts.
    dalibi = alibi.new_empty(alibi.shape, dtype=torch.float32) if need_alibi else None
    dbias = bias.new_zeros(bias.shape, dtype=torch.float32) if need_bias else None
    into = {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "dalibi": dalibi}
    sides = dict(zip(_SIDES, inputs[3:], strict=True))
    gradients(into, grads[0], outputs[0], saved[0], q, k, v, **sides, **params)
    dalibi = dalibi.to(alibi.dtype) if need_alibi else None
    dbias = dbias.to(bias.dtype) if need_bias else None
    return dq, dk if need_k else None, dv if need_v else None, dalibi, dbias, *[None] * 4


def attend(out, lse, q, k, v, **options) -> None:
    """Fill out (B, T, H, D), contiguous, and lse (B, H, T); options as in `_problem`."""
    q, k, v = (_unit_last(t) for t in (q, k, v))
    options = _converted(**options)
    _C.attention_forward(
        *_problem(q, k, v, **options), address(out), address(lse), *_strided(None) * 4, *_turns(None, None), 0, 0, 0,
        threads(),
    )  # fmt: skip


def gradients(into, dout, out, lse, q, k, v, *, cos=None, sin=None, interleaved=False, **options) -> None:
    """Fill what `into` holds of dq, dk, dv (contiguous last axis), dbias (float32 zeros) and dalibi (float32).

    With cos and sin q and k have been turned by them, as by `rotary`, and dq and dk are those of what they were before.
    """
    tables = (None, None) if cos is None else (cos.float().contiguous(), -sin.float().contiguous())
    q, k, v, dout = (_unit_last(t) for t in (q, k, v, dout))
    options = _converted(**options)
    dbias, dalibi = into.get("dbias"), into.get("dalibi")
    slope_rows = None if dalibi is None else lse.new_zeros(3, *lse.shape)
    _C.attention_backward(
        *_problem(q, k, v, **options), address(out), address(lse), *_strided(dout),
        *(value for name in ("dq", "dk", "dv") for value in _strided(into.get(name))),
        *_turns(*tables, interleaved), address(dbias), address(dalibi), address(slope_rows), threads(),
    )  # fmt: skip


def _empty_if(wanted: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if wanted else None


def _unit_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# The contract's tensors after q, k and v, with the dtype that the kernels read; None where they read several.
_SIDES = {
    "alibi": torch.float32,
    "bias": None,
    "kv_start": torch.int64,
    "kv_len": torch.int64,
    "cu_seqlens": torch.int64,
    "seed": torch.int64,
}


def _converted(**options) -> dict:
    """The options with their vectors contiguous, in the dtypes that the kernels read."""
    for name, dtype in _SIDES.items():
        if dtype and (tensor := options.get(name)) is not None:
            options[name] = tensor.to(dtype).contiguous()
    return options


def _strided(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides over batch, token, head."""
    return (0, 0, 0, 0) if tensor is None else (address(tensor), *tensor.stride()[:3])


def _turns(cos: Tensor | None, minus_sin: Tensor | None, interleaved: bool = False) -> tuple[int, ...]:
    """Addresses of the tables, pairs, whether these are neighbours."""
    return (0, 0, 0, False) if cos is None else (address(cos), address(minus_sin), cos.shape[1], interleaved)


def _bias(bias: Tensor | None) -> tuple[int, ...]:
    """Address, dtype, sizes of batch and head, strides."""
    return (0,) * 8 if bias is None else (address(bias), DTYPES[bias.dtype], *bias.shape[:2], *bias.stride())


def _problem(
    q, k, v, *, causal=True, window=None, scale=None, dropout=0.0, alibi=None, bias=None, kv_start=None, kv_len=None,
    cu_seqlens=None, seed=None,
) -> tuple:  # fmt: skip
    """The fields of AttentionArgs that both passes read."""
    batch, queries, heads, width = q.shape
    assert dropout == 0.0 or seed is not None
    return (
        DTYPES[q.dtype], batch, queries, k.shape[1], heads, k.shape[2], width, *_strided(q), *_strided(k), *_strided(v),
        address(alibi), address(kv_start), address(kv_len),
        address(cu_seqlens), 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, *_bias(bias),
        causal, window or 0, default_scale(width, scale), dropout, address(seed),
    )  # fmt: skip
