"""Linear layers with int8 or 4-bit weights, and inputs that are quantized to int8 at run time.

    y = act(Q(x) W^T + b)      Q and W: kernels/ops/quantize.py

Q quantizes each block of a row separately: one large input reduces the precision of its block only, and a row's result
does not depend on other rows. Fused backends multiply integers. The sum of a block is exact, and the blocks are added
in float32 in a fixed order. llama.cpp's Q8_0 quantizes inputs per block in the same way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peakgpt.kernels.core import check
from peakgpt.kernels.core.dispatch import Cost, op, short_lived
from peakgpt.kernels.ops.mlp import OUTPUT_ACTIVATIONS
from peakgpt.kernels.ops.quantize import (
    BLOCK,
    PANEL,
    check_group,
    dequantize_4,
    dequantize_8,
    round_inputs,
    unpack_4,
    unpack_8,
)  # fmt: skip

ACTIVATIONS = ("none", *OUTPUT_ACTIVATIONS)


def _check_panels(
    name: str, x: Tensor, w: Tensor, b: Tensor | None, outputs: int, lines_per_8: int, activation: str
) -> None:
    width = check.width(name, "x", x)
    check.shape(name, "w", w, -(-outputs // PANEL), -(-width // 8) * lines_per_8, PANEL, 4)
    check.shape(name, "b", b, outputs)
    check.same(name, "x", x, b=b)
    if w.dtype != torch.uint8 or w.device != x.device:
        raise ValueError(f"{name}: w is {w.dtype} on {w.device}, expected uint8 panels on x's device {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def _check_scale(name: str, x: Tensor, scale: Tensor) -> None:
    if not scale.is_floating_point() or scale.device != x.device:
        raise ValueError(
            f"{name}: scale is {scale.dtype} on {scale.device}, expected a floating dtype on x's device {x.device}"
        )


def _activated(y: Tensor, activation: str) -> Tensor:
    return y if activation == "none" else OUTPUT_ACTIVATIONS[activation](y)


def outputs(w: Tensor, b: Tensor | None, out: int | None) -> int:
    """Return F: `out`, else the size of the bias, else all outputs of the panels."""
    return out if out is not None else b.shape[0] if b is not None else w.shape[0] * PANEL


def _cost(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None, outputs: int) -> Cost:
    """2 FLOPs per weight and token. Moves every operand once."""
    tokens, size = x.numel() // x.shape[-1], x.element_size()
    read = w.numel() + scale.numel() * scale.element_size() + (x.numel() + (0 if b is None else outputs)) * size
    written = tokens * outputs * size
    return Cost(2 * tokens * x.shape[-1] * outputs, read + written, 0, 0, written, 0)


# ---- 8 bits ----


def _check_8(x, w, scale, b, *, activation):
    check.shape("linear_q8", "scale", scale, None)
    _check_panels("linear_q8", x, w, b, scale.shape[0], 2, activation)
    _check_scale("linear_q8", x, scale)


def _cost_8(x, w, scale, b=None, **_):
    return _cost(x, w, scale, b, scale.shape[0])


def _sample_8(rows: int = 1024, width: int = 768, out: int = 2304, **like):
    x, b, device = torch.randn(rows, width, **like), torch.randn(out, **like), like.get("device")
    w = torch.randint(1, 256, (-(-out // PANEL), -(-width // 8) * 2, PANEL, 4), dtype=torch.uint8, device=device)
    return x, w, torch.rand(out, device=device).add(0.5).mul(width**-0.5 / 73), b


def _alloc_8(x, w, scale, b, *, needs, activation):
    return (short_lived(x, *x.shape[:-1], scale.shape[0]),), ()


@op(cost=_cost_8, sample=_sample_8, check=_check_8, alloc=_alloc_8, strided=("x",), gradient=False)
def linear_q8(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Multiply the last axis of x, quantized to int8 in blocks of 128, by an int8 weight.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (ceil(F / 16), ceil(C / 8) * 2, 16, 4) uint8 panels, as `quantize.pack_8` makes them.
        scale: (F,) float32.
        b: (F,) in x's dtype, or None.
        activation: "none", "gelu_tanh", "gelu_erf", "relu", "silu", "clamped_swiglu" or "clamped_up".
    Returns:
        (..., F), dtype of x. A row of x with an infinity or NaN gives NaN.
    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit.
        NotImplementedError: an input requires grad, or the forced backend does not support the call.
    """
    weight = dequantize_8(unpack_8(w, scale.shape[0], x.shape[-1]), scale)
    return _activated(F.linear(round_inputs(x, BLOCK), weight.to(x.dtype), b), activation)


# ---- 4 bits ----


def _check_4(x, w, scale, b, *, out, group, activation):
    check_group("linear_q4", group)
    _check_panels("linear_q4", x, w, b, outputs(w, b, out), 1, activation)
    check.shape("linear_q4", "scale", scale, w.shape[0], -(-x.shape[-1] // group), PANEL)
    _check_scale("linear_q4", x, scale)


def _cost_4(x, w, scale, b=None, *, out=None, **_):
    return _cost(x, w, scale, b, outputs(w, b, out))


def _sample_4(rows: int = 1024, width: int = 768, out: int = 2304, group: int = 64, **like):
    x, b, device = torch.randn(rows, width, **like), torch.randn(out, **like), like.get("device")
    w = torch.randint(256, (-(-out // PANEL), -(-width // 8), PANEL, 4), dtype=torch.uint8, device=device)
    scale = torch.rand(w.shape[0], -(-width // group), PANEL, device=device).add(0.5).mul(width**-0.5 / 73)
    return x, w, scale.bfloat16(), b


def _alloc_4(x, w, scale, b, *, needs, out, group, activation):
    return (short_lived(x, *x.shape[:-1], outputs(w, b, out)),), ()


@op(cost=_cost_4, sample=_sample_4, check=_check_4, alloc=_alloc_4, strided=("x",), gradient=False)
def linear_q4(
    x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, *, out: int | None = None, group: int = 64,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """Multiply the last axis of x, quantized to int8 in blocks of `group`, by a 4-bit weight.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (ceil(F / 16), ceil(C / 8), 16, 4) uint8 panels; scale: (ceil(F / 16), ceil(C / group), 16) bfloat16: as
            `quantize.pack_4` makes them.
        b: (F,) in x's dtype, or None.
        out: F. Default: the size of b, else all outputs of the panels.
        group: number of neighboring inputs that share a scale: 32, 64 or 128.
        activation: "none", "gelu_tanh", "gelu_erf", "relu", "silu", "clamped_swiglu" or "clamped_up".
    Returns:
        (..., F), dtype of x. A row of x with an infinity or NaN gives NaN.
    Raises:
        ValueError: shapes, dtypes, devices, the group or the activation do not fit.
        NotImplementedError: an input requires grad, or the forced backend does not support the call.
    """
    width = x.shape[-1]
    weight = dequantize_4(*unpack_4(w, scale, outputs(w, b, out), width), width, group)
    return _activated(F.linear(round_inputs(x, group), weight.to(x.dtype), b), activation)
