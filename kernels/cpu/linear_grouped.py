"""Linear layer with scales and offsets of groups on the CPU: csrc/gemm/quantized.cpp, quantized_backward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import dtype_objection
from peakgpt.kernels.cpu.linear_q8 import gradients, multiply, scale_objection
from peakgpt.kernels.ops.linear_quantized import input_width
from peakgpt.kernels.ops.quantize import LEVEL_TABLES

NO_GRADIENT = ("scale", "offset")


def objection(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | None, *_, bits: int = 4, **__) -> str | None:
    if scale.dtype == torch.bfloat16 and bits == 4 and offset is None:
        return dtype_objection(x)
    wrong = [part for part in (scale, offset) if part is not None and part.dtype != torch.float16]
    return scale_objection(wrong[0], torch.float16) if wrong else dtype_objection(x)


def forward(outputs, saved, x, w, scale, offset, b, order, *, out, bits, group, levels, zero_points, activation):
    if order is not None and order.numel() and not 0 <= order.min() <= order.max() < order.numel():
        raise ValueError(f"linear_grouped: order has {order.min()} to {order.max()}, expected 0 to {order.numel() - 1}")
    groups = _groups(scale, offset, levels, zero_points)
    multiply(bits, outputs[0], x, w, scale, b, group, activation, saved, order=order, **groups)


def backward(grads, inputs, outputs, saved, needs, *, out, bits, group, levels, zero_points, activation):
    x, w, scale, offset, _, order = inputs
    width, groups = input_width(x, saved[0]), _groups(scale, offset, levels, zero_points)
    needed = needs[0], needs[4]
    dx, db = gradients(bits, grads[0], width, saved[0], w, scale, needed, group, activation, order=order, **groups)
    return dx, None, None, None, db, None


def _groups(scale: Tensor, offset: Tensor | None, levels: str, zero_points: bool) -> dict[str, Any]:
    """Return the fields of QuantizedMatrix (csrc/gemm/quantized.h) that only this op has."""
    return {"f16_scales": scale.dtype == torch.float16, "offset": offset, "zero_points": zero_points,
            "levels": list(LEVEL_TABLES).index(levels)}  # fmt: skip
