"""Linear layer with weights of 8 bits on the CPU, by csrc/quantized.cpp; linear_q4 shares `multiply`."""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, address, dtype_objection, rows, threads
from peakgpt.kernels.cpu.gemm import ACTIVATIONS
from peakgpt.kernels.ops.quantize import BLOCK


def objection(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, **_) -> str | None:
    return panels_objection(w, scale, b, torch.float32) or dtype_objection(x)


def forward(outputs, saved, x, w, scale, b, *, activation):
    multiply(8, outputs[0], x, w, scale, b, BLOCK, activation)


def panels_objection(w: Tensor, scale: Tensor, b: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why a packed weight can not be taken, or None."""
    if scale.dtype != dtype:
        return f"takes {dtype} scales, got {scale.dtype}"
    if not (w.is_contiguous() and scale.is_contiguous() and (b is None or b.is_contiguous())):
        return "takes contiguous weights, scales and biases"
    return None


def multiply(
    bits: int, out: Tensor, x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, block: int, activation: str
) -> None:
    """out = act(Q(x) W^T + b); see csrc/quantized.h."""
    x = rows(x)
    width = out.shape[-1]
    _C.linear_quantized(
        DTYPES[x.dtype], x.shape[0], address(x), x.stride(0), bits, width, x.shape[1], block, address(w),
        address(scale), address(b), ACTIVATIONS.get(activation, -1), address(out), width, False, threads(),
    )  # fmt: skip
