"""Gated MLP on the CPU: products of csrc/gemm/gemm.cpp with the gate and its gradient in their epilogues."""

from __future__ import annotations

from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection, rows, scratch
from peakgpt.kernels.cpu.gemm import ADD, GATE, GATE_SLOPE, gemm, linear_backward


def objection(x: Tensor, *_, **__) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, w_gate, b_gate, w_up, b_up, w_down, b_down, *, activation, recompute):
    x = rows(x)
    hidden, *gates = scratch(x.dtype, *[(x.shape[0], w_up.shape[0])] * (1 if saved else 2))
    gate, up = saved or (*gates, None)
    gemm(x, w_gate.t(), gate.view(hidden.shape), bias=b_gate)
    gemm(x, w_up.t(), hidden, epilogue=GATE, bias=b_up, activation=activation, pre=up, gate=gate)
    gemm(hidden, w_down.t(), outputs[0].view(x.shape[0], w_down.shape[0]), bias=b_down)


def backward(grads, inputs, outputs, saved, needs, *, activation, recompute, into=(None,) * 7):
    x, w_gate, b_gate, w_up, b_up, w_down, _ = inputs
    dy, flat = rows(grads[0]), rows(x)
    hidden, dgate, dup, *recomputed = scratch(x.dtype, *[(flat.shape[0], w_up.shape[0])] * (3 if saved else 5))
    gate, up = saved or recomputed
    if not saved:
        gemm(flat, w_gate.t(), gate, bias=b_gate)
        gemm(flat, w_up.t(), up, bias=b_up)
    gemm(dy, w_down, dup, epilogue=GATE_SLOPE, activation=activation, pre=up, act=hidden, gate=gate, dgate=dgate)
    _, dw_down, db_down = linear_backward(dy, hidden, w_down, (False, *needs[5:]), into[4:])
    dx, dw_gate, db_gate = linear_backward(dgate, flat, w_gate, needs[:3], into[:3])
    _, dw_up, db_up = linear_backward(dup, flat, w_up, (False, *needs[3:5]), (None, *into[3:5]))
    if dx is not None:
        dx = gemm(dup, w_up, dx, epilogue=ADD).view(x.shape)
    return dx, dw_gate, db_gate, dw_up, db_up, dw_down, db_down
