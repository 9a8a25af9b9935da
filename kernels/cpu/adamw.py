"""AdamW on the CPU: csrc/ops/adamw.cpp, one pass over parameters, gradients, remainders and moments."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads


def objection(param: Tensor, grad: Tensor, remainder: Tensor | None, exp_avg: Tensor, *_, **__) -> str | None:
    if exp_avg.dtype != torch.float32:
        return f"takes float32 moments, got {str(exp_avg.dtype).removeprefix('torch.')}"
    return dtype_objection(param)


def forward(outputs, saved, param, grad, remainder, exp_avg, exp_avg_sq, step, norm, rate, *,
            lr, beta1, beta2, eps, weight_decay, max_norm):  # fmt: skip
    _C.adamw(
        dtype=DTYPES[param.dtype],
        count=param.numel(),
        param=param,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        remainder=remainder,
        norm=norm,
        max_norm=max_norm or 0.0,
        rate=rate,
        threads=threads(),
    )


def prepare(table: Tensor, device: torch.device) -> Tensor:
    return table


def run_each(table, calls, norm=None, rate=None, *, lr, beta1, beta2, eps, weight_decay, max_norm=None):
    _C.adamw_each(
        dtype=DTYPES[calls[0][0].dtype],
        count=len(table),
        table=table,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        norm=norm,
        max_norm=max_norm or 0.0,
        rate=rate,
        threads=threads(),
    )
