"""MLP on the CPU: products of csrc/gemm/gemm.cpp with bias, activation and its derivative in their epilogues."""

from __future__ import annotations

from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection, rows, scratch
from peakgpt.kernels.cpu.gemm import ACTIVATE, SLOPE, gemm, linear_backward


def objection(x: Tensor, *_, **__) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, w_up, b_up, w_down, b_down, *, activation, recompute):
    x = rows(x)
    pre = saved[0] if saved else None
    (hidden,) = scratch(x.dtype, (x.shape[0], w_up.shape[0]))
    gemm(x, w_up.t(), hidden, epilogue=ACTIVATE, bias=b_up, activation=activation, pre=pre)
    gemm(hidden, w_down.t(), outputs[0].view(x.shape[0], w_down.shape[0]), bias=b_down)


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute, into=(None,) * 5):
    x, w_up, b_up, w_down, _ = inputs
    need_x, need_w_up, need_b_up, need_w_down, need_b_down = needs
    dy, flat = rows(grads[0]), rows(x)
    hidden, dpre, *recomputed = scratch(x.dtype, *[(flat.shape[0], w_up.shape[0])] * (2 if saved else 3))
    pre = saved[0] if saved else gemm(flat, w_up.t(), recomputed[0], bias=b_up)
    gemm(dy, w_down, dpre, epilogue=SLOPE, activation=activation, pre=pre, act=hidden if need_w_down else None)
    _, dw_down, db_down = linear_backward(dy, hidden, w_down, (False, need_w_down, need_b_down), into[2:])
    dx, dw_up, db_up = linear_backward(dpre, flat, w_up, (need_x, need_w_up, need_b_up), into[:3])
    return dx if dx is None else dx.view(x.shape), dw_up, db_up, dw_down, db_down
