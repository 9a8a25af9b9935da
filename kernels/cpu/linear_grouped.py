"""Linear layer with scales and offsets of groups on the CPU: csrc/gemm/quantized.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection
from peakgpt.kernels.cpu.linear_q8 import multiply, scale_objection
from peakgpt.kernels.ops.quantize import LEVEL_TABLES


def objection(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None, *_, **__) -> str | None:
    if scale.dtype == torch.bfloat16 and offset is None:
        return dtype_objection(x)
    wrong = [part for part in (scale, offset) if part is not None and part.dtype != torch.float16]
    return scale_objection(wrong[0], torch.float16) if wrong else dtype_objection(x)


def forward(outputs, saved, x, w, scale, offset, b, order, *, out, bits, group, levels, zero_points, activation):
    if order is not None and order.numel() and not 0 <= order.min() <= order.max() < order.numel():
        raise ValueError(f"linear_grouped: order has {order.min()} to {order.max()}, expected 0 to {order.numel() - 1}")
    multiply(bits, outputs[0], x, w, scale, b, group, activation,
             offset=offset, zero_points=zero_points,
             levels=list(LEVEL_TABLES).index(levels), order=order)  # fmt: skip
