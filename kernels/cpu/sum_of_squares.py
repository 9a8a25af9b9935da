"""Sum of squares on the CPU: csrc/ops/sum_of_squares.cpp, one read of the buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, threads


def objection(x: Tensor, total: Tensor) -> str | None:
    return dtype_objection(x)


def forward(outputs, saved, x, total):
    _C.sum_of_squares(dtype=DTYPES[x.dtype], count=x.numel(), x=x, total=total, threads=threads())


def prepare(table: Tensor, device: torch.device) -> Tensor:
    return table


def run_each(table, calls, total):
    dtype = DTYPES[calls[0][0].dtype]
    _C.sum_of_squares_each(dtype=dtype, count=len(table), table=table, total=total, threads=threads())
