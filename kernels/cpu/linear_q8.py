"""Linear layer with weights of 8 bits on the CPU: csrc/gemm/quantized.cpp and quantized_backward.cpp.

All quantized layers use `multiply` and `gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, scratch, threads
from peakgpt.kernels.cpu.gemm import ACTIVATIONS
from peakgpt.kernels.ops.linear_quantized import input_width
from peakgpt.kernels.ops.quantize import BLOCK

NO_GRADIENT = ("scale",)


def objection(x: Tensor, w: Tensor, scale: Tensor, *_, **__) -> str | None:
    return scale_objection(scale, torch.float32) or dtype_objection(x)


def forward(outputs, saved, x, w, scale, b, *, activation):
    multiply(8, outputs[0], x, w, scale, b, BLOCK, activation, saved)


def backward(grads, inputs, outputs, saved, needs, *, activation):
    x, w, scale, _ = inputs
    width = input_width(x, saved[0])
    dx, db = gradients(8, grads[0], width, saved[0], w, scale, (needs[0], needs[3]), BLOCK, activation)
    return dx, None, None, db


def scale_objection(scale: Tensor, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels do not take the scales of a packed weight, or None."""
    return None if scale.dtype == dtype else f"takes {dtype} scales, got {scale.dtype}"


def multiply(
    bits: int, out: Tensor, x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, block: int, activation: str,
    saved: Sequence[Tensor] = (), **groups: Any,
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
        rows=x.shape[0],
        x=x,
        x_row=x.stride(0),
        y=out,
        y_row=width,
        bias=b,
        activation=ACTIVATIONS.get(activation, -1),
        pre=saved[0] if saved and activation != "none" else None,
        threads=threads(),
        **groups,
    )


def gradients(
    bits: int, dy: Tensor, width: int, saved: Tensor, w: Tensor, scale: Tensor, needs: tuple[bool, bool], block: int,
    activation: str, order: Tensor | None = None, **groups: Any,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients (dx, db) that `needs` asks for.

    Args:
        dy: (..., F), contiguous.
        width: C.
        saved: what forward saved, `linear_quantized.saved_tensors`.
        order, groups: as in `multiply`.
    """
    need_x, need_b = needs
    dpre, dtype = rows(dy), DTYPES[dy.dtype]
    count, outputs = dpre.shape
    ordered = need_x and order is not None
    activated, unordered = scratch(
        dy.dtype, (0 if activation == "none" else count, outputs), (count if ordered else 0, width)
    )  # fmt: skip
    if activation != "none":
        _C.activation_backward(
            dtype=dtype, count=dpre.numel(), activation=ACTIVATIONS[activation], dy=dpre, pre=saved, dpre=activated,
            threads=threads(),
        )  # fmt: skip
        dpre = activated
    dx = dy.new_empty((*dy.shape[:-1], width)) if need_x else None
    if need_x:
        _C.linear_quantized_backward(
            dtype=dtype, bits=bits, n=outputs, k=width, block=block, weight=w, scale=scale, rows=count, dpre=dpre,
            dx=dx, order=order, unordered=unordered if ordered else None, threads=threads(), **groups,
        )  # fmt: skip
    return dx, dpre.sum(0) if need_b else None
