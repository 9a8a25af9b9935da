"""Linear layer with weights of 8 bits on the CPU: csrc/gemm/quantized.cpp. All quantized layers use `multiply`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, threads
from peakgpt.kernels.cpu.gemm import ACTIVATIONS
from peakgpt.kernels.ops.quantize import BLOCK, SCALE_DTYPES


def objection(x: Tensor, w: Tensor, scale: Tensor, *_, **__) -> str | None:
    return scale_objection(scale, torch.float32) or dtype_objection(x)


def forward(outputs, saved, x, w, scale, b, *, activation):
    multiply(8, outputs[0], x, w, scale, b, BLOCK, activation)


def scale_objection(scale: Tensor, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels do not take the scales of a packed weight, or None."""
    return None if scale.dtype == dtype else f"takes {dtype} scales, got {scale.dtype}"


def multiply(
    bits: int, out: Tensor, x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, block: int, activation: str,
    **groups: Any,
) -> None:  # fmt: skip
    """Compute out = act(Q(x) W^T + b); csrc/gemm/quantized.h has the formulas, and the fields of `groups`."""
    x = rows(x)
    width = out.shape[-1]
    _C.linear_quantized(
        dtype=DTYPES[x.dtype],
        bits=bits,
        n=width,
        k=x.shape[1],
        block=block,
        weight=w,
        scale=scale,
        scales=SCALE_DTYPES.index(scale.dtype),
        rows=x.shape[0],
        x=x,
        x_row=x.stride(0),
        y=out,
        y_row=width,
        bias=b,
        activation=ACTIVATIONS.get(activation, -1),
        threads=threads(),
        **groups,
    )
