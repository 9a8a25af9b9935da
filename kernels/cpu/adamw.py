"""AdamW on the CPU: csrc/adamw.cpp, one pass over param, gradient, remainder and moments."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, threads


def objection(param: Tensor, grad: Tensor, remainder: Tensor | None, exp_avg: Tensor, *_, **__) -> str | None:
    if exp_avg.dtype != torch.float32:
        return f"takes float32 moments, got {str(exp_avg.dtype).removeprefix('torch.')}"
    return dtype_objection(param)


def forward(outputs, saved, param, grad, remainder, exp_avg, exp_avg_sq, step, norm, rate, *,
            lr, beta1, beta2, eps, weight_decay, max_norm):  # fmt: skip
    lr = lr if rate is None else lr * float(rate)
    _C.adamw(
        DTYPES[param.dtype], param.numel(), *map(address, (param, grad, remainder, exp_avg, exp_avg_sq, step, norm)),
        lr, beta1, beta2, eps, weight_decay, max_norm or 0.0, threads(),
    )  # fmt: skip
