"""Rotary position embedding on the CPU: csrc/ops/rotary.cpp, one pass over the packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads, unit_last

NO_GRADIENT = ("cos", "sin")
MAX_PAIRS = 512  # kMaxPairs in csrc/ops/rotary.h


def objection(x: Tensor, cos: Tensor, *_, **__) -> str | None:
    if cos.shape[1] > MAX_PAIRS:
        return f"takes up to {MAX_PAIRS} pairs in a head, got {cos.shape[1]}"
    return dtype_objection(x)


def forward(outputs, saved, x, cos, sin, *, heads, interleaved):
    rotate(x, cos, sin, outputs[0], heads, interleaved)


def backward(grads, inputs, outputs, saved, needs, *, heads, interleaved):
    _, cos, sin = inputs
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    rotate(grads[0], cos, -sin, dx, heads, interleaved)
    return dx, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, interleaved: bool) -> None:
    """Rotate the first heads of x (B, T, N, D) to out and copy the other heads. out, cos and sin are contiguous."""
    x = unit_last(x)
    batch, tokens, all_heads, width = x.shape
    _C.rotary(
        dtype=DTYPES[x.dtype],
        batch=batch,
        tokens=tokens,
        heads=all_heads,
        width=width,
        pairs=cos.shape[1],
        rotated_heads=heads,
        interleaved=interleaved,
        x=x,
        cos=cos.float(),
        sin=sin.float(),
        y=out,
        threads=threads(),
    )
