"""Rotary position embedding on the CPU: csrc/rotary.cpp, one pass over the packed projection."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, threads

NO_GRADIENT = ("cos", "sin")
MAX_PAIRS = 512  # kMaxPairs in csrc/rotary.h


def objection(x: Tensor, cos: Tensor, *_, **__) -> str | None:
    if cos.shape[1] > MAX_PAIRS:
        return f"turns up to {MAX_PAIRS} pairs a head, got {cos.shape[1]}"
    return dtype_objection(x)


def forward(outputs, saved, x, cos, sin, *, heads, interleaved):
    turn(x, cos, sin, outputs[0], heads, interleaved)


def backward(grads, inputs, outputs, saved, needs, *, heads, interleaved):
    _, cos, sin = inputs
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    turn(grads[0], cos, -sin, dx, heads, interleaved)
    return dx, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, interleaved: bool) -> None:
    """Fill out, (B, T, N, D) contiguous."""
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = (table.float().contiguous() for table in (cos, sin))
    _C.rotary(
        DTYPES[x.dtype], *x.shape, cos.shape[1], heads, interleaved, address(x), *x.stride()[:3],
        address(cos), address(sin), address(out), 0, threads(),
    )  # fmt: skip
