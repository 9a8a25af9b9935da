"""Dropout on the CPU: csrc/ops/dropout.cpp, one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads


def objection(x: Tensor, *_, p: float) -> str | None:
    return dtype_objection(x) if p else "drops nothing at p = 0"


def forward(outputs, saved, x, seed, *, p):
    drop(x, seed, outputs[0], p)


def backward(grads, inputs, outputs, saved, needs, *, p):
    dx = torch.empty(grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
    drop(grads[0], inputs[1], dx, p)
    return dx, None


def drop(x: Tensor, seed: Tensor, out: Tensor, p: float) -> None:
    """Apply the dropout mask of `seed` to x and write the result to out; both are contiguous."""
    _C.dropout(dtype=DTYPES[x.dtype], count=x.numel(), x=x, seed=seed.long(), p=p, y=out, threads=threads())
