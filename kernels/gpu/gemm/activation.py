"""Activation functions and their derivatives for the Triton kernels. Math and sources: kernels/ops/mlp.py."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from peakgpt.kernels.ops.mlp import SWIGLU_ALPHA, SWIGLU_LIMIT

_TWICE_SQRT_2_PI = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
_RSQRT_2_PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_LIMIT = tl.constexpr(SWIGLU_LIMIT)
_ALPHA = tl.constexpr(SWIGLU_ALPHA)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Return (act(x), act'(x)) of a float32 tile. The compiler drops a result that the caller does not use."""
    if ACT == "relu":
        y = tl.where(x > 0.0, x, x * 0.0)  # NaN stays NaN
        dy = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        y = x * gate
        dy = gate + y * (1.0 - gate)
    elif ACT == "clamped_swiglu":
        clamped = tl.where(x > _LIMIT, _LIMIT, x)  # NaN stays NaN
        gate = 1.0 / (1.0 + tl.exp(clamped * -_ALPHA))
        y = clamped * gate
        dy = tl.where(x > _LIMIT, 0.0, gate + y * _ALPHA * (1.0 - gate))
    elif ACT == "gelu_erf":
        gate = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        y = x * gate
        dy = gate + x * tl.exp(-0.5 * x * x) * _RSQRT_2_PI
    else:
        # gelu_tanh: (1 + tanh u) / 2 = sigmoid(2 u), which needs one exp and no branch.
        square = 0.044715 * x * x
        gate = 1.0 / (1.0 + tl.exp(-(x * _TWICE_SQRT_2_PI) * (1.0 + square)))
        y = x * gate
        dy = gate + y * (1.0 - gate) * (1.0 + 3.0 * square) * _TWICE_SQRT_2_PI
    return y, dy


@triton.jit
def up_factor(x, ACT: tl.constexpr):
    """Return u of a gated layer, h = act(gate) u, from a float32 tile of its other product: x itself for most."""
    if ACT == "clamped_swiglu":
        x = tl.where(x > _LIMIT, _LIMIT, tl.where(x < -_LIMIT, -_LIMIT, x)) + 1.0
    return x


@triton.jit
def up_gradient(du, x, ACT: tl.constexpr):
    """Return the gradient of x from that of u = up_factor(x)."""
    if ACT == "clamped_swiglu":
        du = tl.where((x > _LIMIT) | (x < -_LIMIT), 0.0, du)
    return du
