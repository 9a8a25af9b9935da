"""MLP on the CPU: torch's matrix products, csrc/activation.cpp for all that lies between them.

torch hands the products to oneDNN and MKL, which run at 85 to 90 % of peak; a bias there costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, rows, threads, workspace

ACTIVATIONS = {"gelu_tanh": 0, "gelu_erf": 1, "relu": 2}  # Activation in csrc/activation.h


def objection(x: Tensor, *_, **__) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, w_up, b_up, w_down, b_down, *, activation):
    x = rows(x)
    shape = x.shape[0], w_up.shape[0]
    hidden = workspace("hidden", x.dtype, *shape)
    pre = saved[0].view(shape) if saved else hidden
    linear(x, w_up, b_up, pre)
    _C.activation_forward(
        DTYPES[x.dtype], ACTIVATIONS[activation], pre.numel(), address(pre), address(hidden), threads()
    )
    linear(hidden, w_down, b_down, outputs[0].view(shape[0], -1) if shape[0] else outputs[0].view(0, w_down.shape[0]))


def backward(grads, inputs, outputs, saved, needs, *, activation):
    x, w_up, _, w_down, _ = inputs
    need_x, need_w_up, need_b_up, need_w_down, need_b_down = needs
    dy, flat = rows(grads[0]), rows(x)
    pre = saved[0].view(flat.shape[0], -1) if saved[0].numel() else saved[0].view(0, w_up.shape[0])
    dpre = torch.mm(dy, w_down, out=workspace("dpre", x.dtype, *pre.shape))
    hidden = workspace("hidden", x.dtype, *pre.shape) if need_w_down else None
    db_up = w_up.new_empty(w_up.shape[0]) if need_b_up else None
    _C.activation_backward(
        DTYPES[x.dtype], ACTIVATIONS[activation], *pre.shape,
        address(pre), address(dpre), address(hidden), address(db_up), threads(),
    )  # fmt: skip
    return (
        torch.mm(dpre, w_up).view(x.shape) if need_x else None,
        weight_gradient(dpre, flat, w_up) if need_w_up else None,
        db_up,
        weight_gradient(dy, hidden, w_down) if need_w_down else None,
        dy.sum(0) if need_b_down else None,
    )


def linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out = x w^T + b."""
    torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)


def weight_gradient(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dy^T x, in w's strides: Conv1D's weights arrive transposed."""
    return torch.mm(dy.t(), x) if w.stride(1) == 1 else torch.mm(x.t(), dy).t()
