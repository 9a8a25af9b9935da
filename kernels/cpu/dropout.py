"""Dropout on the CPU: csrc/dropout.cpp, one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, threads


def objection(x: Tensor, *_, p: float) -> str | None:
    return dtype_objection(x) if p else "drops nothing at p = 0"


def forward(outputs, saved, x, seed, *, p):
    drop(x, seed, outputs[0], p)


def backward(grads, inputs, outputs, saved, needs, *, p):
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    drop(grads[0], inputs[1], dx, p)
    return dx, None


def drop(x: Tensor, seed: Tensor, out: Tensor, p: float) -> None:
    """Fill out, contiguous."""
    x, seed = x.contiguous(), seed.long()
    _C.dropout(DTYPES[x.dtype], x.numel(), address(x), address(seed), p, address(out), threads())
