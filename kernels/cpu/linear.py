"""Linear layer on the CPU: the matrix product of csrc/gemm/gemm.cpp."""

from __future__ import annotations

from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection, rows
from peakgpt.kernels.cpu.gemm import gemm, linear_backward


def objection(x: Tensor, *_) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, w, b):
    x = rows(x)
    gemm(x, w.t(), outputs[0].view(x.shape[0], w.shape[0]), bias=b)


def backward(grads, inputs, outputs, saved, needs, *, into=(None, None, None)):
    x, w, _ = inputs
    dx, dw, db = linear_backward(rows(grads[0]), rows(x), w, needs, into)
    return dx if dx is None else dx.view(x.shape), dw, db
