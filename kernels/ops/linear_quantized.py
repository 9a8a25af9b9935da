"""Linear layers with int8 or 4-bit weights, and inputs that are quantized to int8 at run time.

    y  = act(pre)      pre = Q(x) W^T + b      Q and W: kernels/ops/quantize.py
    dx = dpre W        dpre = dy act'(pre)     db = sum_rows(dpre)

Q quantizes each block of a row separately: one large input reduces the precision of its block only, and a row's result
does not depend on other rows. Fused backends multiply integers. The sum of a block is exact, and the blocks are added
in float32 in a fixed order. llama.cpp's Q8_0 quantizes inputs per block in the same way.

Weights and scales are constants. Q counts as the identity in backward, so dx needs the weight alone: without an
activation forward saves nothing of x. That is how adapters are trained over frozen weights: Dettmers, Pagnoni,
Holtzman, Zettlemoyer 2023, "QLoRA", arXiv:2305.14314, section 3. Fused backends decode W in parts, never as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def cost(x: Tensor, weight_bytes: int, b: Tensor | None, outputs: int, activation: str) -> Cost:
    """2 FLOPs per weight and token, and as many backward. Moves every operand once.

    Args:
        weight_bytes: of the weight with its scales.
        outputs: F.
    """
    tokens, size = x.numel() // x.shape[-1], x.element_size()
    flops, written = 2 * tokens * x.shape[-1] * outputs, tokens * outputs * size
    bias = 0 if b is None else outputs * size
    pre = 0 if activation == "none" else written
    gradients = x.numel() * size + bias
    return Cost(
        flops, weight_bytes + x.numel() * size + bias + written, flops, weight_bytes + written + gradients + 2 * pre,
        written, gradients + pre,
    )  # fmt: skip


def saved_tensors(x: Tensor, outputs: int, needs: Sequence[bool], activation: str) -> tuple[Tensor, ...]:
    """Allocate what forward saves: the pre-activation (..., F), or an empty tensor (0, C) with the width of x."""
    if not any(needs):
        return ()
    return (x.new_empty((0, x.shape[-1])) if activation == "none" else x.new_empty((*x.shape[:-1], outputs)),)


def input_width(x: Tensor | None, saved: Tensor) -> int:
    """Return C in backward, from x if it was saved, and from the tensor of `saved_tensors`."""
    return saved.shape[-1] if x is None else x.shape[-1]


def saved_inputs(*names: str) -> Callable[..., tuple[str, ...]]:
    """Return the `saved_for_backward` of a contract.

    Only second derivatives read x: its values through an activation, and its shape if x has no gradient to tell it.
    """
    return lambda x, *_, activation, **__: names if activation == "none" and x.requires_grad else ("x", *names)


# ---- 8 bits ----


def _check_8(x, w, scale, b, *, activation):
    check.shape("linear_q8", "scale", scale, None)
    _check_panels("linear_q8", x, w, b, scale.shape[0], 2, activation)
    _check_scale("linear_q8", x, scale)


def _cost_8(x, w, scale, b=None, *, activation="none"):
    return cost(x, w.nbytes + scale.nbytes, b, scale.shape[0], activation)


def _sample_8(rows: int = 1024, width: int = 768, out: int = 2304, **like):
    x, b, device = torch.randn(rows, width, **like), torch.randn(out, **like), like.get("device")
    w = torch.randint(1, 256, (-(-out // PANEL), -(-width // 8) * 2, PANEL, 4), dtype=torch.uint8, device=device)
    return x, w, torch.rand(out, device=device).add(0.5).mul(width**-0.5 / 73), b


def _alloc_8(x, w, scale, b, *, needs, activation):
    return (short_lived(x, *x.shape[:-1], scale.shape[0]),), saved_tensors(x, scale.shape[0], needs, activation)


@op(
    cost=_cost_8, sample=_sample_8, check=_check_8, alloc=_alloc_8, saved_for_backward=saved_inputs("w", "scale", "b"),
    strided=("x",), autocast="lower", autocast_exempt=("scale",),
)  # fmt: skip
def linear_q8(x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """Multiply the last axis of x, quantized to int8 in blocks of 128, by an int8 weight.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (ceil(F / 16), ceil(C / 8) * 2, 16, 4) uint8 panels, as `quantize.pack_8` makes them.
        scale: (F,) float32. Fused backends give no gradient.
        b: (F,) in x's dtype, or None.
        activation: "none", "gelu_tanh", "gelu_erf", "relu", "silu", "clamped_swiglu" or "clamped_up".
    Returns:
        (..., F), dtype of x. A row of x with an infinity or NaN gives NaN. Its gradients are those of an exact x.
    Raises:
        ValueError: shapes, dtypes, devices or the activation do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    weight = dequantize_8(unpack_8(w, scale.shape[0], x.shape[-1]), scale)
    return _activated(F.linear(round_inputs(x, BLOCK), weight.to(x.dtype), b), activation)


# ---- 4 bits ----


def _check_4(x, w, scale, b, *, out, group, activation):
    check_group("linear_q4", group)
    _check_panels("linear_q4", x, w, b, outputs(w, b, out), 1, activation)
    check.shape("linear_q4", "scale", scale, w.shape[0], -(-x.shape[-1] // group), PANEL)
    _check_scale("linear_q4", x, scale)


def _cost_4(x, w, scale, b=None, *, out=None, activation="none", **_):
    return cost(x, w.nbytes + scale.nbytes, b, outputs(w, b, out), activation)


def _sample_4(rows: int = 1024, width: int = 768, out: int = 2304, group: int = 64, **like):
    x, b, device = torch.randn(rows, width, **like), torch.randn(out, **like), like.get("device")
    w = torch.randint(256, (-(-out // PANEL), -(-width // 8), PANEL, 4), dtype=torch.uint8, device=device)
    scale = torch.rand(w.shape[0], -(-width // group), PANEL, device=device).add(0.5).mul(width**-0.5 / 73)
    return x, w, scale.bfloat16(), b


def _alloc_4(x, w, scale, b, *, needs, out, group, activation):
    out = outputs(w, b, out)
    return (short_lived(x, *x.shape[:-1], out),), saved_tensors(x, out, needs, activation)


@op(
    cost=_cost_4, sample=_sample_4, check=_check_4, alloc=_alloc_4, saved_for_backward=saved_inputs("w", "scale", "b"),
    strided=("x",), autocast="lower", autocast_exempt=("scale",),
)  # fmt: skip
def linear_q4(
    x: Tensor, w: Tensor, scale: Tensor, b: Tensor | None = None, *, out: int | None = None, group: int = 64,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """Multiply the last axis of x, quantized to int8 in blocks of `group`, by a 4-bit weight.

    Args:
        x: (..., C) float32, bfloat16 or float16.
        w: (ceil(F / 16), ceil(C / 8), 16, 4) uint8 panels; scale: (ceil(F / 16), ceil(C / group), 16) bfloat16: as
            `quantize.pack_4` makes them. Fused backends give no gradient of scale.
        b: (F,) in x's dtype, or None.
        out: F. Default: the size of b, else all outputs of the panels.
        group: number of neighboring inputs that share a scale: 32, 64 or 128.
        activation: "none", "gelu_tanh", "gelu_erf", "relu", "silu", "clamped_swiglu" or "clamped_up".
    Returns:
        (..., F), dtype of x. A row of x with an infinity or NaN gives NaN. Its gradients are those of an exact x.
    Raises:
        ValueError: shapes, dtypes, devices, the group or the activation do not fit.
        NotImplementedError: the forced backend does not support the call; the message says why.
    """
    width = x.shape[-1]
    weight = dequantize_4(*unpack_4(w, scale, outputs(w, b, out), width), width, group)
    return _activated(F.linear(round_inputs(x, group), weight.to(x.dtype), b), activation)
