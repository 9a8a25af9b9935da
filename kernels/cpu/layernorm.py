"""LayerNorm on the CPU: csrc/layernorm.cpp, one pass per row, statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, rows, threads


def objection(x: Tensor, w: Tensor, b: Tensor | None, **_) -> str | None:
    if b is not None and b.dtype != w.dtype:
        return f"takes w and b of one dtype, got {w.dtype} and {b.dtype}"
    return dtype_objection(x, w)


def forward(outputs, saved, x, w, b, *, eps):
    normalise(x, None, w, b, None, outputs[0], saved, eps)


def backward(grads, inputs, outputs, saved, needs, *, eps):
    x, w, _ = inputs
    return gradients(grads[0], None, x, w, saved, needs)


def normalise(x, residual, w, b, total, normed, saved, eps) -> None:
    """Fill normed and saved = (mu, r), and total = x + residual where there is a residual; RMSNorm where mu is None."""
    x, w = rows(x), w.contiguous()
    b = None if b is None else b.contiguous()
    residual = None if residual is None else rows(residual)
    _C.layernorm_forward(
        DTYPES[x.dtype], DTYPES[w.dtype], *x.shape,
        address(x), x.stride(0), address(residual), 0 if residual is None else residual.stride(0),
        address(w), address(b), address(total), address(normed), *map(address, saved), eps, threads(),
    )  # fmt: skip


def gradients(dy, dsum, x, w, saved, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db), None where not needed; dy and dsum are the gradients that reached normed and sum, at least one."""
    need_x, need_w, need_b = needs
    shape, x, w = x.shape, rows(x), w.contiguous()
    dy = torch.zeros_like(x) if dy is None else rows(dy)
    dsum = None if dsum is None else rows(dsum)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dw, db = (torch.empty_like(w) if need else None for need in (need_w, need_b))
    _C.layernorm_backward(
        DTYPES[x.dtype], DTYPES[w.dtype], *x.shape,
        address(dy), dy.stride(0), address(dsum), 0 if dsum is None else dsum.stride(0),
        address(x), x.stride(0), address(w), *map(address, saved),
        address(dx), address(dw), address(db), threads(),
    )  # fmt: skip
    return dx if dx is None else dx.view(shape), dw, db
