"""Linear layer on the GPU: cuBLAS through torch, which adds the bias in its epilogue; few rows take skinny_gemm.py."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.gpu import launch
from peakgpt.kernels.gpu.gemm import skinny_gemm


def objection(x: Tensor, w: Tensor, *_) -> str | None:
    return launch.objection(x, w)


def linear_out(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """Fill out, contiguous, with x w^T + b."""
    if skinny_gemm.supports(x, w):
        skinny_gemm.skinny_gemm_out(x, w, b, out)
    elif b is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(b, x, w.t(), out=out)


def forward(outputs, saved, x, w, b):
    linear_out(x.reshape(-1, x.shape[-1]), w, b, outputs[0].view(-1, w.shape[0]))


def backward(grads, inputs, outputs, saved, needs):
    x, w, _ = inputs
    need_x, need_w, need_b = needs
    dy, rows = grads[0].reshape(-1, w.shape[0]), x.reshape(-1, x.shape[-1])
    return (
        (dy @ w).view(x.shape) if need_x else None,
        torch.mm(dy.t(), rows, out=torch.empty_like(w)) if need_w else None,
        dy.sum(0) if need_b else None,
    )
